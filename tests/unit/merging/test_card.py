"""The model card of a merge: parents by the names that others know, and measured values before predicted ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.write.card import model_card
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import pair_plan, resolve_plan


def test_the_card_names_parents_of_the_hub_and_shows_what_was_measured(catalogue):
    graph = compile_plan(resolve_plan(pair_plan("m0", "m1", make_arm("linear")), catalogue))
    cached = Path("/home/me/.cache/huggingface/hub/models--org--math-1b--it/snapshots/0123abc")
    first = replace(graph.checkpoints["m0"], path=cached)
    of_hub = replace(graph, checkpoints={**graph.checkpoints, "m0": first})
    measured = {"measured": 0.7, "se": 0.02}
    card = model_card(of_hub, {"add": {"utility": 0.9, "sd": 0.1} | measured, "m0 on add": {"retention": 0.8}})
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["base_model"] == ["org/math-1b--it"]
    assert "| add | 0.700 | 0.020 |" in card and "0.900" not in card and "predicted" not in card
    assert "| m0 on add | 0.800 |" in card
