"""Choices among several experts of the real zoo, as `auto` is shipped, beside what is easily taken (H11)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.choosing import best_elsewhere, compare_ways, split_half_oracle, taken, utility
from simmerge_ray.research.pair_sample import PairSample
from simmerge_ray.research.second_study.analysis import (
    BY_SURENESS,
    CHOICE,
    EXPERTS,
    ORACLE,
    PLAIN,
    SCORED,
    TUNED,
    agreement,
    best_by,
    experts_utility,
)
from simmerge_ray.research.second_study.candidates import AVERAGE, set_candidates
from simmerge_ray.research.second_study.results import (
    ANSWER,
    BASE,
    CHOSEN,
    SETS,
    TUNED_PLAN,
    LabelledGroup,
    LabelledZoos,
    PublishedResults,
    read_results,
)
from simmerge_ray.selector.data.splits import Group

SIZES = (2, 3, 4)
BEST_MEMBER = "best member, in hindsight"
ALWAYS = "tuned per tensor, always"
ELSEWHERE = "best fixed candidate of the other sets"
NAMED = {
    "norm-matched average": "norm-matched",
    "all members x 0.4": "all x 0.4",
    "all members x 0.7": "all x 0.7",
    "task arithmetic 1.0": "all x 1",
    "ties(density=0.1)": "ties 0.1 x 1",
    "ties(density=0.5)": "ties 0.5 x 1",
    "base": BASE,
}
MIN_SETS = 5  # of fewer no interval is told: those that could be drawn are too few
_MARGIN = 0.08


def set_section(published: PublishedResults) -> dict[str, Any]:
    """`set_figures` of what is published."""
    return set_figures(read_sets(published.root / SETS))


def read_sets(directory: Path) -> LabelledZoos:
    """What is published there; raises as `read_results`."""
    return read_results(directory, named_set)


def set_figures(results: LabelledZoos) -> dict[str, Any]:
    """By the number of members: counts, ways of choosing with intervals, what the score says within a set, what was
    chosen; and H11."""
    by_size = {size: [one for one in results.pairs if len(one.members) == size] for size in SIZES}
    found = {str(size): _of_size(size, sets, results.own_task) for size, sets in by_size.items() if sets}
    hypotheses = {"H11": _h11(found.get("4")), "H12": _h12(found.get("4"))}
    return {"sizes": found, "singles": results.singles, "hypotheses": hypotheses}


def named_set(members: Group, base: str) -> dict[str, MergePlan]:
    """The candidates of `set_candidates`, the members, numbered, and the base."""
    kept = {_member(number): name for number, name in enumerate(members)} | {BASE: base}
    return set_candidates(members) | {name: MergePlan(source=one) for name, one in kept.items()}


def _member(number: int) -> str:
    return f"member {number + 1}"


def _of_size(size: int, sets: Sequence[LabelledGroup], own_task: Mapping[str, str]) -> dict[str, Any]:
    sample = PairSample(tuple(one.members for one in sets))
    ways = set_ways(sets, own_task)
    found = {
        "counts": {"sets": len(sets), "of": num_sets(own_task, size)},
        "ways": compare_ways(sample, ways, (PLAIN, ELSEWHERE, BEST_MEMBER)),
        "tuned": {name: sample.mean(ways[name] - ways[CHOICE]) for name in (TUNED, ALWAYS)},
        "by_sureness": sample.mean(ways[BY_SURENESS] - ways[SCORED]),
        "num_taken": sum(one.answer != one.chosen for one in sets),
        "within_a_set": sample.mean([agreement(one) for one in sets]),
        "chosen": [[*one.members, one.chosen.label, float(ways[CHOICE][n])] for n, one in enumerate(sets)],
    }
    return found if len(sets) >= MIN_SETS else _without_intervals(found)


def _without_intervals(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {name: None if name == "interval" else _without_intervals(value) for name, value in found.items()}
    return [_without_intervals(one) for one in found] if isinstance(found, list) else found


def set_ways(sets: Sequence[LabelledGroup], own_task: Mapping[str, str]) -> dict[str, np.ndarray]:
    """(N,) utility of what each way takes, by way. What other sets choose is chosen by all of these: of four members
    hardly two sets have none in common."""
    names = list(set_candidates(sets[0].members))
    table = np.array([[utility(one.items[name]) for name in names] for one in sets])
    members = [_member(number) for number in range(len(sets[0].members))]
    worth = {
        CHOICE: [utility(one.items[CHOSEN]) for one in sets],
        TUNED: [utility(one.items[ANSWER]) if _tuned(one) else math.nan for one in sets],
        ALWAYS: [utility(one.items[tuned]) if (tuned := _tuned(one)) else math.nan for one in sets],
        SCORED: [utility(one.items[best_by(one.scores)]) for one in sets],
        BY_SURENESS: [utility(one.items[best_by(one.by_sureness)]) for one in sets],
        PLAIN: table[:, names.index(AVERAGE)],
        **{way: [utility(one.items[name]) for one in sets] for way, name in NAMED.items()},
        ELSEWHERE: taken(table, best_elsewhere(table)),
        BEST_MEMBER: [max(utility(one.items[name]) for name in members) for one in sets],
        EXPERTS: [experts_utility(one, own_task, members) for one in sets],
        ORACLE: [split_half_oracle(one.items) for one in sets],
    }
    return {way: np.array(values) for way, values in worth.items()}


def _tuned(one: LabelledGroup) -> str | None:
    """Name of the choice tuned, taken or not; None where nothing was tuned."""
    if TUNED_PLAN in one.items:
        return TUNED_PLAN
    return ANSWER if one.answer != one.chosen else None


def num_sets(own_task: Mapping[str, str], size: int) -> int:
    """How many sets of experts of as many tasks there are."""
    tasks = [*own_task.values()]
    counts = [tasks.count(task) for task in dict.fromkeys(tasks)]
    return sum(prod(some) for some in combinations(counts, size))


def _h11(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Gains over the plain average and over the best member, which is at least as much as over each."""
    if found is None or found["counts"]["sets"] < MIN_SETS:
        return {"over": {}, "asked": [_MARGIN, 0.0], "holds": False, "is_whole": False}
    over = next(row for row in found["ways"] if row["way"] == CHOICE)["over"]
    gains = {name: over[name] for name in (PLAIN, BEST_MEMBER)}
    clear = all(one["interval"] is not None and one["interval"][0] > 0 for one in gains.values())
    holds = clear and gains[PLAIN]["value"] >= _MARGIN
    return {
        "over": gains,
        "asked": [_MARGIN, 0.0],
        "holds": holds,
        "is_whole": found["counts"]["sets"] == found["counts"]["of"],
    }


def _h12(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Gain of weighing retention by how sure members are."""
    gain = {"mean": None, "interval": None} if found is None else found["by_sureness"]
    return gain | {"holds": gain["interval"] is not None and gain["interval"][0] > 0}
