"""The analysis of the second study on made-up labels: laws of its figures, verdicts, and the page that they make."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe
from simmerge_ray.research.choosing import halves_of, utility
from simmerge_ray.research.made_blocks import check_blocks, filled_page
from simmerge_ray.research.second_study import analysis
from simmerge_ray.research.second_study.candidates import AVERAGE
from simmerge_ray.research.second_study.page import real_blocks, small_blocks
from simmerge_ray.research.second_study.results import (
    ANSWER,
    CHOSEN,
    LEFT,
    RIGHT,
    LabelledGroup,
    LabelledZoos,
    named_plans,
)

_TASKS = {"m": "math", "b": "bash", "q": "qa"}
_EXPERTS = [f"{letter}{number}" for letter, number in product(_TASKS, (1, 2, 3))]


def made_up(chosen_gain: float = 0.2, num_items: int = 100) -> LabelledZoos:
    """27 pairs; a candidate's utility is its score, so that the best score is the best candidate but for items' noise;
    the choice is better than the plain average by `chosen_gain` on every pair."""
    generator = np.random.default_rng(0)
    pairs = []
    for left, right in combinations(_EXPERTS, 2):
        if left[0] == right[0]:
            continue
        tasks = (_TASKS[left[0]], _TASKS[right[0]])
        names = list(named_plans((left, right), "base"))
        scores = {name: dict.fromkeys(tasks, float(generator.uniform(0.1, 0.9))) for name in names}
        items = {
            name: {task: generator.normal(of[task], 0.01, num_items) for task in tasks} for name, of in scores.items()
        }
        items[CHOSEN] = items[ANSWER] = {task: items[AVERAGE][task] + chosen_gain for task in tasks}
        pairs.append(
            LabelledGroup((left, right), "base", items, scores, scores, MergePlan(source=left), MergePlan(source=left))
        )
    own_task, base_of = {one: _TASKS[one[0]] for one in _EXPERTS}, dict.fromkeys(_EXPERTS, "base")
    return LabelledZoos(tuple(pairs), 54, own_task, base_of, {"base": dict.fromkeys(_TASKS.values(), 0.1)})


def test_a_gain_that_every_pair_has_is_found_and_claimed():
    found = analysis.real_figures(made_up(0.2))
    first = found["hypotheses"]["H1"]
    assert first["mean"] == pytest.approx(0.2) and first["interval"] == pytest.approx([0.2, 0.2]) and first["holds"]
    assert found["counts"] == {"pairs": 27, "of": 54, "bases": 1, "candidates": 19}
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
    assert verdict[2].startswith("- **What there is to have**")
    assert verdict[3].startswith("- **H1 does not hold so far**") and "asked: >= +8 points" in verdict[3]
    whole = real_blocks(found | {"counts": found["counts"] | {"of": 27}})["real-verdict"]
    assert whole[3].startswith("- **H1 is not earned**") and "none is decided" not in whole[0]
    page = "# Title\n\n" + "\n\n".join(f"<!-- made: {name} -->\n<!-- end -->" for name in blocks) + "\n\nProse.\n"
    filled = filled_page(page, blocks)
    assert filled.endswith("Prose.\n") and filled_page(filled, blocks) == filled
    checked = check_blocks(filled.replace("Prose", "Prose of 7 words"), blocks)
    assert not checked.mismatches and checked.num_values > 100 and [number for _, number in checked.unchecked] == ["7"]
    first, *_ = map(str, check_blocks(filled.replace("+7.0", "+8.0"), blocks).mismatches)
    assert "+8.0" in first and "+7.0" in first
    with pytest.raises(ConfigError, match="real-ways"):
        filled_page(page.replace("made: real-ways", "made: other"), blocks)


def of_bases(num: int = 4, closed: float = 0.9, num_items: int = 400) -> LabelledZoos:
    """Pairs of two tasks on several bases. A parent has 0.8 on its own task and 0 on the other; a fixed candidate has
    half of that but for one, which is as good as the choice on every base but the first; the choice closes the given
    share of both gaps."""
    generator, pairs, base_of = np.random.default_rng(1), [], {}
    for base in map(str, range(num)):
        for left, right in product((f"{base}-m1", f"{base}-m2"), (f"{base}-b1", f"{base}-b2")):
            base_of |= {left: base, right: base}

            def drawn(math: float, bash: float) -> dict[str, np.ndarray]:
                shares = {"math": math, "bash": bash}
                return {task: (generator.random(num_items) < share) * 1.0 for task, share in shares.items()}

            names = list(named_plans((left, right), base))
            items = {name: drawn(0.4, 0.4) for name in names} | {LEFT: drawn(0.8, 0), RIGHT: drawn(0, 0.8)}
            items[CHOSEN] = items[ANSWER] = drawn(0.8 * closed, 0.8 * closed)
            items["1/1"] = items[CHOSEN] if base != "0" else drawn(0.0, 0.0)
            scores = {name: dict.fromkeys(("math", "bash"), float(generator.random())) for name in names}
            pairs.append(
                LabelledGroup(
                    (left, right), base, items, scores, scores, MergePlan(source=left), MergePlan(source=left)
                )
            )
    own_task = {name: {"m": "math", "b": "bash"}[name.split("-")[1][0]] for name in base_of}
    singles = {base: {"math": 0.0, "bash": 0.1} for base in base_of.values()}
    singles |= {name: {task: 0.8} for name, task in own_task.items()}
    return LabelledZoos(tuple(pairs), 54 * num, own_task, base_of, singles)


def test_gap_closed_is_the_share_of_the_way_to_the_expert():
    found = analysis.small_figures(of_bases())
    ways = {row["way"]: row for row in found["gaps"]["ways"]}
    choice = ways[analysis.CHOICE]
    assert choice["mean"] == pytest.approx(0.9, abs=0.02) and choice["interval"][0] > 0.85
    assert ways[analysis.PLAIN]["mean"] == pytest.approx(0.5, abs=0.02)
    assert ways[analysis.HINDSIGHT]["mean"] >= max(one["mean"] for one in ways.values())
    over = found["gaps"]["over_paper"]
    assert over["mean"] == pytest.approx(0.4, abs=0.03) and over["interval"][0] > 0.3
    assert found["hypotheses"]["H6"]["holds"] and found["gaps"]["contexts"] == found["gaps"]["of"] == 32
    assert found["gaps"]["by_base"].keys() == set("0123")
    row = found["bases"][0]
    assert row["best_task"] == 0.1 and row["least_expert"] == 0.8 and row["pairs"] == 4
    assert row["best_parent"] == pytest.approx(0.4, abs=0.03)
    assert not analysis.small_figures(of_bases(closed=0.6))["hypotheses"]["H6"]["holds"]


def test_what_other_pairs_choose_is_chosen_on_other_bases():
    results = of_bases()
    ways = analysis.ways_of_choosing(results)
    first = np.array([one.base == "0" for one in results.pairs])
    assert (ways[analysis.ELSEWHERE][first] == 0.0).all()  # by its own pairs the first base would not take it
    assert ways[analysis.EXPERTS] == pytest.approx(0.8, abs=0.05) and ways[analysis.PARENT].max() < 0.5
    assert ways[analysis.ELSEWHERE][~first] == pytest.approx(ways[analysis.CHOICE][~first])
    assert analysis.TUNED not in ways


def test_answers_are_counted_by_what_they_are():
    results, pair = of_bases(), ("a", "b")
    sums = [
        MergePlan(recipe=Recipe(make_arm("task_arithmetic"), pair, weights)) for weights in ((0.1, 1.0), (0.5, 0.6))
    ]
    scaled = MergePlan(recipe=Recipe(make_arm("task_arithmetic"), ("a",), (1.1,)))
    plans = [*sums, scaled, *(MergePlan(source="a") for _ in range(13))]
    pairs = [replace(one, chosen=plan, answer=plan) for one, plan in zip(results.pairs, plans, strict=True)]
    pairs[-1] = replace(pairs[-1], answer=sums[1])
    found = analysis.small_figures(replace(results, pairs=tuple(pairs)))["answers"]
    one = "one checkpoint"
    assert found == {f"{one} scaled, or next to it": 2, "a merge": 1, f"{one} as it is": 12, "tuned": 1}


def test_an_answer_that_is_tuned_is_a_way_of_its_own():
    results = of_bases()
    tuned = replace(results.pairs[0], items=results.pairs[0].items | {ANSWER: results.pairs[0].items[LEFT]})
    ways = analysis.ways_of_choosing(replace(results, pairs=(tuned, *results.pairs[1:])))
    assert (ways[analysis.TUNED] != ways[analysis.CHOICE]).tolist() == [True] + 15 * [False]


def test_the_small_blocks_say_whether_it_holds():
    found = analysis.small_figures(of_bases())
    blocks = small_blocks(found)
    assert "16 pairs" in blocks["small-verdict"][0] and "4 bases" in blocks["small-verdict"][0]
    assert "**H6 is earned**" in blocks["small-verdict"][2]
    assert blocks["small-verdict"][3] == "- Answers of `auto`: 16 one checkpoint as it is."
    assert any(line.startswith("| **label-free choice** | 0.") for line in blocks["small-gaps"])
    assert sum(line.startswith("| ") for line in blocks["small-bases"]) == 2 + 4
    worse = small_blocks(analysis.small_figures(of_bases(closed=0.6)))
    assert "**H6 is not earned**" in worse["small-verdict"][2]
