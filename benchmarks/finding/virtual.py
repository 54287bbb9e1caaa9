"""The fixed grid scored from signatures, nothing merged: straight mixtures, and curved by one look at the average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.finding.choices import sources_of
from benchmarks.finding.grid import GridPair
from benchmarks.finding.probing import SIGNALS, Probing
from benchmarks.finding.utilities import Bench
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.research.pair_sample import PairSample, rank_correlation
from simmerge_ray.selector.finding.aim import worth
from simmerge_ray.signals.candidates.virtual import VirtualAnswers

KINDS = ("straight", "curved")
Signals = dict[str, dict[str, list[list[float]]]]  # by kind and signal, (N, members)


def virtual_signals(bench: Bench, probing: Probing, one: GridPair) -> Signals:
    """Of all candidates of a pair, coefficients from the product's signatures."""
    _, sources = sources_of(bench, one.pair)
    rows = sources.scorer.of_plans(one.plans).coefficients
    average = MergePlan(recipe=plain_average(one.pair))
    found: Signals = {kind: {name: [] for name in SIGNALS} for kind in KINDS}
    for member in one.pair:
        kept, at_average = probing.kept_of(member, one.pair, average)
        mixtures = {"straight": VirtualAnswers(kept), "curved": VirtualAnswers(kept, one.pair, at_average)}
        for kind, mixture in mixtures.items():
            scores = mixture.scores(rows)
            for name in SIGNALS:
                found[kind][name].append(np.round(getattr(scores, name), 6).tolist())
    return {kind: {name: np.array(values).T.tolist() for name, values in each.items()} for kind, each in found.items()}


def virtual_figures(bench: Bench, grid: Sequence[GridPair]) -> dict[str, Any]:
    """Rank correlation with measured utility, and what a choice by virtual signals alone loses."""
    probing, kept = Probing(bench), bench.kept("virtual")
    of_pair = {one.pair: one for one in grid}

    def scored(pair: tuple[str, str]) -> Signals:
        found: Signals = kept.of("+".join(pair), lambda: virtual_signals(bench, probing, of_pair[pair]))
        return found

    by_pair = bench.each("virtual", list(of_pair), scored)
    grid = [one for one in grid if "+".join(one.pair) in by_pair]
    each = list(by_pair.values())
    sample = PairSample(tuple(one.pair for one in grid))
    figures: dict[str, Any] = {}
    for kind in KINDS:
        by_signal = {name: [np.array(signals[kind][name]) for signals in each] for name in SIGNALS}
        worths = [worth(*both) for both in zip(by_signal["retention"], by_signal["nll"], strict=True)]
        chosen = [float(one.mean[int(of.mean(1).argmax())]) for one, of in zip(grid, worths, strict=True)]
        best = [float(one.mean.max()) for one in grid]
        figures[kind] = {
            "spearman_over_candidates_and_tasks": {
                name: sample.pooled_spearman(
                    [SIGNALS[name] * values.ravel() for values in arrays], [one.by_task.ravel() for one in grid]
                )
                for name, arrays in by_signal.items()
            },
            "spearman_within_a_pair": {
                name: sample.mean(
                    [
                        rank_correlation(SIGNALS[name] * values.mean(1), one.mean)
                        for values, one in zip(arrays, grid, strict=True)
                    ]
                )
                for name, arrays in by_signal.items()
            },
            "utility_of_the_virtual_best": sample.mean(chosen),
            "regret_to_the_best_in_hindsight": sample.mean(list(np.subtract(best, chosen))),
        }
    return figures
