from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.later_arm import _head, later_arm
from simmerge_ray.selector.data.splits import checkpoint_folds, pairs_of
from tests.unit.selector.made_up import planted

CONFIG = TrainConfig(num_members=2, num_epochs=100)


def rows_of(arm: str) -> dict[object, dict[str, object]]:
    dataset = planted(num_checkpoints=8)
    folds = checkpoint_folds(pairs_of(dataset.contexts), 4, 0)
    found = later_arm(dataset, arm, folds, CONFIG, counts=(0, 10), num_draws=3)
    return {row["num_labels"]: row for row in found}


def test_an_arm_that_is_best_for_half_of_the_merges_is_found_from_labels():
    rows = rows_of("ties")
    assert rows[0]["gain"] == 0.0 and rows[0]["chosen"] == 0.0
    assert 0.3 < rows["all"]["chosen"] < 0.7
    assert rows["all"]["gain"] > 0.05 and rows["all"]["gain_interval"][1] > rows["all"]["gain"]
    assert rows["all"]["gain"] >= rows[10]["gain"] > 0


def test_an_arm_that_is_never_best_gains_nothing():
    rows = rows_of("nuslerp")
    assert rows["all"]["chosen"] < 0.1 and abs(rows["all"]["gain"]) < 0.03


def test_an_unknown_arm_is_refused():
    dataset = planted()
    with pytest.raises(LabelError, match="slerp"):
        later_arm(dataset, "slerp", checkpoint_folds(pairs_of(dataset.contexts), 4, 0), CONFIG)


def test_the_head_finds_a_linear_contrast_and_with_one_label_predicts_it_everywhere():
    z = np.random.default_rng(0).normal(size=(4000, 2, 3))
    contrast = 0.3 + z[:, 0] @ [1.0, 0.0, -2.0]
    z[:, 1] = z[:, 0]
    np.testing.assert_allclose(_head(z[:3900], contrast[:3900], z[3900:]), contrast[3900:], atol=0.03)
    np.testing.assert_allclose(_head(z[:1], contrast[:1], z[1:5]), contrast[0])
