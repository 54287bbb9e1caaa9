"""The analysis of the real zoo on made-up labels: laws of its figures, verdicts, and the page that they make."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.choosing import halves_of, utility
from simmerge_ray.research.made_blocks import check_blocks, filled_page
from simmerge_ray.research.second_study import real_analysis as analysis
from simmerge_ray.research.second_study.page import real_blocks
from simmerge_ray.research.second_study.real_labels import AVERAGE
from simmerge_ray.research.second_study.results import CHOSEN, RealPair, RealResults, named_plans

_TASKS = {"m": "math", "b": "bash", "q": "qa"}
_EXPERTS = [f"{letter}{number}" for letter, number in product(_TASKS, (1, 2, 3))]


def made_up(chosen_gain: float = 0.2, num_items: int = 100) -> RealResults:
    """27 pairs; a candidate's utility is its score, so that the best score is the best candidate but for items' noise;
    the choice is better than the plain average by `chosen_gain` on every pair."""
    generator = np.random.default_rng(0)
    pairs = []
    for left, right in combinations(_EXPERTS, 2):
        if left[0] == right[0]:
            continue
        tasks = (_TASKS[left[0]], _TASKS[right[0]])
        names = list(named_plans(left, right, "base"))
        scores = {name: dict.fromkeys(tasks, float(generator.uniform(0.1, 0.9))) for name in names}
        items = {
            name: {task: generator.normal(of[task], 0.01, num_items) for task in tasks} for name, of in scores.items()
        }
        items[CHOSEN] = {task: items[AVERAGE][task] + chosen_gain for task in tasks}
        pairs.append(RealPair((left, right), items, scores, MergePlan(source=left)))
    return RealResults(tuple(pairs), 54, {"base": dict.fromkeys(_TASKS.values(), 0.1)})


def test_a_gain_that_every_pair_has_is_found_and_claimed():
    found = analysis.real_figures(made_up(0.2))
    first = found["hypotheses"]["H1"]
    assert first["mean"] == pytest.approx(0.2) and first["interval"] == pytest.approx([0.2, 0.2]) and first["holds"]
    assert found["counts"] == {"pairs": 27, "of": 54, "candidates": 19}
    worse = analysis.real_figures(made_up(-0.2))["hypotheses"]
    assert not any(one["holds"] for one in worse.values())
    assert not analysis.real_figures(made_up(0.07))["hypotheses"]["H1"]["holds"]  # sure, and too small


def test_ways_are_ordered_as_they_must_be():
    results = made_up()
    ways = analysis.ways_of_choosing(results)
    fixed = np.array([[utility(one.items[name]) for name in one.scores] for one in results.pairs])
    assert (ways[analysis.SCORED] <= fixed.max(1) + 1e-12).all()
    assert ways[analysis.SCORED].mean() > ways[analysis.ELSEWHERE].mean()  # here the score knows, other pairs do not
    assert analysis.score_figures(results)["all"]["mean"] > 0.99
    assert analysis.score_figures(results)["regret"]["mean"] < 0.01


def test_the_best_of_all_draws_is_the_best_and_of_one_the_mean():
    halves = np.random.default_rng(1).random((7, 2))
    curve = analysis.best_of_draws(halves)
    assert curve[0] == pytest.approx(halves.mean())
    even, odd = halves.T
    assert curve[-1] == pytest.approx((odd[even.argmax()] + even[odd.argmax()]) / 2)
    of_three = [
        (odd[list(one)][even[list(one)].argmax()] + even[list(one)][odd[list(one)].argmax()]) / 2
        for one in combinations(range(7), 3)
    ]
    assert curve[2] == pytest.approx(np.mean(of_three))


def test_halves_are_those_of_even_and_odd_items():
    items = {"math": np.array([1.0, 0.0, 1.0, 0.0]), "qa": np.array([0.0, 1.0])}
    assert halves_of(items) == (0.5, 0.5)


def test_the_page_is_made_from_the_figures_and_says_what_fails_first():
    found = analysis.real_figures(made_up(0.07))
    blocks = real_blocks(found)
    verdict = blocks["real-verdict"]
    assert "27 of 54" in verdict[0] and "none is decided" in verdict[0]
    assert verdict[2].startswith("- **H1 does not hold so far**") and "asked: >= +8 points" in verdict[2]
    whole = real_blocks(found | {"counts": found["counts"] | {"of": 27}})["real-verdict"]
    assert whole[2].startswith("- **H1 is not earned**") and "none is decided" not in whole[0]
    page = "# Title\n\n" + "\n\n".join(f"<!-- made: {name} -->\n<!-- end -->" for name in blocks) + "\n\nProse.\n"
    filled = filled_page(page, blocks)
    assert filled.endswith("Prose.\n") and filled_page(filled, blocks) == filled
    checked = check_blocks(filled.replace("Prose", "Prose of 7 words"), blocks)
    assert not checked.mismatches and checked.num_values > 100 and [number for _, number in checked.unchecked] == ["7"]
    first, *_ = map(str, check_blocks(filled.replace("+7.0", "+8.0"), blocks).mismatches)
    assert "+8.0" in first and "+7.0" in first
    with pytest.raises(ConfigError, match="real-ways"):
        filled_page(page.replace("made: real-ways", "made: other"), blocks)
