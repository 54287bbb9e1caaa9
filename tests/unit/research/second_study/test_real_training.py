from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from simmerge_ray.base.storage import read_json
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.model import load_model
from simmerge_ray.research.second_study.held_out import held_out_values, value_rows
from simmerge_ray.research.second_study.real_recipes import RealRecipe
from simmerge_ray.research.second_study.real_tasks import GENERAL, REAL_TASKS, RealData
from simmerge_ray.research.second_study.real_training import packed_answer_loss, train_real_expert
from simmerge_ray.research.zoo.training import Row, row_loss
from tests import tiny
from tests.unit.research.second_study.made_up import write_real_tasks

RECIPE = RealRecipe("math-1", "math", 1e-2, 12, num_rows=4, row_tokens=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    tiny.save(tiny.make_model(hidden_size=32), root / "base")
    write_real_tasks(root / "tasks")
    return root


def trained(place, out, **changes):
    return train_real_expert(replace(RECIPE, **changes), place / "base", RealData(place / "tasks"), out)


def test_an_expert_of_all_weights_is_a_checkpoint_in_the_bases_dtype_that_has_learned(place, tmp_path):
    full = trained(place, tmp_path / "full")
    weights = load_file(full / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    again = load_file(trained(place, tmp_path / "again") / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    data = RealData(place / "tasks")
    before, after = (held_out_values(CheckpointRef("x", path), data)["math"] for path in (place / "base", full))
    assert after["mean_probability"] > 5 * before["mean_probability"]


def test_a_lora_expert_is_a_small_adapter_that_the_catalogues_readers_take(place, tmp_path):
    adapter = trained(place, tmp_path / "lora", lora_rank=2, mixed=GENERAL, mixed_share=0.3)
    assert not (adapter / "model.safetensors").exists()
    config = read_json(adapter / "adapter_config.json")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "base"  # wherever it lay
    base = load_model(CheckpointRef("base", place / "base"))
    expert = load_model(CheckpointRef("x", place / "base", adapter=adapter))
    changed = [
        name
        for (name, old), (_, new) in zip(base.named_parameters(), expert.named_parameters(), strict=True)
        if not torch.equal(old, new)
    ]
    assert changed and not any("embed" in name or "norm" in name or "lm_head" in name for name in changed)


def test_examples_of_one_row_do_not_see_each_other(place):
    """The loss of two packed examples is the mean of their losses alone, weighted by their learned tokens."""
    model = tiny.make_model(hidden_size=32).eval()
    one = Row([5, 6, 7, 8], [0, 1, 2, 3], [0.0, 0.0, 1.0, 1.0])
    other = Row([9, 10, 11], [0, 1, 2], [0.0, 0.0, 1.0])
    packed = Row(one.ids + other.ids, one.positions + other.positions, one.weights + other.weights)
    with torch.no_grad():
        alone = [float(packed_answer_loss(model, [row])) for row in (one, other)]
        together = float(packed_answer_loss(model, [packed]))
        exact = float(row_loss(model, [one]))  # in float32
    assert together == pytest.approx((2 * alone[0] + alone[1]) / 3, abs=2e-2)  # products in bfloat16
    assert alone[0] == pytest.approx(exact, abs=2e-2)


def test_the_table_shows_the_utility_and_exact_match_beside_another_one():
    values = {"base": {task: {"exact_match": 0.25, "mean_probability": 0.5} for task in REAL_TASKS}}
    assert value_rows(values)[-1] == "| base | 0.25 | 0.50 (0.25) | 0.50 (0.25) | 0.25 |"
