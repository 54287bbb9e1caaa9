"""The hypotheses of docs/study-2-plan.md: every figure of the study's page, from labels and choices alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from simmerge_ray.research.choosing import best_elsewhere, compare_ways, halves_of, split_half_oracle, taken, utility
from simmerge_ray.research.pair_sample import PairSample, rank_correlation
from simmerge_ray.research.second_study.candidates import AVERAGE, fixed_candidates
from simmerge_ray.research.second_study.results import (
    ANSWER,
    BASE,
    CHOSEN,
    LEFT,
    RIGHT,
    LabelledGroup,
    LabelledZoos,
    PublishedResults,
    read_results,
)
from simmerge_ray.research.study.gains import percentile_interval
from simmerge_ray.search.headroom import Context, DefinedGaps, defined_gaps

CHOICE = "label-free choice"
TUNED = "label-free choice, tuned where held-out probes say so"
PLAIN = "plain average"
PARENT = "better parent, in hindsight"
EXPERTS = "each expert on its own task: a merge that loses nothing"
ELSEWHERE = "best fixed candidate of the other pairs"
OPERATORS_ELSEWHERE = "best of the paper's operators, of the other pairs"
SCORED = "best fixed candidate by its score"
BY_SURENESS = "best fixed candidate by its score, by how sure members are"
ORACLE = "split-half oracle"
HINDSIGHT = "best of all candidates and the choice, in hindsight"
NAMED = {
    "norm-matched average": "norm-matched",
    "task arithmetic 1.0": "1/1",
    "ties(density=0.5)": "ties 0.5 x 1",
    "slerp": "slerp",
    "base": BASE,
}
PAPERS_OPERATORS = (AVERAGE, "slerp", "ties 0.5 x 1")
EVALUATIONS = (1, 2, 4, 8, 16)
_KEPT = (LEFT, RIGHT, BASE)
_LITTLE = 0.15


def zoo_figures(results: LabelledZoos, ways: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Counts, utilities of single checkpoints, ways of choosing with intervals, tasks, what the score says, and what
    labelled evaluations buy. ways: of `ways_of_choosing`."""
    return {
        "counts": {
            "pairs": len(results.pairs),
            "of": results.num_pairs,
            "bases": len(results.bases),
            "candidates": len(_candidates(results)) + len(_KEPT),
        },
        "singles": results.singles,
        "ways": compare_ways(sample_of(results), ways, (PLAIN, ELSEWHERE, PARENT)),
        "tasks": by_tasks(results, ways),
        "scores": score_figures(results) | {"by_sureness": sample_of(results).mean(ways[BY_SURENESS] - ways[SCORED])},
        "evaluations": evaluation_curve(results, ways[CHOICE]),
    }


def real_figures(results: LabelledZoos) -> dict[str, Any]:
    """`zoo_figures`, the hypotheses H1 to H4 with verdicts, and what was chosen."""
    ways = ways_of_choosing(results)
    chosen = [[*one.members, one.chosen.label, float(ways[CHOICE][n])] for n, one in enumerate(results.pairs)]
    return zoo_figures(results, ways) | {"hypotheses": hypotheses(sample_of(results), ways), "chosen": chosen}


def small_figures(results: LabelledZoos) -> dict[str, Any]:
    """`zoo_figures`, GapClosed with H6, and the bounds of the recipe, base by base."""
    gaps = gap_figures(results)
    found = zoo_figures(results, ways_of_choosing(results)) | {"gaps": gaps, "hypotheses": {"H6": _closes_gap(gaps)}}
    return found | {"bases": base_rows(results), "answers": Counter(map(_kind_of_answer, results.pairs))}


def _kind_of_answer(one: LabelledGroup) -> str:
    """A member that has less than `_LITTLE` of the other's weight is next to nothing."""
    if one.answer != one.chosen:
        return "tuned"
    if one.answer.recipe is None:
        return "one checkpoint as it is"
    weights = sorted(abs(float(weight)) for weight in one.answer.recipe.weights if isinstance(weight, int | float))
    return (
        "one checkpoint scaled, or next to it" if weights[0] < _LITTLE * weights[-1] or not weights[1:] else "a merge"
    )


def real_section(published: PublishedResults) -> dict[str, Any]:
    """`real_figures` of what is published."""
    return real_figures(read_results(published.root / "real"))


def small_section(published: PublishedResults) -> dict[str, Any]:
    """`small_figures` of what is published."""
    return small_figures(read_results(published.root / "small"))


def sample_of(results: LabelledZoos) -> PairSample:
    """Draws bases, where there are several, and their checkpoints."""
    return PairSample(tuple(one.members for one in results.pairs), results.base_of)


