"""The model card of a merge: front matter that hubs read, the plan, utilities, and what its readers must know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from simmerge_ray.base.markdown import table_lines
from simmerge_ray.base.storage import Place
from simmerge_ray.checkpoints.cards import card_matter
from simmerge_ray.checkpoints.references import GRAMS, CheckpointRef
from simmerge_ray.merging.graph import MergeGraph

_IN_CACHE = "models--"  # what a model's directory in the cache of the hub starts with


def licence_of(ref: CheckpointRef) -> str | None:
    """The `license` of a checkpoint's own model card, if it has one."""
    licence = card_matter(ref).get("license")
    return str(licence) if licence else None


def hub_name(place: Place | None) -> str | None:
    """`owner/name` of what lies in the cache of the hub; None for any other place, which nobody else has."""
    found = [part.removeprefix(_IN_CACHE) for part in getattr(place, "parts", ()) if part.startswith(_IN_CACHE)]
    return found[-1].replace("--", "/", 1) if found else None


def model_card(graph: MergeGraph, predicted: Mapping[str, Any] | None, not_finite: Sequence[str] = ()) -> str:
    """Markdown of the card.

    Args:
        predicted: by task an object with `utility` and `sd`, or, measured, with `measured` and `se`, which stand
            instead of predictions; by owner one with `retention`, the share of its own answers that the merge gives as
            well. not_finite: names of tensors.
    """
    parents = {key: ref for key, ref in graph.checkpoints.items() if not key.endswith(GRAMS)}
    licences = {key: licence for key, ref in parents.items() if (licence := licence_of(ref))}
    distinct = sorted(set(licences.values()))
    matter: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["merge", "simmerge_ray"],
    }
    places = [place for ref in parents.values() for place in (ref.path, ref.adapter)]
    if of_hub := [name for name in map(hub_name, places) if name]:
        matter["base_model"] = list(dict.fromkeys(of_hub))
    if len(distinct) == 1 and len(licences) == len(parents):
        matter["license"] = distinct[0]
    lines = ["---", yaml.safe_dump(matter, sort_keys=False).strip(), "---", ""]
    lines += [f"# Merge of {' and '.join(graph.members)}", "", f"`{graph.title}`", ""]
    if len(distinct) > 1:
        named = ", ".join(f"{key}: {licence}" for key, licence in licences.items())
        lines += [f"> **The parents' licences differ ({named}).** Check whether they allow this merge.", ""]
    if not_finite:
        lines += [f"> **{len(not_finite)} tensors hold NaN or infinity**, the first is `{not_finite[0]}`.", ""]
    if predicted:
        utilities = [(task, one["utility"], one["sd"]) for task, one in predicted.items() if "utility" in one]
        kept = [(owner, one["retention"]) for owner, one in predicted.items() if "retention" in one]
        measured = [(task, one["measured"], one["se"]) for task, one in predicted.items() if "measured" in one]
        if measured:
            lines += table_lines(("task", "measured utility", "standard error"), measured)
        elif utilities:
            lines += table_lines(("task", "predicted utility", "sd"), utilities)
        lines += table_lines(("answers of", "kept by the merge"), kept) if kept else []
    lines += ["Made by simmerge_ray from:", "", "```json", json.dumps(dict(graph.description), indent=2), "```", ""]
    return "\n".join(lines)
