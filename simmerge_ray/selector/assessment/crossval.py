"""A selector and its baselines on checkpoints that it was not trained on: the report of `simmerge train`.

One split at a time. The default is *one model unseen* (a group of checkpoints left out, with all its pairs); other
folds of `splits` can be given. If a pair is tested in several folds, its predictions are averaged before the choice.
The threshold of the safe override and the intervals are chosen inside the training part of each fold, whose checkpoints
are left out in turn once more, so nothing is chosen on what it is scored on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import InputError, LabelError
from simmerge_ray.plans.keeping import keeps
from simmerge_ray.search.headroom import headroom
from simmerge_ray.selector.assessment.bench import Bench, NoiseSets
from simmerge_ray.selector.assessment.folds import OBJECTIVES, CrossValidation, safe_results
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import option_scores, shares_of, units_of
from simmerge_ray.selector.data.splits import Fold, pairs_of, resampled_weights

ONE_MODEL_UNSEEN = "one model unseen"
NUM_RESAMPLES = 2000

Progress = Callable[[int, int], None]


def predict_unseen(dataset: SelectionDataset, config: TrainConfig, folds: Sequence[Fold] | None = None) -> np.ndarray:
    """(N, K): leave each checkpoint (or group of them) out in turn, train on the pairs without it, predict the others.

    A pair is tested in the folds of both its checkpoints; the two predictions are averaged. Raises LabelError: a fold
    is too small to train on."""
    return CrossValidation.of(dataset, config, folds).unseen(dataset, config)


def crossval_report(
    dataset: SelectionDataset,
    config: TrainConfig,
    report: Progress | None = None,
    folds: Sequence[Fold] | None = None,
    split: str = ONE_MODEL_UNSEEN,
    base_of: Mapping[str, str] | None = None,
    rivals: bool = True,
) -> dict[str, Any]:
    """Selector, all models and baselines on checkpoints not trained on, as plain JSON.

    Args:
        report: called with (steps done, steps). folds, split: another split of `splits` and its name; None leaves
            checkpoints out. base_of: base of each checkpoint, for the intervals; None resamples checkpoints alone.

    Returns:
        `per_merge` (the headline: one arm per pair for both parents' tasks) and `per_context` (an arm per task):
        GapClosed of selector, best fixed, uniform and split-half oracle, which keeps parents where the selector may.
        `policies`: for both objectives the figures of
        `Bench.measure` of every policy, `lead` of the selector over each of the others, `majority_in_noise_set` and
        `arm_accuracy` of the selector. `missing`: policies without figures, and why. `override`, `intervals`,
        `abstained`: of the safe policy. `predictions`: a row for each tested context. Or `reason` alone, if there are
        too few labels for the folds or GapClosed is nowhere defined.
    """
    result: dict[str, Any] = {"arms": list(dataset.arms), "num_contexts": len(dataset.contexts), "split": split}
    policies: dict[str, Any] = {}
    if folds is None:
        dataset = dataset.subset(np.flatnonzero(~np.isnan(dataset.utilities).any(1)).tolist())
    try:
        room = headroom(dataset.contexts)
        crossval = CrossValidation.of(dataset, config, folds)
    except InputError as error:
        return result | {"reason": str(error)}
    models = crossval.models(dataset, config)
    by_fold = crossval.predictions(models)
    predicted, (safe, safe_figures) = crossval.averaged(by_fold), safe_results(crossval, models, by_fold)
    scores, missing = _all_scores(crossval, predicted, report or (lambda done, steps: None), rivals)
    uniform, arms = crossval.scoring.fixed()[:-2].mean(), dataset.arms
    for name in OBJECTIVES:
        bench = bench_of(crossval, name == "per_merge", base_of)
        measured = _measured(bench, crossval, scores | {"selector, safe": option_scores(safe[name], arms)})
        policies[name], figures, rooms = measured, measured["policies"], getattr(room, name)
        result[name] = {
            "selector": figures["selector"]["gap_closed"],
            "best_fixed": figures["best fixed"]["gap_closed"],
            "gain": figures["selector"]["gain"],
            "gain_interval": figures["selector"]["gain_interval"],
            "uniform": float(uniform),
            "oracle": (rooms.keep if keeps(arms) else rooms).split_half_oracle,
        }
    return result | {
        "predictions": _predictions(dataset, predicted, crossval.best_fixed()),
        "num_defined": room.num_defined,
        "min_items": room.min_items,
        "model": config.model,
        "folds": [fold.name for fold in crossval.folds],
        "policies": policies,
        "missing": missing,
        **safe_figures,
    }


def _predictions(dataset: SelectionDataset, predicted: np.ndarray, best_fixed: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each context that some fold tested."""
    return [
        {
            "left": context.left,
            "right": context.right,
            "task": context.task,
            "predicted": predicted[row].tolist(),
            "measured": dataset.utilities[row].tolist(),
            "best_fixed": best_fixed[row],
        }
        for row, context in enumerate(dataset.contexts)
        if not np.isnan(predicted[row]).any()
    ]


def _all_scores(
    crossval: CrossValidation, predicted: np.ndarray, report: Progress, rivals: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Scores (N, A) of the selector and its rivals, and the reasons for missing ones."""
    scores, missing = {"selector": option_scores(predicted, crossval.dataset.arms)}, {}
    every = crossval.rivals()
    asked = every if rivals else {"best fixed": every["best fixed"]}
    for done, (name, make) in enumerate(asked.items(), 1):
        try:
            scores[name] = make()
        except LabelError as error:
            missing[name] = str(error)
        report(done, len(asked))
    return scores, missing


def bench_of(crossval: CrossValidation, per_merge: bool, base_of: Mapping[str, str] | None) -> Bench:
    """What the choices of one objective are measured on. base_of: see `crossval_report`."""
    contexts, scoring = crossval.dataset.contexts, crossval.scoring
    units, pairs = units_of(contexts, per_merge), pairs_of(contexts)
    samples = resampled_weights([pairs[row] for row in scoring.rows], base_of, NUM_RESAMPLES, crossval.config.seed)
    return Bench(scoring, units, NoiseSets.of(contexts, crossval.dataset.arms, units), samples)


def _measured(bench: Bench, crossval: CrossValidation, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    shares = {name: shares_of(values, bench.units) for name, values in scores.items()}
    leads = {name: bench.measure(shares["selector"], values) for name, values in shares.items() if name != "selector"}
    return {
        "policies": {name: bench.measure(values, shares["best fixed"]) for name, values in shares.items()},
        "lead": {name: {key: one[key] for key in ("gain", "gain_interval")} for name, one in leads.items()},
        "majority_in_noise_set": bench.noise.majority_share,
        "arm_accuracy": bench.arm_accuracy(shares["selector"], crossval.dataset.arms),
    }