def ways_of_choosing(results: LabelledZoos) -> dict[str, np.ndarray]:
    """(P,) utility of what each way takes, by way. What other pairs choose is chosen by those of other bases; of one
    base, by those that share no checkpoint."""
    several = len(results.bases) > 1
    groups = [(one.base,) if several else one.members for one in results.pairs]
    table = np.array([[utility(one.items[name]) for name in _candidates(results)] for one in results.pairs])
    place = {name: number for number, name in enumerate(_candidates(results))}
    papers = [place[name] for name in PAPERS_OPERATORS]

    def of(take: Callable[[LabelledGroup], float]) -> np.ndarray:
        return np.array([take(one) for one in results.pairs])

    found = {CHOICE: of(lambda one: utility(one.items[CHOSEN]))}
    if (tuned := of(lambda one: utility(one.items[ANSWER]))).tolist() != found[CHOICE].tolist():
        found[TUNED] = tuned
    found[SCORED] = of(lambda one: utility(one.items[best_by(one.scores)]))
    found[BY_SURENESS] = of(lambda one: utility(one.items[best_by(one.by_sureness)]))
    found[PLAIN] = table[:, place[AVERAGE]]
    for way, name in NAMED.items():
        found[way] = np.array([utility(one.items[name]) for one in results.pairs])
    found[OPERATORS_ELSEWHERE] = taken(table[:, papers], best_elsewhere(table[:, papers], groups))
    found[ELSEWHERE] = taken(table, best_elsewhere(table, groups))
    found[PARENT] = of(lambda one: max(utility(one.items[name]) for name in (LEFT, RIGHT)))
    found[EXPERTS] = of(lambda one: experts_utility(one, results.own_task, (LEFT, RIGHT)))
    found[ORACLE] = of(lambda one: split_half_oracle(one.items))
    return found


