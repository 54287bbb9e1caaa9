"""The answer: chosen on one half of the items, reported from the other, against the best single checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.errors import LabelError, TaskError
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.search.objectives import parse_objective
from simmerge_ray.search.winner import (
    Candidate,
    check_items,
    choose_winner,
    difference,
    objective_estimate,
)

TASKS = ("r", "s")
OBJECTIVES = [parse_objective(text, TASKS) for text in ("mean", "worst", "s", "r=3,s=1")]
MEAN = OBJECTIVES[0]


def single(name: str, items: dict[str, np.ndarray]) -> Candidate:
    return Candidate(MergePlan(source=name), items)


def merge(items: dict[str, np.ndarray], operator: str = "linear") -> Candidate:
    return Candidate(pair_plan("a", "b", make_arm(operator)), items)


def halves(choosing: float, reporting: float, size: int = 40) -> dict[str, np.ndarray]:
    """One task: the even items have one utility, the odd ones another."""
    return {"r": np.where(np.arange(size) % 2 == 0, choosing, reporting)}


@pytest.fixture
def items() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {"r": generator.random(31), "s": generator.random(8)}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.name)
def test_an_estimate_is_the_objective_of_the_means(items, objective):
    utilities = {task: float(values.mean()) for task, values in items.items()}
    assert objective_estimate(items, objective).value == pytest.approx(objective.value(utilities))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.name)
def test_nothing_differs_from_itself_and_the_difference_changes_its_sign_with_the_sides(items, objective):
    assert difference(items, items, objective).value == difference(items, items, objective).se == 0.0
    other = {task: np.sqrt(values) for task, values in items.items()}
    there, back = difference(items, other, objective), difference(other, items, objective)
    assert there.value == pytest.approx(-back.value) and there.se == pytest.approx(back.se)


def test_the_error_of_a_difference_is_that_of_pairs_of_items():
    generator = np.random.default_rng(1)
    common, noise = generator.random(400), 0.01 * generator.normal(size=400)
    left, right = {"r": common + noise}, {"r": common}
    found = difference(left, right, MEAN)
    assert found.se == pytest.approx(noise.std(ddof=1) / 20)
    assert found.se < objective_estimate(left, MEAN).se / 10


def test_tasks_count_the_same_whatever_the_number_of_their_items():
    items = {"r": np.repeat([0.0, 1.0], 50), "s": np.ones(4)}
    found = objective_estimate(items, MEAN)
    assert found.value == pytest.approx(0.75)
    assert found.se == pytest.approx(0.5 * np.repeat([0.0, 1.0], 50).std(ddof=1) / 10)


def test_the_standard_error_is_that_of_repeated_measurements():
    generator = np.random.default_rng(2)
    draws = [
        difference(
            {"r": generator.random(50), "s": generator.random(10)}, {"r": generator.random(50), "s": np.ones(10)}, MEAN
        )
        for _ in range(2000)
    ]
    # A standard deviation of 2000 draws is off by 1.6 %; the mean of the reported errors by less.
    assert np.std([one.value for one in draws]) == pytest.approx(np.mean([one.se for one in draws]), rel=0.08)


def test_the_choice_is_made_on_one_half_and_reported_from_the_other():
    lucky, steady = merge(halves(0.9, 0.5)), merge(halves(0.8, 0.8), "nuslerp")
    verdict = choose_winner([single("a", halves(0.6, 0.7)), steady, lucky], MEAN)
    assert verdict.winner is lucky and not verdict.keeps_checkpoint
    assert verdict.utility.value == pytest.approx(0.5)
    assert verdict.chosen_by.value == pytest.approx(0.3) and verdict.advantage.value == pytest.approx(-0.2)


def test_a_merge_that_beats_no_checkpoint_leaves_the_best_checkpoint():
    best = single("b", halves(0.8, 0.75))
    verdict = choose_winner([single("a", halves(0.7, 0.9)), best, merge(halves(0.79, 0.9))], MEAN)
    assert verdict.winner is best and verdict.keeps_checkpoint and verdict.utility.value == pytest.approx(0.75)
    assert verdict.advantage.value == pytest.approx(0.15)
    equal = choose_winner([merge(halves(0.8, 0.8)), best], MEAN)
    assert equal.winner is best, "a merge has to be better, not as good"


def test_of_equally_good_merges_the_first_is_taken_and_it_is_said():
    first, second = merge(halves(0.8, 0.5)), merge(halves(0.8, 0.9), "nuslerp")
    below = merge(halves(0.7, 1.0), "ties")
    verdict = choose_winner([single("a", halves(0.6, 0.7)), below, first, second], MEAN, preferred="the shorter one")
    assert verdict.winner is first and verdict.num_equal == 1
    assert "1 other merge is as good on the half that chose; taken is the shorter one" in verdict.lines()
    alone = choose_winner([single("a", halves(0.6, 0.7)), below, first], MEAN)
    assert alone.num_equal == 0 and not any("as good on" in line for line in alone.lines())


def test_a_recipe_is_a_merge():
    recipe = Candidate(MergePlan(recipe=plain_average(["a", "b", "c"])), halves(0.8, 0.8))
    verdict = choose_winner([single("a", halves(0.6, 0.7)), merge(halves(0.7, 0.9)), recipe], MEAN)
    assert verdict.winner is verdict.best_merge is recipe and verdict.best_single.plan.source == "a"


def test_two_standard_errors_of_noise_are_seldom_passed_when_nothing_differs():
    generator = np.random.default_rng(3)
    clear = 0
    for _ in range(300):
        rows = [{"r": (generator.random(200) < 0.6).astype(float)} for _ in range(6)]
        verdict = choose_winner([single("a", rows[0]), *(merge(row) for row in rows[1:])], MEAN)
        clear += verdict.advantage.is_clear
    assert clear < 30  # 5 % of 300 are 15, with a standard deviation of 3.8


def test_what_is_missing_on_one_side_leaves_the_other():
    only_merge = choose_winner([merge(halves(0.5, 0.5))], MEAN)
    assert only_merge.best_single is None and only_merge.advantage is None and not only_merge.keeps_checkpoint
    assert choose_winner([single("a", halves(0.5, 0.5))], MEAN).keeps_checkpoint
    with pytest.raises(LabelError, match="nothing was measured"):
        choose_winner([], MEAN)


def test_a_task_that_cannot_be_split_is_refused():
    check_items("r", 4)
    with pytest.raises(TaskError, match="'r' has 3 items"):
        check_items("r", 3)


def test_the_base_is_compared_and_where_it_is_the_best_nothing_is_merged():
    base, parent = single("base", halves(0.9, 0.9)), single("a", halves(0.5, 0.5))
    verdict = choose_winner([parent, merge(halves(0.7, 0.7)), base], MEAN, "base")
    first, second = verdict.lines()
    assert first.startswith("answer: do not merge: keep the base, base, as it is, 0.900 ± 0.000 on 20 items of each")
    assert second.startswith("the best merge, linear: a + b, against it: -0.200")
    better = choose_winner([parent, merge(halves(0.95, 0.95)), base], MEAN, "base")
    assert better.answer == "merge linear: a + b" and "against the best checkpoint, base" in better.lines()[1]
    kept = choose_winner([single("a", halves(0.97, 0.97)), merge(halves(0.95, 0.95)), base], MEAN, "base")
    assert kept.answer == "keep a" and kept.lines()[-1] == "the base, base, on the same items: 0.900 ± 0.000"


def test_an_answer_says_that_it_has_nothing_on_a_task_or_less_than_the_base():
    good, noise = np.full(40, 0.9), np.random.default_rng(0).random(40) / 10
    base = single("base", {"r": np.full(40, 0.2), "s": np.full(40, 0.3), "t": 0.5 + noise})
    best = merge({"r": good, "s": np.zeros(40), "t": 0.2 + noise})
    lines = choose_winner([best, base], MEAN, "base").lines()
    assert "warning: the answer has 0 on s: it solves none of its 40 items" in lines
    assert "warning: on t the answer is worse than the base: -0.300 ± 0.000" in lines
    assert not any("on r" in line for line in lines)
