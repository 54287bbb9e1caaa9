"""Headroom statistics: cases worked out by hand, and the laws that any set of contexts obeys."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from simmerge_ray.base.errors import InputError
from simmerge_ray.search.headroom import Context, headroom
from tests.contexts import made_context, split_items, zoos
from tests.unit.selector.made_up import planted

EXACT = 1e-12  # float64 means of a few dozen numbers


def test_gap_closed_of_one_context_by_hand() -> None:
    report = headroom([made_context({"x": (0.5, 0.5), "y": (0.35, 0.35)})], num_resamples=10)
    assert report.arm_gap_closed == pytest.approx({"x": 0.5, "y": 0.25}, abs=EXACT)
    assert report.arm_mean_ratio == pytest.approx({"x": 0.5, "y": 0.25}, abs=EXACT)
    assert report.per_context.best_fixed_arm == "x"
    assert report.per_context.gain == pytest.approx(0, abs=EXACT)
    assert report.per_context.arm_win_share == {"x": 1.0, "y": 0.0}


def test_oracle_chooses_on_one_half_and_is_scored_on_the_other() -> None:
    # x is best on the even items and worthless on the odd ones, y the other way round: each choice meets the bad half
    report = headroom([made_context({"x": (0.8, 0.2), "y": (0.2, 0.8)})], num_resamples=10)
    assert report.per_context.split_half_oracle == pytest.approx(0.0, abs=EXACT)
    assert report.per_context.maximum == pytest.approx(0.5, abs=EXACT)
    assert report.per_context.best_fixed == pytest.approx(0.5, abs=EXACT)
    assert report.per_context.gain == pytest.approx(-0.5, abs=EXACT)


def test_parents_have_rows_of_their_own_and_are_no_fixed_arm() -> None:
    # On its own task a parent is the expert (1), on the other's the auxiliary (0); x closes half of both gaps.
    math, code = (
        made_context({"x": (0.5, 0.5)}, left=sides[0], right=sides[1], task=task)
        for task, sides in (("math", ((0.8, 0.8), (0.2, 0.2))), ("code", ((0.2, 0.2), (0.8, 0.8))))
    )
    report = headroom([math, code], num_resamples=10)
    assert report.per_context.best_fixed_arm == report.per_merge.best_fixed_arm == "x"
    assert set(report.arm_gap_closed) == set(report.per_merge.arm_win_share) == {"x"}
    assert report.per_context.keep.better_parent == pytest.approx(1.0, abs=EXACT)  # another parent for each task
    assert report.per_merge.keep.better_parent == pytest.approx(0.5, abs=EXACT)  # one for both
    assert report.per_context.keep.gain == pytest.approx(0.5, abs=EXACT) and report.per_context.keep.win_share == 1.0
    assert report.per_merge.keep.split_half_oracle == pytest.approx(0.5, abs=EXACT)
    # A parent that is as good on the other's task closes all of it: kept, it is better than every arm.
    both = headroom([math, replace(code, left_items=math.left_items, right_items=math.right_items)], num_resamples=10)
    assert both.per_merge.keep.better_parent == pytest.approx(1.0, abs=EXACT)
    assert both.per_merge.keep.gain == pytest.approx(0.5, abs=EXACT) and both.per_merge.gain == 0.0


def test_directions_are_averaged_before_the_ratio() -> None:
    # choose even, score odd: (0.5 - 0.3) / (0.7 - 0.3); choose odd, score even: (0.6 - 0.2) / (0.8 - 0.2)
    report = headroom([made_context({"x": (0.6, 0.5)}, left=(0.8, 0.7), right=(0.2, 0.3))], num_resamples=10)
    assert report.arm_gap_closed["x"] == pytest.approx(((0.2 + 0.4) / 2) / ((0.4 + 0.6) / 2), abs=EXACT)


def test_a_direction_with_too_small_a_gap_does_not_count() -> None:
    # the gap of the odd half is below 0.1, so only (choose even, score odd) counts: (0.42 - 0.3) / (0.38 - 0.3)
    context = made_context({"x": (0.5, 0.42)}, left=(0.8, 0.38), right=(0.2, 0.3))
    assert headroom([context], num_resamples=10).arm_gap_closed["x"] == pytest.approx(1.5, abs=EXACT)


def test_halves_that_do_not_agree_on_the_expert_make_the_context_missing() -> None:
    reversed_on_odd = made_context({"x": (0.5, 0.5)}, left=(0.8, 0.2), right=(0.2, 0.8), names=("c", "d"))
    report = headroom([reversed_on_odd, made_context({"x": (0.5, 0.5)})], num_resamples=10)
    assert (report.num_contexts, report.num_defined) == (2, 1)


def test_contexts_with_too_small_or_too_uncertain_a_gap_are_missing() -> None:
    good = made_context({"x": (0.5, 0.5)})
    small = made_context({"x": (9.0, 9.0)}, left=(0.29, 0.29), names=("a", "c"))
    noise = np.tile([1.0, 1.0, -1.0, -1.0], 10)
    uncertain = replace(good, right="d", left_items=good.left_items + 5 * noise, arms={"x": split_items(9.0, 9.0)})
    report = headroom([good, small, uncertain], num_resamples=10)
    assert (report.num_contexts, report.num_defined) == (3, 1)
    assert report.arm_gap_closed["x"] == pytest.approx(0.5, abs=EXACT)
    with pytest.raises(InputError, match="none of the 2 contexts"):
        headroom([small, uncertain])


def test_headline_is_the_ratio_of_sums_per_task_then_the_mean_over_tasks() -> None:
    contexts = [
        made_context({"x": (0.8, 0.8)}, names=("a", "b")),
        made_context({"x": (0.2, 0.2)}, left=(0.5, 0.5), names=("a", "c")),
        made_context({"x": (0.5, 0.5)}, task="code"),
    ]
    report = headroom(contexts, num_resamples=10)
    assert report.arm_gap_closed["x"] == pytest.approx(((0.6 + 0.0) / (0.6 + 0.3) + 0.5) / 2, abs=EXACT)
    assert report.arm_mean_ratio["x"] == pytest.approx((1 + 0 + 0.5) / 3, abs=EXACT)
    assert report.per_context.tasks["math"].num_contexts == 2
    assert report.per_context.tasks["math"].arm_gap_closed["x"] == pytest.approx(2 / 3, abs=EXACT)


def test_one_arm_per_merge_cannot_serve_two_tasks_that_disagree() -> None:
    contexts = [
        made_context({"x": (0.8, 0.8), "y": (0.5, 0.5)}, task="math"),
        made_context({"x": (0.2, 0.2), "y": (0.5, 0.5)}, left=(0.2, 0.2), right=(0.8, 0.8), task="code"),
    ]
    report = headroom(contexts, num_resamples=10)
    assert report.per_context.num_units == 2
    assert report.per_merge.num_units == 1
    assert report.per_context.split_half_oracle == pytest.approx(0.75, abs=EXACT)
    assert report.per_merge.split_half_oracle == pytest.approx(0.5, abs=EXACT)
    assert report.per_merge.maximum == pytest.approx(0.5, abs=EXACT)


def test_win_needs_two_paired_standard_errors() -> None:
    num = 400
    base = made_context({"x": (0.5, 0.5)}, names=("a", "b"))
    lead = np.zeros(num)
    lead[:4] = 1.0  # mean 0.01, standard error sqrt(.01 * .99 / 399) = 0.00498: just above two
    half = np.full(num, 0.5)
    context = replace(
        base, left_items=np.full(num, 0.8), right_items=np.full(num, 0.2), arms={"x": half, "y": half + lead}
    )
    assert headroom([context], num_resamples=5).per_context.arm_win_share == {"x": 0.0, "y": 1.0}
    fewer = half + np.where(np.arange(num) < 3, 1.0, 0.0)
    context = replace(context, arms={"x": half, "y": fewer})
    assert headroom([context], num_resamples=5).per_context.arm_win_share == {"x": 0.0, "y": 0.0}


def test_interval_contains_the_gain_and_shrinks_to_it_when_all_contexts_agree() -> None:
    names = ["a", "b", "c", "d", "e"]
    pairs = [(left, right) for i, left in enumerate(names) for right in names[:i]]
    alternating = [
        made_context({"x": (0.8, 0.8) if i % 2 else (0.2, 0.2), "y": (0.2, 0.2) if i % 2 else (0.8, 0.8)}, names=pair)
        for i, pair in enumerate(pairs)
    ]
    objective = headroom(alternating, num_resamples=300).per_context
    assert objective.gain == pytest.approx(0.5, abs=EXACT)
    assert objective.gain_interval[0] < 0.5 < objective.gain_interval[1]
    same = [made_context({"x": (0.5, 0.5), "y": (0.3, 0.3)}, names=pair) for pair in pairs]
    assert headroom(same, num_resamples=50).per_context.gain_interval == pytest.approx((0, 0), abs=EXACT)


def test_report_is_plain_json() -> None:
    report = headroom([made_context({"x": (0.5, 0.5), "y": (0.35, 0.35)})], num_resamples=10)
    content = json.loads(json.dumps(report.to_json()))
    assert content == report.to_json()
    assert content["per_merge"]["tasks"]["math"]["best_fixed_arm"] == "x"


def test_bad_contexts_are_named() -> None:
    good = made_context({"x": (0.5, 0.5)})
    with pytest.raises(InputError, match="no contexts"):
        headroom([])
    with pytest.raises(InputError, match=r"a \+ b on math has arms \['y'\]"):
        headroom([good, made_context({"y": (0.5, 0.5)})])
    with pytest.raises(InputError, match=r"x has items of shape \(3,\)"):
        headroom([replace(good, arms={"x": np.zeros(3)})])
    with pytest.raises(InputError, match="not a finite number"):
        headroom([replace(good, arms={"x": np.full(40, np.nan)})])


def _figures(contexts: list[Context]) -> dict[str, object]:
    return headroom(contexts, num_resamples=5).to_json()


def _assert_same_figures(left: object, right: object) -> None:
    if left is None or right is None:
        assert left is right
    elif isinstance(left, dict) and isinstance(right, dict):
        assert left.keys() == right.keys()
        for key in left:
            _assert_same_figures(left[key], right[key])
    elif isinstance(left, str) or isinstance(right, str):
        assert left == right
    else:
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(zoos())
def test_swapping_the_parents_changes_nothing(contexts: list[Context]) -> None:
    swapped = [
        replace(c, left=c.right, right=c.left, left_items=c.right_items, right_items=c.left_items) for c in contexts
    ]
    _assert_same_figures(_figures(contexts), _figures(swapped))


@settings(max_examples=30, deadline=None)
@given(zoos())
def test_maximum_is_at_least_every_arm_and_the_oracle_per_task(contexts: list[Context]) -> None:
    for task in headroom(contexts, num_resamples=1).per_context.tasks.values():
        assert task.maximum >= task.split_half_oracle - 1e-9
        assert task.maximum >= max(task.arm_gap_closed.values()) - 1e-9


@settings(max_examples=30, deadline=None)
@given(zoos())
def test_arms_that_are_all_alike_have_no_headroom(contexts: list[Context]) -> None:
    alike = [replace(c, arms={arm: c.arms["x"] for arm in c.arms}) for c in contexts]
    report = headroom(alike, num_resamples=5)
    for objective in (report.per_context, report.per_merge):
        assert objective.gain == pytest.approx(0, abs=1e-9)
        assert objective.gain_interval == pytest.approx((0, 0), abs=1e-9)
        assert set(objective.arm_win_share.values()) == {0.0}


def test_intervals_of_a_task_hold_what_they_are_of():
    report = headroom(planted().contexts, num_resamples=400)
    for task in report.per_context.tasks.values():
        values = dict(task.arm_gap_closed) | {"": task.split_half_oracle}
        assert set(task.intervals) == set(values)
        for name, value in values.items():
            low, high = task.intervals[name]
            assert low - 1e-9 <= value <= high + 1e-9
    assert any(high - low > 0.01 for low, high in task.intervals.values())
