"""The hypotheses of docs/study-2-plan.md on the real zoo: every figure of its page, from labels and choices alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import comb
from typing import Any

import numpy as np

from simmerge_ray.research.choosing import best_elsewhere, compare_ways, halves_of, split_half_oracle, taken, utility
from simmerge_ray.research.pair_sample import PairSample, rank_correlation
from simmerge_ray.research.second_study.real_labels import AVERAGE, fixed_candidates
from simmerge_ray.research.second_study.results import (
    BASE,
    CHOSEN,
    LEFT,
    RIGHT,
    PublishedResults,
    RealPair,
    RealResults,
    read_results,
)

CHOICE = "label-free choice"
PLAIN = "plain average"
PARENT = "better parent, in hindsight"
ELSEWHERE = "best fixed candidate of the other pairs"
OPERATORS_ELSEWHERE = "best of the paper's operators, of the other pairs"
SCORED = "best fixed candidate by its score"
ORACLE = "split-half oracle"
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


def real_figures(results: RealResults) -> dict[str, Any]:
    """Counts, utilities of single checkpoints, ways of choosing with intervals, hypotheses with verdicts, tasks, what
    the score says, and what labelled evaluations buy."""
    ways = ways_of_choosing(results)
    pairs = [one.pair for one in results.pairs]
    return {
        "counts": {"pairs": len(pairs), "of": results.num_pairs, "candidates": len(_candidates(results)) + len(_KEPT)},
        "singles": results.singles,
        "ways": compare_ways(pairs, ways, (PLAIN, ELSEWHERE, PARENT)),
        "hypotheses": hypotheses(pairs, ways),
        "tasks": by_tasks(results, ways),
        "scores": score_figures(results),
        "evaluations": evaluation_curve(results, ways[CHOICE]),
        "chosen": [[*one.pair, one.chosen.label, float(ways[CHOICE][n])] for n, one in enumerate(results.pairs)],
    }


def real_section(published: PublishedResults) -> dict[str, Any]:
    """`real_figures` of what is published."""
    return real_figures(read_results(published.root))


def ways_of_choosing(results: RealResults) -> dict[str, np.ndarray]:
    """(P,) utility of what each way takes, by way."""
    pairs = [one.pair for one in results.pairs]
    table = np.array([[utility(one.items[name]) for name in _candidates(results)] for one in results.pairs])
    place = {name: number for number, name in enumerate(_candidates(results))}
    papers = [place[name] for name in PAPERS_OPERATORS]

    def of(take: Callable[[RealPair], float]) -> np.ndarray:
        return np.array([take(one) for one in results.pairs])

    found = {
        CHOICE: of(lambda one: utility(one.items[CHOSEN])),
        SCORED: of(lambda one: utility(one.items[_best_by_score(one)])),
        PLAIN: table[:, place[AVERAGE]],
    }
    for way, name in NAMED.items():
        found[way] = np.array([utility(one.items[name]) for one in results.pairs])
    found[OPERATORS_ELSEWHERE] = taken(table[:, papers], best_elsewhere(table[:, papers], pairs))
    found[ELSEWHERE] = taken(table, best_elsewhere(table, pairs))
    found[PARENT] = of(lambda one: max(utility(one.items[name]) for name in (LEFT, RIGHT)))
    found[ORACLE] = of(lambda one: split_half_oracle(one.items))
    return found


def hypotheses(pairs: list[tuple[str, str]], ways: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """H1 to H4: mean, interval, what is asked, and whether it holds. H4 has also the oracle's gain over the plain
    average (`room`), and no share where the interval of that holds 0."""
    sample, choice = PairSample(tuple(pairs)), ways[CHOICE]
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


def by_tasks(results: RealResults, ways: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
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


def score_figures(results: RealResults) -> dict[str, Any]:
    """Rank correlation of score and utility over all candidates and tasks, and within a pair: the sign for this base;
    what the best score falls short of the best utility, both of the same items."""
    sample = PairSample(tuple(one.pair for one in results.pairs))
    scores, utilities = [], []
    for one in results.pairs:
        names = [*fixed_candidates(*one.pair), *_KEPT]
        scores.append(np.array([[one.scores[name][task] for task in one.tasks] for name in names]))
        utilities.append(np.array([[one.items[name][task].mean() for task in one.tasks] for name in names]))
    within = [rank_correlation(of.mean(1), value.mean(1)) for of, value in zip(scores, utilities, strict=True)]
    return {
        "all": sample.pooled_spearman([of.ravel() for of in scores], [value.ravel() for value in utilities]),
        "within_a_pair": sample.mean(within),
        "least_within_a_pair": float(min(within)),
        "regret": sample.mean([
            float(value.mean(1).max() - value.mean(1)[of.mean(1).argmax()])
            for of, value in zip(scores, utilities, strict=True)
        ]),
    }  # fmt: skip


def evaluation_curve(results: RealResults, choice: np.ndarray) -> dict[str, Any]:
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


def _candidates(results: RealResults) -> list[str]:
    return list(fixed_candidates(*results.pairs[0].pair))


def _best_by_score(one: RealPair) -> str:
    """Of the fixed candidates, parents and base."""
    return max(one.scores, key=lambda name: float(np.mean([*one.scores[name].values()])))
