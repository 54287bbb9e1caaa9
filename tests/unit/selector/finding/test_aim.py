"""What is wanted of a candidate: one number from what it keeps of every owner."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.search.objectives import parse_objective
from simmerge_ray.selector.finding.aim import Aim, worth
from simmerge_ray.signals.candidates.signatures import Owner

OWNERS = (Owner("m0", "math"), Owner("c0", "code"), Owner("m1", "math"), Owner("base", "general"))
TASKS = ("code", "math")


def aim(objective="mean", forget=None, owners=OWNERS):
    return Aim(owners, "base", parse_objective(objective, TASKS), forget)


ROWS = np.array([[1.0, 0.5, 0.0, 0.97], [0.4, 0.9, 0.6, 0.99], [0.5, 0.5, 0.5, 1.0]])
SURE = np.full(ROWS.shape, 1e9)  # exp(-nll) is 0, so that worth is half the retention


def test_worth_is_the_mean_of_retention_and_of_the_probability_of_a_token():
    assert worth(np.array(0.5), np.array(np.log(4))) == pytest.approx(0.375)
    assert worth(np.ones(2), np.zeros(2)).tolist() == [1.0, 1.0]


@given(st.floats(0, 1), st.floats(0, 50), st.floats(0, 0.2))
def test_worth_lies_in_0_to_1_and_falls_with_nll(retention, nll, more):
    one, other = worth(np.array(retention), np.array([nll, nll + more]))
    assert 0 <= other <= one <= 1


def test_members_of_one_task_share_it_and_the_base_is_no_task():
    assert aim().tasks == TASKS
    np.testing.assert_allclose(aim().by_task(ROWS), [[0.5, 0.5], [0.9, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(2 * aim().scores(ROWS, SURE), [0.5, 0.7, 0.5])


def test_worst_and_weights_and_one_task():
    np.testing.assert_allclose(2 * aim("worst").scores(ROWS, SURE), [0.5, 0.5, 0.5])
    np.testing.assert_allclose(2 * aim("math=3,code=1").scores(ROWS, SURE), [0.5, 0.6, 0.5])
    np.testing.assert_allclose(2 * aim("code").scores(ROWS, SURE), [0.5, 0.9, 0.5])


def test_weights_count_by_their_ratio():
    one, other = (aim(text).scores(ROWS, SURE) for text in ("math=3,code=1", "math=0.6,code=0.2"))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_what_forgets_more_than_it_may_is_out():
    assert np.isneginf(aim(forget=0.02).scores(ROWS, SURE)).tolist() == [True, False, False]
    assert np.isneginf(aim(forget=0.0).scores(ROWS, SURE)).tolist() == [True, True, False]
    assert np.isneginf(aim(forget=0.03).scores(ROWS, SURE)).tolist() == [False] * 3  # 0.97 to the bound
    assert np.isfinite(aim().scores(ROWS, SURE)).all()


def test_general_probes_as_members_own_do_not_make_the_base_a_member():
    owners = (Owner("m0", "general"), Owner("m1", "general"), Owner("base", "general"))
    one = Aim(owners, "base", parse_objective("mean", ["general"]))
    assert one.tasks == ("general",)
    np.testing.assert_allclose(one.by_task(np.array([[0.2, 0.4, 0.9]])), [[0.3]])
