"""Inputs of the predictor: what they are computed from, and what plays no part."""

from __future__ import annotations

import inspect

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.selector.predictor.model import UtilityPredictor
from simmerge_ray.selector.predictor.signals import COLUMNS, SingleValues, candidate_features
from tests.unit.selector.predictor.made_up import singles_of


def test_inputs_of_one_candidate_by_hand():
    singles = SingleValues(np.array([0.2, 0.4, 0.6]), np.array([1.0, 2.0, 0.0]), np.array([0.1, 0.3, 0.2]))
    tasks, found = candidate_features(["t", "t", "s"], np.array([[1, 0.5, 0.25]]), np.array([[0, 7, 1.0]]), singles)
    assert tasks == ("s", "t") and found.shape == (1, 2, len(COLUMNS))
    of_t = dict(zip(COLUMNS, found[0, 1], strict=True))
    assert of_t["retention"] == 0.75 and of_t["nll"] == 2.5  # 7 nats count as 5
    assert np.isclose(of_t["likelihood"], (1 + np.exp(-7)) / 2)
    assert of_t["others_retention"] == of_t["others_least"] == 0.25
    assert np.isclose(of_t["base_retention"], 0.3)
    assert np.isclose(of_t["base_likelihood"], np.exp([-1.0, -2.0]).mean())
    assert np.isclose(of_t["own_likelihood"], np.exp([-0.1, -0.3]).mean())
    of_s = dict(zip(COLUMNS, found[0, 0], strict=True))
    assert of_s["others_retention"] == 0.75 and of_s["others_least"] == 0.5


def test_where_all_owners_are_of_one_task_they_are_each_others_others():
    singles = singles_of(2, np.random.default_rng(0))
    _, found = candidate_features(["t", "t"], np.array([[0.9, 0.3]]), np.ones((1, 2)), singles)
    assert np.isclose(found[0, 0, COLUMNS.index("others_retention")], 0.6)
    assert np.isclose(found[0, 0, COLUMNS.index("others_least")], 0.3)


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_order_of_owners_plays_no_part(num_owners, seed):
    generator = np.random.default_rng(seed)
    tasks = [str(task) for task in generator.choice(list("abc"), num_owners)]
    retention, nll = generator.random((3, num_owners)), generator.exponential(size=(3, num_owners))
    singles, order = singles_of(num_owners, generator), generator.permutation(num_owners)
    names, found = candidate_features(tasks, retention, nll, singles)
    shuffled = [tasks[index] for index in order]
    again, other = candidate_features(shuffled, retention[:, order], nll[:, order], singles.of(order.tolist()))
    assert names == again and np.allclose(found, other, rtol=1e-12, atol=1e-12)


def test_candidates_do_not_look_at_each_other():
    generator = np.random.default_rng(1)
    retention, nll, singles = generator.random((4, 2)), generator.random((4, 2)), singles_of(2, generator)
    _, together = candidate_features(["s", "t"], retention, nll, singles)
    _, alone = candidate_features(["s", "t"], retention[2:3], nll[2:3], singles)
    assert (together[2] == alone[0]).all()


def test_how_a_candidate_is_made_is_no_input():
    """Neither a plan nor an operator can be handed over, and no column names one."""
    for function in (candidate_features, UtilityPredictor.predict):
        assert not {"plan", "plans", "operator", "arm", "arms", "recipe"} & set(inspect.signature(function).parameters)
    assert set(COLUMNS) == {
        "retention", "nll", "likelihood", "others_retention", "others_least", "base_retention", "base_likelihood",
        "own_likelihood",
    }  # fmt: skip
