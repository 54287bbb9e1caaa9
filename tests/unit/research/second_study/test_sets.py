"""Choices among sets of several experts, on made-up labels: laws of the figures, the verdict, and the page."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from simmerge_ray.base.storage import write_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.choosing import utility
from simmerge_ray.research.second_study import sets
from simmerge_ray.research.second_study.candidates import AVERAGE, pair_order, set_candidates, set_order
from simmerge_ray.research.second_study.page import set_blocks
from simmerge_ray.research.second_study.results import ANSWER, CHOSEN, LabelledGroup, LabelledZoos, both_scores
from simmerge_ray.selector.predictor.rows import CandidateRows
from simmerge_ray.selector.predictor.signals import COLUMNS

_TASKS = {"m": "math", "b": "bash", "t": "translation", "q": "qa"}
_EXPERTS = {f"{letter}{number}": task for (letter, task), number in product(_TASKS.items(), (1, 2, 3))}


def made_up(size: int = 4, gain: float = 0.2, num: int = 24) -> LabelledZoos:
    """A candidate's score is its utility, but for noise of the items; the choice is better than the plain average by
    `gain` in every set, and every member has 0.05."""
    generator, groups = np.random.default_rng(0), []
    of_tasks = [[one for one in _EXPERTS if one[0] == letter] for letter in list(_TASKS)[:size]]
    for members in list(product(*of_tasks))[:num]:
        tasks = [_EXPERTS[name] for name in members]
        scores = {
            name: dict.fromkeys(tasks, 0.05 if name.startswith("member") else float(generator.uniform(0.2, 0.6)))
            for name in sets.named_set(members, "base")
        }
        items = {name: {task: generator.normal(of[task], 0.01, 50) for task in tasks} for name, of in scores.items()}
        items[CHOSEN] = items[ANSWER] = {task: items[AVERAGE][task] + gain for task in tasks}
        plan = MergePlan(source=members[0])
        groups.append(LabelledGroup(members, "base", items, scores, scores, plan, plan))
    return LabelledZoos(tuple(groups), 54, _EXPERTS, dict.fromkeys(_EXPERTS, "base"), {"base": {"math": 0.1}})


@pytest.fixture
def catalogue(tmp_path) -> Catalogue:
    write_json(tmp_path / "config.json", {})
    base = CheckpointRef("base", tmp_path)
    return Catalogue(tuple(CheckpointRef(name, tmp_path, "base") for name in _EXPERTS), _EXPERTS, base)


@pytest.mark.parametrize(("size", "num"), [(2, 54), (3, 108), (4, 81)])
def test_sets_have_one_expert_a_task_and_come_in_an_order_of_their_own(catalogue, size, num):
    groups = set_order(catalogue, size)
    assert len(groups) == len(set(groups)) == sets.num_sets(_EXPERTS, size) == num
    assert all(len({_EXPERTS[name] for name in members}) == len(members) == size for members in groups)
    assert groups == set_order(catalogue, size) != sorted(groups)
    if size == 2:
        assert groups == pair_order(catalogue)


def test_candidates_of_any_number_of_members_weigh_them_alike():
    for size in sets.SIZES:
        members = tuple(_EXPERTS)[:size]
        recipes = {name: plan.recipe for name, plan in set_candidates(members).items()}
        assert len(recipes) == 7 and all(one.members == members for one in recipes.values())
        assert all(len({*one.weights}) == 1 for one in recipes.values())


def test_a_gain_that_every_set_has_is_found_and_h11_asks_for_both():
    found = sets.set_figures(made_up())
    (of_four,) = found["sizes"].values()
    first = found["hypotheses"]["H11"]
    assert of_four["counts"] == {"sets": 24, "of": 81} and not first["is_whole"]
    assert first["over"][sets.PLAIN]["value"] == pytest.approx(0.2)
    assert first["over"][sets.PLAIN]["interval"] == pytest.approx([0.2, 0.2]) and first["holds"]
    assert of_four["within_a_set"]["mean"] > 0.9
    assert not sets.set_figures(made_up(gain=0.07))["hypotheses"]["H11"]["holds"]  # sure, and too small
    results = made_up()
    higher = tuple(
        replace(one, items=one.items | {"member 2": {task: of + 1.0 for task, of in one.items[CHOSEN].items()}})
        for one in results.pairs
    )
    assert not sets.set_figures(replace(results, pairs=higher))["hypotheses"]["H11"]["holds"]


def test_ways_are_ordered_as_they_must_be():
    results = made_up()
    ways = sets.set_ways(results.pairs, results.own_task)
    every = np.array([[utility(one.items[name]) for name in one.scores] for one in results.pairs])
    assert ways[sets.SCORED] == pytest.approx(every.max(1), abs=0.02) and (ways[sets.ORACLE] > every.mean(1)).all()
    assert (ways[sets.ELSEWHERE] <= every.max(1)).all() and ways[sets.BEST_MEMBER] == pytest.approx(0.05, abs=0.01)
    assert ways[sets.EXPERTS] == pytest.approx(0.05, abs=0.01)


def test_pairs_and_fours_stand_side_by_side_and_only_fours_decide():
    both = replace(made_up(), pairs=made_up(2).pairs + made_up(4).pairs)
    found = sets.set_figures(both)
    assert list(found["sizes"]) == ["2", "4"]
    blocks = set_blocks(found)
    assert blocks["sets-ways"][0].startswith("4 members, 24 of 81 sets; Spearman")
    assert any(line.startswith("2 members, 9 of 54 sets") for line in blocks["sets-ways"])
    verdict, by_sureness = blocks["sets-verdict"]
    assert by_sureness.startswith("- **H12 does not hold so far**") and "+0.0" in by_sureness  # the same scores
    assert verdict.startswith(
        "- **H11 holds so far**: choice minus plain average, +20.0 [+20.0, +20.0]; minus best member"
    )
    assert sum(line.startswith("| ") for line in blocks["sets-chosen"]) == 2 + 9 + 24
    without = set_blocks(sets.set_figures(made_up(3)))
    assert without["sets-verdict"] == ["- **H11** and **H12** are not tested yet: sets of four that are labelled: 0."]


def test_of_a_few_sets_no_interval_is_told_and_nothing_is_decided():
    found = sets.set_figures(made_up(num=sets.MIN_SETS - 1))
    (of_four,) = found["sizes"].values()
    assert of_four["ways"][0]["utility"] is not None and all(row["interval"] is None for row in of_four["ways"])
    assert not found["hypotheses"]["H11"]["holds"] and not found["hypotheses"]["H12"]["holds"]
    blocks = set_blocks(found)
    assert blocks["sets-verdict"] == ["- **H11** and **H12** are not tested yet: sets of four that are labelled: 4."]
    told = " ".join(blocks["sets-ways"])
    assert "where it was tuned" not in told  # nothing was: the answer by scalars is not told as if it were
    assert "[no interval]" in told and not re.search(r"\[[-+\d]", told)


def test_what_tuning_is_worth_is_told_where_something_was_tuned():
    results, tuned = made_up(2), MergePlan(source="other")
    better = tuple(
        replace(one, answer=tuned, items=one.items | {ANSWER: {t: of + 0.1 for t, of in one.items[CHOSEN].items()}})
        for one in results.pairs
    )
    found = sets.set_figures(replace(results, pairs=better))
    assert found["sizes"]["2"]["tuned"][sets.ALWAYS]["mean"] == pytest.approx(0.1)
    *_, line = set_blocks(found)["sets-verdict"]
    assert line.startswith("- **Tuned per tensor**, 2 members, 9 sets") and "+10.0 [" in line and "+30.0 [" in line
    assert np.isnan(sets.set_ways(results.pairs, results.own_task)[sets.TUNED]).all()


def test_a_score_that_takes_the_better_one_in_every_set_earns_h12():
    """The product's score takes what is worst here, the other one what is best."""
    turned = tuple(
        replace(one, scores={name: {t: -of for t, of in by_task.items()} for name, by_task in one.scores.items()})
        for one in made_up().pairs
    )
    found = sets.set_figures(replace(made_up(), pairs=turned))["hypotheses"]["H12"]
    assert found["mean"] > 0.3 and found["holds"]
    assert not sets.set_figures(made_up())["hypotheses"]["H12"]["holds"]


def test_what_a_member_is_not_sure_of_need_not_stay_whole():
    """c / 2 of retention and the rest of likelihood, c the member's own: half of each where it is certain."""
    columns = {"retention": 0.2, "likelihood": 0.6}
    features = np.zeros((3, len(COLUMNS)))
    for name, value in columns.items():
        features[:, COLUMNS.index(name)] = value
    features[:, COLUMNS.index("own_likelihood")] = 1.0, 0.5, 0.0
    plans = tuple(MergePlan(source=name) for name in "abc")
    rows = CandidateRows(features, np.zeros(3), (("a", "b"),) * 3, ("base",) * 3, ("math",) * 3, plans)
    found = both_scores(rows)
    both = frozenset("ab")
    assert [found[both, "math", plan][0] for plan in plans] == pytest.approx([0.4, 0.4, 0.4])
    assert [found[both, "math", plan][1] for plan in plans] == pytest.approx([0.4, 0.5, 0.6])
