"""What is left out stays out; a pair that is tested twice counts once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from simmerge_ray.base.errors import LabelError
from simmerge_ray.selector.data.splits import (
    Fold,
    base_folds,
    checkpoint_folds,
    domain_folds,
    fold_mean,
    pairs_of,
    random_pair_folds,
    resampled_weights,
)
from tests.unit.selector.made_up import planted

CONTEXTS = planted(6).contexts
PAIRS = pairs_of(CONTEXTS)


@pytest.mark.parametrize("max_groups", [2, 4, 12])
def test_a_checkpoint_that_is_left_out_is_in_no_training_pair(max_groups):
    folds = checkpoint_folds(PAIRS, max_groups, seed=0)
    assert len(folds) == min(max_groups, 6)
    for fold in folds:
        assert not {name for row in fold.training for name in PAIRS[row]} & set(fold.name.split(", "))
        assert sorted((*fold.training, *fold.tested)) == list(range(len(PAIRS)))
    assert {row for fold in folds for row in fold.tested} == set(range(len(PAIRS)))


def test_random_pairs_are_tested_once_with_all_their_tasks():
    folds = random_pair_folds(PAIRS, 4, seed=0)
    assert sorted(row for fold in folds for row in fold.tested) == list(range(len(PAIRS)))
    for fold in folds:
        assert not {PAIRS[row] for row in fold.training} & {PAIRS[row] for row in fold.tested}


def test_a_base_that_is_left_out_takes_its_checkpoints_with_it():
    pairs = [("a1", "a2"), ("a1", "a3"), ("b1", "b2"), ("b2", "b3")]
    base_of = {name: name[0] for pair in pairs for name in pair}
    assert base_folds(pairs, base_of) == [Fold("a", (2, 3), (0, 1)), Fold("b", (0, 1), (2, 3))]
    with pytest.raises(LabelError, match="one base .*needs a second one"):
        base_folds(pairs[:2], base_of)
    with pytest.raises(LabelError, match="one base is needed"):
        base_folds([("a1", "b1")], base_of)


def test_a_domain_that_is_left_out_is_in_no_training_pair():
    tasks = {"c0": "p", "c1": "p", "c2": "q", "c3": "q", "c4": "r", "c5": "r"}
    contexts = [dataclasses.replace(c, task=tasks[c.left if c.task == "s" else c.right]) for c in CONTEXTS]
    folds = domain_folds(contexts)
    assert [fold.name for fold in folds] == ["p", "q", "r"]
    for fold in folds:
        assert fold.training and sorted((*fold.training, *fold.tested)) == list(range(len(contexts)))
        assert all(fold.name in (tasks[contexts[row].left], tasks[contexts[row].right]) for row in fold.tested)
        assert all(fold.name not in (tasks[contexts[row].left], tasks[contexts[row].right]) for row in fold.training)
    with pytest.raises(LabelError, match="three tasks at least"):
        domain_folds(CONTEXTS)


def test_a_row_of_several_folds_is_averaged_and_counted_once():
    folds = [Fold("a", (), (0, 1)), Fold("b", (), (1,))]
    mean = fold_mean(folds, [np.array([[1.0], [2.0]]), np.array([[4.0]])], 3)
    np.testing.assert_array_equal(mean, [[1.0], [3.0], [np.nan]])


def test_resampling_draws_checkpoints_and_bases():
    weights = resampled_weights(PAIRS, None, 4000, 0)
    # E[c_i c_j] of a multinomial of n draws over n is (n - 1) / n.
    np.testing.assert_allclose(weights.mean(0), 5 / 6, atol=0.1)
    base_of = {f"c{i}": "ab"[i // 3] for i in range(6)}
    inside = [row for row, pair in enumerate(PAIRS) if base_of[pair[0]] == base_of[pair[1]]]
    pairs = [PAIRS[row] for row in inside]
    weights = resampled_weights(pairs, base_of, 4000, 0)
    np.testing.assert_allclose(weights.mean(0), 2 / 3, atol=0.1)
    of_a = np.array([base_of[left] == "a" for left, _ in pairs])
    # One base is missing in half of the samples of two.
    assert abs((weights[:, of_a].sum(1) == 0).mean() - (0.25 + 0.75 * 1 / 9)) < 0.1
    np.testing.assert_array_equal(weights, resampled_weights(pairs, base_of, 4000, 0))
