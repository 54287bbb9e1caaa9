from __future__ import annotations

from dataclasses import replace

import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.headline import holm, primary_test
from simmerge_ray.selector.data.dataset import join_datasets
from tests.unit.selector.made_up import planted

CONFIG = TrainConfig(num_members=2, num_epochs=150)


def three_bases(learnable: bool):
    parts, base_of = [], {}
    for number in range(3):
        part = planted(num_checkpoints=7, learnable=learnable, seed=number)
        contexts = tuple(replace(c, left=f"{number}-{c.left}", right=f"{number}-{c.right}") for c in part.contexts)
        base_of |= {name: f"b{number}" for c in contexts for name in (c.left, c.right)}
        parts.append(replace(part, contexts=contexts))
    return join_datasets(parts), base_of


def test_a_rule_that_holds_on_every_base_is_found_and_claimed():
    found = primary_test(*three_bases(learnable=True), CONFIG)
    assert found["claimed"] and found["gain"] > 0.1 and found["interval"][0] > 0
    assert found["by_base"]["gains"].keys() == {"b0", "b1", "b2"}
    assert found["by_base"]["interval"][0] < found["by_base"]["mean"] < found["by_base"]["interval"][1]
    assert 0.5 < found["oracle"]["share"] <= 1.1
    assert all(one["non_inferior"] for one in found["domains"].values())
    assert sum(one["num_defined"] for one in found["domains"].values()) == found["num_defined"]


def test_noise_is_not_claimed():
    found = primary_test(*three_bases(learnable=False), CONFIG)
    assert not found["claimed"]
    assert found["interval"][0] < 0


def test_one_base_is_refused():
    dataset, base_of = three_bases(learnable=True)
    with pytest.raises(LabelError, match="one base"):
        primary_test(dataset, dict.fromkeys(base_of, "b"), CONFIG)


@pytest.mark.parametrize(
    ("p_values", "rejected"),
    [
        ([0.01, 0.02, 0.03, 0.04], [True, False, False, False]),  # 0.02 > 0.05 / 3
        ([0.04, 0.001, 0.012, 0.02], [True, True, True, True]),
        ([0.06, 0.001], [False, True]),
        ([0.05], [True]),
    ],
)
def test_holm_steps_down_until_the_first_that_is_not_rejected(p_values, rejected):
    assert holm(p_values) == rejected