def hypotheses(sample: PairSample, ways: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """H1 to H4: mean, interval, what is asked, and whether it holds. H4 has also the oracle's gain over the plain
    average (`room`), and no share where the interval of that holds 0."""
    choice = ways[CHOICE]
    room = sample.mean(ways[ORACLE] - ways[PLAIN])
    share = sample.ratio(choice - ways[PLAIN], ways[ORACLE] - ways[PLAIN])
    if room["interval"][0] <= 0:  # a share of nothing
        share |= {"mean": None, "interval": None}
    holds = share["mean"] is not None and share["mean"] >= 0.85
    found: dict[str, dict[str, Any]] = {"H4": share | {"room": room, "asked": 0.85, "holds": holds}}
    for name, other, margin in (("H1", PLAIN, 0.08), ("H2", ELSEWHERE, 0.02), ("H3", PARENT, 0.05)):
        gain = sample.mean(choice - ways[other])
        holds = gain["mean"] is not None and gain["mean"] >= margin and gain["interval"][0] > 0
        found[name] = gain | {"asked": margin, "holds": holds}
    return dict(sorted(found.items()))


def gap_figures(results: LabelledZoos) -> dict[str, Any]:
    """GapClosed (`search.headroom`): ratio of sums over pairs for each task, then the mean over tasks.

    Returns:
        ways: rows (way, value, interval) of the choice, of fixed candidates, and of the best of a pair on all items,
        which is more than any way of choosing can have. over_paper: what the choice closes more
        than the best of the paper's operators, which is chosen in hindsight. by_base: the choice's, by base. contexts:
        how many (pair, task) are defined.
    """
    arms = {CHOICE: CHOSEN, TUNED: ANSWER, PLAIN: AVERAGE, **{way: name for way, name in NAMED.items()}}
    contexts = [
        Context(
            one.members[0],
            one.members[1],
            task,
            {way: one.items[name][task] for way, name in {**arms, HINDSIGHT: _best_of(one)}.items()},
            one.items[LEFT][task],
            one.items[RIGHT][task],
        )
        for one in results.pairs
        for task in one.tasks
    ]
    names = [*arms, HINDSIGHT]
    gaps = defined_gaps(contexts, tuple(names))
    pairs = tuple((contexts[row].left, contexts[row].right) for row in gaps.rows)
    weights = PairSample(pairs, results.base_of).weights if pairs else np.empty((0, 0))
    closed = dict(zip(names, gaps.closed.T, strict=True))
    papers = [PLAIN, *(way for way, name in NAMED.items() if name in PAPERS_OPERATORS)]
    best = max(papers, key=lambda way: float(gaps.headline(closed[way])))
    rows = [{"way": way, **_closed(gaps, closed[way], weights)} for way in names]
    of_bases = [results.base_of[left] for left, _ in pairs]
    by_base = {
        base: float(gaps.headline(closed[CHOICE], np.array([float(one == base) for one in of_bases])))
        for base in dict.fromkeys(of_bases)
    }
    over = {"best": best, **_closed(gaps, closed[CHOICE] - closed[best], weights)}
    return {"ways": rows, "over_paper": over, "by_base": by_base, "contexts": len(gaps.gap), "of": len(contexts)}


def _best_of(one: LabelledGroup) -> str:
    return max(one.items, key=lambda name: utility(one.items[name]))


def _closed(gaps: DefinedGaps, numerators: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """None where no gap is defined."""
    if not len(gaps.gap):
        return {"mean": None, "interval": None}
    interval = percentile_interval(gaps.headline(numerators, weights))
    return {"mean": float(gaps.headline(numerators)), "interval": interval}


def _closes_gap(gaps: Mapping[str, Any]) -> dict[str, Any]:
    choice = next(row for row in gaps["ways"] if row["way"] == CHOICE)
    over = gaps["over_paper"]
    known = choice["mean"] is not None
    holds = known and choice["mean"] >= 0.8 and over["mean"] >= 0.15 and over["interval"][0] > 0
    return {"choice": choice, "over_paper": over, "asked": [0.8, 0.15], "holds": holds}


def base_rows(results: LabelledZoos) -> list[dict[str, Any]]:
    """Of each base: its best task, its least expert on its own task, and the better parent's mean over both tasks, the
    highest of all pairs; and how many pairs are labelled."""
    rows = []
    for base in results.bases:
        experts = [name for name, of in results.base_of.items() if of == base]
        pairs = [one for one in results.pairs if one.base == base]
        parents = [utility(one.items[name]) for one in pairs for name in (LEFT, RIGHT)]
        rows.append({
            "base": base,
            "best_task": max(results.singles[base].values(), default=None),
            "least_expert": min(
                (results.singles[name].get(results.own_task[name], 0.0) for name in experts), default=None
            ),
            "best_parent": max(parents, default=None),
            "pairs": len(pairs),
        })  # fmt: skip
    return rows


def by_tasks(results: LabelledZoos, ways: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Means over the pairs of each two tasks."""
    shown = (CHOICE, PLAIN, ELSEWHERE, PARENT, BASE, ORACLE)
    kinds = ["+".join(sorted(one.tasks)) for one in results.pairs]
    rows = []
    for kind in sorted(set(kinds)):
        chosen = [number for number, one in enumerate(kinds) if one == kind]
        rows.append({"tasks": kind, "pairs": len(chosen)} | {name: _mean(ways[name][chosen]) for name in shown})
    return rows


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def score_figures(results: LabelledZoos) -> dict[str, Any]:
    """Rank correlation of score and utility over all candidates and tasks, and within a pair: the sign for this base;
    what the best score falls short of the best utility, both of the same items."""
    sample = sample_of(results)
    scores, utilities = [], []
    for one in results.pairs:
        names = list(one.scores)
        scores.append(np.array([[one.scores[name][task] for task in one.tasks] for name in names]))
        utilities.append(np.array([[one.items[name][task].mean() for task in one.tasks] for name in names]))
    within = [agreement(one) for one in results.pairs]
    return {
        "all": sample.pooled_spearman([of.ravel() for of in scores], [value.ravel() for value in utilities]),
        "within_a_pair": sample.mean(within),
        "least_within_a_pair": float(min(within)),
        "regret": sample.mean([
            float(value.mean(1).max() - value.mean(1)[of.mean(1).argmax()])
            for of, value in zip(scores, utilities, strict=True)
        ]),
    }  # fmt: skip


def agreement(one: LabelledGroup) -> float:
    """Rank correlation of score and utility over the candidates, members and base, means of all tasks."""
    scores = [float(np.mean([*of_task.values()])) for of_task in one.scores.values()]
    return rank_correlation(np.array(scores), np.array([utility(one.items[name]) for name in one.scores]))


def evaluation_curve(results: LabelledZoos, choice: np.ndarray) -> dict[str, Any]:
    """Utility of the best of n fixed candidates drawn without replacement, chosen on one half of the items, reported on
    the other; expected over all draws. reached: the least n whose mean is at least the choice's, None if none is."""
    names = _candidates(results)
    curves = np.array(
        [best_of_draws(np.array([halves_of(one.items[name]) for name in names])) for one in results.pairs]
    )
    mean, wanted = curves.mean(0), choice.mean()
    reached = np.flatnonzero(mean >= wanted)
    numbers = {str(n): float(mean[n - 1]) for n in EVALUATIONS if n <= len(names)}
    return {
        "utility": numbers | {str(len(names)): float(mean[-1])},
        "choice": float(wanted),
        "reached": int(reached[0]) + 1 if len(reached) else None,
        "of": len(names),
    }


def best_of_draws(halves: np.ndarray) -> np.ndarray:
    """(K,) expected utility on one half of what is best on the other among n of K, n from 1 to K; mean of both ways.

    The r-th best (from 0) is the best of n with probability C(K - 1 - r, n - 1) / C(K, n). halves: (K, 2).
    """
    num = len(halves)
    chances = np.array([[comb(num - 1 - r, n - 1) / comb(num, n) for r in range(num)] for n in range(1, num + 1)])
    ways = [halves[np.argsort(-halves[:, side], kind="stable"), 1 - side] for side in (0, 1)]
    return np.asarray(chances @ np.mean(ways, axis=0))


def _candidates(results: LabelledZoos) -> list[str]:
    return list(fixed_candidates(results.pairs[0].members))


def experts_utility(one: LabelledGroup, own_task: Mapping[str, str], names: Sequence[str]) -> float:
    """Mean over the members, whose unmerged results have these names, of the utility of each on its own task."""
    own = [one.items[name][own_task[member]].mean() for name, member in zip(names, one.members, strict=True)]
    return float(np.mean(own))


def best_by(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Name of the one among the fixed candidates, members and base; scores by name and task."""
    return max(scores, key=lambda name: float(np.mean([*scores[name].values()])))
