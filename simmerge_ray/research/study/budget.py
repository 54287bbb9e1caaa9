"""What n evaluations buy: predictions beside random order and beside few items for everyone, at equal cost.

A replay of labels that exist: per-item utilities say what any cheaper evaluation would have shown. A choice is made on
one half of the items and scored on the other, in both directions, so that the best of many is not inflated by noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.longer import resampled_interval
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import units_of

FEW_ITEMS = (8, 16, 32)
NUM_DRAWS = 50
_STARTUP = 2  # proposals at random before Optuna models anything; its default is more than there are candidates
_MAX_PROPOSALS = 20  # for each candidate, after which those that it does not come to are left


@dataclass(frozen=True)
class CandidateArms:
    """Candidates for one merge. unit: base and members, resampled together. items: per task (K, I) utilities.
    predicted: (K,)."""

    unit: tuple[str, tuple[str, ...]]
    items: tuple[np.ndarray, ...]
    predicted: np.ndarray


@dataclass(frozen=True)
class StudyCosts:
    """Seconds, measured: of a full evaluation of one candidate on all of its tasks, of the signals of a catalogue for
    each of its pairs, and of the labels that the selector was trained on."""

    evaluation: float
    signals: float
    labels: float


def candidate_arms(dataset: SelectionDataset, predicted: np.ndarray, base_of: dict[str, str]) -> list[CandidateArms]:
    """Every pair with its arms. predicted: (N, K), averaged over the tasks of a pair; NaN rows are left out."""
    merges = []
    for rows in units_of(dataset.contexts, per_merge=True):
        if np.isnan(predicted[rows]).any():
            continue
        contexts = [dataset.contexts[row] for row in rows]
        items = tuple(np.array([context.arms[arm] for arm in dataset.arms]) for context in contexts)
        members = (contexts[0].left, contexts[0].right)
        merges.append(CandidateArms((base_of.get(members[0], ""), members), items, predicted[rows].mean(0)))
    return merges


def curves(merges: Sequence[CandidateArms], num_evaluations: Sequence[int]) -> list[dict[str, Any]]:
    """Mean utility of what is chosen, by strategy and cost.

    Returns:
        rows: strategy (`predicted`, `random`, `Optuna`, `few items`), evaluations (in full ones; none where there is
        nothing to compare; few items for everyone cost their share), items (of each task, for `few items`), utility,
        interval (95 %), regret against the best candidate on the scored half (which is itself inflated by noise: the
        same for all strategies).

    Raises:
        LabelError: no merges.
    """
    if not merges:
        raise LabelError("there is no merge with predictions and labels of all candidates")
    generator, rows = np.random.default_rng(0), []

    def add(strategy: str, evaluations: float, items: int | None, values: Sequence[tuple[float, float]]) -> None:
        utility, regret = np.array(values).T
        row = {"strategy": strategy, "evaluations": evaluations, "items": items, "utility": float(utility.mean())}
        interval = resampled_interval(utility, [merge.unit for merge in merges])
        rows.append(row | {"interval": interval, "regret": float(regret.mean())})

    full = [float(count) if count > 1 else 0.0 for count in num_evaluations]
    for count, evaluations in zip(num_evaluations, full, strict=True):
        for strategy in ("predicted", "random"):
            add(strategy, evaluations, None, [_mean_of(merge, strategy, count, generator) for merge in merges])
    by_optuna = [_optuna(merge, num_evaluations, number) for number, merge in enumerate(merges)]
    for evaluations, values in zip(full, zip(*by_optuna, strict=True), strict=True):
        add("Optuna", evaluations, None, values)
    for items in FEW_ITEMS:
        share = np.mean([len(merge.predicted) * items / (merge.items[0].shape[1] // 2) for merge in merges])
        add("few items", float(share), items, [_few_items(merge, items, generator) for merge in merges])
    return rows


def break_even(rows: Sequence[dict[str, Any]], costs: StudyCosts) -> dict[str, Any]:
    """How many merges it takes until the predicted choice without any evaluation has paid for its labels.

    Random search needs `random_evaluations` full ones to be as good as the first prediction; the signals of a merge are
    charged against that. None where no count that was tried is as good, or where nothing is saved.
    """
    first = next(row["utility"] for row in rows if row["strategy"] == "predicted" and row["evaluations"] == 0)
    as_good = [row["evaluations"] for row in rows if row["strategy"] == "random" and row["utility"] >= first]
    needed = min(as_good) if as_good else None
    saved = None if needed is None else needed * costs.evaluation - costs.signals
    merges = None if saved is None or saved <= 0 else int(np.ceil(costs.labels / saved))
    return {"random_evaluations": needed, "saved_seconds": saved, "merges": merges, "label_seconds": costs.labels}


def _halves(merge: CandidateArms) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """(choosing items by task, (K,) scored utility), in both directions."""
    halves = [items.shape[1] // 2 for items in merge.items]
    first = [items[:, :half] for items, half in zip(merge.items, halves, strict=True)]
    second = [items[:, half : 2 * half] for items, half in zip(merge.items, halves, strict=True)]
    directions = ((first, second), (second, first))
    return [(choosing, np.mean([items.mean(1) for items in scored], axis=0)) for choosing, scored in directions]


def _mean_of(merge: CandidateArms, strategy: str, count: int, generator: np.random.Generator) -> tuple[float, float]:
    """Utility and regret of the best of `count` candidates; those that are predicted best, or any."""
    results, orders = [], [np.argsort(-merge.predicted, kind="stable")]
    for choosing, scored in _halves(merge):
        measured = np.mean([items.mean(1) for items in choosing], axis=0)
        if strategy == "random":
            orders = [generator.permutation(len(merge.predicted)) for _ in range(NUM_DRAWS)]
        for taken in (order[:count] for order in orders):
            results.append((scored[taken[measured[taken].argmax()]], scored.max()))
    return _utility_and_regret(results)


def _optuna(merge: CandidateArms, counts: Sequence[int], seed: int) -> list[tuple[float, float]]:
    """For each count, the best of that many different candidates that Optuna's TPE proposed one after the other, as the
    values of one categorical parameter; a proposal that was made before costs nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    size, results = len(merge.predicted), []
    for place, (choosing, scored) in enumerate(_halves(merge)):
        measured = np.mean([items.mean(1) for items in choosing], axis=0)
        sampler = optuna.samplers.TPESampler(seed=2 * seed + place, n_startup_trials=_STARTUP)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        order: list[int] = []
        for _ in range(_MAX_PROPOSALS * size):
            trial = study.ask({"candidate": optuna.distributions.CategoricalDistribution(range(size))})
            candidate = trial.params["candidate"]
            study.tell(trial, float(measured[candidate]))
            if candidate not in order:
                order.append(candidate)
            if len(order) >= min(max(counts), size):
                break
        taken = [np.array(order[:count]) for count in counts]
        results.append([(scored[some[measured[some].argmax()]], scored.max()) for some in taken])
    return [_utility_and_regret(of_count) for of_count in zip(*results, strict=True)]


def _few_items(merge: CandidateArms, count: int, generator: np.random.Generator) -> tuple[float, float]:
    results = []
    for choosing, scored in _halves(merge):
        for _ in range(NUM_DRAWS):
            drawn = [items[:, generator.permutation(items.shape[1])[:count]] for items in choosing]
            measured = np.mean([items.mean(1) for items in drawn], axis=0)
            best = np.flatnonzero(measured >= measured.max() - 1e-12)
            results.append((scored[generator.choice(best)], scored.max()))
    return _utility_and_regret(results)


def _utility_and_regret(results: Sequence[tuple[float, float]]) -> tuple[float, float]:
    utility, best = np.mean(results, axis=0)
    return float(utility), float(best - utility)
