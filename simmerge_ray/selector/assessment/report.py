"""What a selector can do and what it rests on: all splits, ablations, feature importance, calibration, as plain JSON.

Only the headline split is run with the whole ensembles of the config. The other splits, the ablations and the
importance compare many models with each other, all of the same smaller size (`small_config`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import InputError, LabelError
from simmerge_ray.plans.keeping import merge_arms
from simmerge_ray.search.headroom import headroom
from simmerge_ray.selector.assessment.baselines import best_fixed, permuted_columns
from simmerge_ray.selector.assessment.bench import Bench
from simmerge_ray.selector.assessment.crossval import ONE_MODEL_UNSEEN, Progress, bench_of, crossval_report
from simmerge_ray.selector.assessment.folds import CrossValidation, small_config
from simmerge_ray.selector.data import splits
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.encoding import KINDS
from simmerge_ray.selector.data.scoring import option_scores, shares_of, units_of
from simmerge_ray.selector.data.splits import Fold, pairs_of
from simmerge_ray.selector.models.model import FittedModel
from simmerge_ray.selector.models.predictors import PREDICTORS
from simmerge_ray.signals.features import column_signal

RANDOM_PAIR, UNSEEN_BASE, UNSEEN_DOMAIN = "random pair", "unseen model and base", "unseen domain"
ALL_SIGNALS = "all signals"
NUM_PERMUTATIONS = 5
SHOWN_SIGNALS = (
    "kl_lr_mean", "activation_cosine_mean", "attention_cosine_mean", "weight_cosine_global", "weight_l2_global",
    "task_vector_cosine_global",
)  # fmt: skip
_NUM_BINS = 10
_NUM_INNER_FOLDS = 6


def assess(
    dataset: SelectionDataset,
    config: TrainConfig,
    base_of: Mapping[str, str] | None = None,
    report: Progress | None = None,
    column_sets: Mapping[str, Sequence[str]] | None = None,
    brief: bool = False,
) -> dict[str, Any]:
    """The content of a training's report.

    Args:
        base_of: base of each checkpoint; None takes all for one base's. column_sets: columns that are delivered by a
            propagator, by name, for the ablation. brief: without importance, other models in the ablations, and rivals
            of the selector on other splits than the headline's.

    Returns:
        `splits`: `crossval_report` by split, predictions of the headline split alone; a `reason` instead where a split
        is not possible. `headline`: name of that split. `ablations`, `importance`, `calibration`: on it, or a `reason`.
        `headroom`. `signals`: the scaled means of some signals by context, beside `utilities` (N, K).
    """
    known = base_of or {}
    names = sorted({name for pair in pairs_of(dataset.contexts) for name in pair})
    bases = Counter(known.get(name, "") for name in names)
    headline = UNSEEN_BASE if len(bases) > 1 else ONE_MODEL_UNSEEN
    folds_of = _splits(dataset, config, known if len(bases) > 1 else None)
    variants = _variants(dataset.columns, column_sets or {})
    if brief:
        variants = [variant for variant in variants if variant.group != "model"]
    small, steps, num_steps = small_config(config), count(1), len(folds_of) + len(variants) + 1

    def step_done() -> None:
        if report:
            report(next(steps), num_steps)

    result: dict[str, Any] = {
        "num_contexts": len(dataset.contexts),
        "num_pairs": len(units_of(dataset.contexts, per_merge=True)),
        "num_checkpoints": len(names),
        "bases": dict(sorted(bases.items())),
        "tasks": sorted(set(dataset.tasks)),
        "arms": list(dataset.arms),
        **config.model_dump(include={"model", "task_encoding"}),
        "headline": headline,
        "small": small.model_dump(include={"num_members", "num_trees"}),
        "headroom": _headroom(dataset),
        "splits": {},
    }
    for name, folds in folds_of.items():
        result["splits"][name] = _split_report(dataset, config, base_of, name, folds, name == headline, brief)
        step_done()
    shown = [i for i, column in enumerate(dataset.columns) if column in SHOWN_SIGNALS]
    result["signals"] = {dataset.columns[i]: dataset.features[:, :, i].mean(1).tolist() for i in shown}
    result["utilities"] = dataset.utilities.tolist()
    main, folds = result["splits"][headline], folds_of[headline]
    if isinstance(folds, str) or "reason" in main:
        return result | dict.fromkeys(("ablations", "importance", "calibration"), {"reason": main["reason"]})
    predicted, measured = (np.array([row[key] for row in main["predictions"]]) for key in ("predicted", "measured"))
    result["calibration"] = calibration(predicted, measured, len(merge_arms(dataset.arms)))
    crossval = CrossValidation.of(dataset, small, folds)
    compared = _Headline(crossval, bench_of(crossval, True, base_of))
    if not brief:
        result["importance"] = compared.importance()
    step_done()
    return result | {"ablations": compared.ablations(variants, step_done)}


def _headroom(dataset: SelectionDataset) -> dict[str, Any]:
    try:
        return headroom(dataset.contexts).to_json()
    except InputError as error:
        return {"reason": str(error)}


def _splits(
    dataset: SelectionDataset, config: TrainConfig, base_of: Mapping[str, str] | None
) -> dict[str, list[Fold] | str]:
    """Folds by split, or why there are none; from the easiest to the hardest."""
    pairs = pairs_of(dataset.contexts)
    makers: dict[str, Callable[[], list[Fold]]] = {
        RANDOM_PAIR: lambda: splits.random_pair_folds(pairs, config.num_folds, config.seed),
        ONE_MODEL_UNSEEN: lambda: splits.checkpoint_folds(pairs, config.num_folds, config.seed),
        UNSEEN_BASE: lambda: splits.base_folds(pairs, base_of or {}),
        UNSEEN_DOMAIN: lambda: splits.domain_folds(dataset.contexts),
    }
    found: dict[str, list[Fold] | str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except LabelError as error:
            found[name] = str(error)
    if base_of is None:
        found[UNSEEN_BASE] = "the labels are of one base; an unseen base needs a second one"
    return found


def _split_report(
    dataset: SelectionDataset,
    config: TrainConfig,
    base_of: Mapping[str, str] | None,
    name: str,
    folds: list[Fold] | str,
    is_headline: bool,
    brief: bool,
) -> dict[str, Any]:
    if isinstance(folds, str):
        return {"reason": folds}
    used = config
    if not is_headline:
        # Folds inside folds for the safe policy are most of the work.
        used = small_config(config).model_copy(update={"num_folds": min(_NUM_INNER_FOLDS, config.num_folds)})
    if name == UNSEEN_DOMAIN:
        used = used.model_copy(update={"task_encoding": "none"})
    found = crossval_report(dataset, used, None, folds, name, base_of, rivals=is_headline or not brief)
    if not is_headline:
        found.pop("predictions", None)
    return found


@dataclass(frozen=True)
class Variant:
    """A row of the ablations: the same folds with these columns, or with another config."""

    group: str
    name: str
    columns: Sequence[str]
    update: Mapping[str, Any] | None = None


def _variants(columns: Sequence[str], column_sets: Mapping[str, Sequence[str]]) -> list[Variant]:
    of_weights = {column for column in columns if column_signal(column).of_weights}

    def among(kept: Collection[str]) -> list[str]:
        return [column for column in columns if column in kept]

    return [
        Variant("signals", "no probes", among(of_weights)),
        Variant("signals", "no weights", among(set(columns) - of_weights)),
        *(Variant("columns of propagator", name, among(delivered)) for name, delivered in column_sets.items()),
        *(Variant("task encoding", kind, columns, {"task_encoding": kind}) for kind in KINDS),
        *(Variant("model", kind, columns, {"model": kind}) for kind in PREDICTORS),
    ]


@dataclass(frozen=True)
class _Headline:
    """The headline split with small models, which ablations and permutations are compared with."""

    crossval: CrossValidation
    bench: Bench

    @cached_property
    def models(self) -> list[FittedModel]:
        return self.crossval.models(self.crossval.dataset, self.crossval.config)

    @cached_property
    def fixed(self) -> np.ndarray:
        """Shares of the best fixed arm of each fold."""
        return shares_of(self.crossval.baseline(best_fixed), self.bench.units)

    @cached_property
    def full(self) -> np.ndarray:
        """Shares of the models on all signals."""
        return self.shares(self.crossval.averaged(self.crossval.predictions(self.models)))

    def shares(self, predicted: np.ndarray) -> np.ndarray:
        return shares_of(option_scores(predicted, self.crossval.dataset.arms), self.bench.units)

    def compared(self, shares: np.ndarray) -> dict[str, Any]:
        """Gain over the best fixed arm, and change against all signals."""
        found: dict[str, Any] = {}
        for name, reference in (("gain", self.fixed), ("change", self.full)):
            one = self.bench.measure(shares, reference)
            found |= {name: one["gain"], f"{name}_interval": one["gain_interval"]}
        return found

    def ablations(self, variants: Sequence[Variant], done: Callable[[], None]) -> dict[str, Any]:
        dataset, config = self.crossval.dataset, self.crossval.config
        whole = {"group": "signals", "name": ALL_SIGNALS, "num_columns": len(dataset.columns)}
        rows = [whole | self.compared(self.full)]
        missing = {}
        for variant in variants:
            try:
                part, changed = dataset.restricted(variant.columns), config.model_copy(update=variant.update)
                row = self.compared(self.shares(self.crossval.unseen(part, changed)))
            except InputError as error:
                missing[f"{variant.group}: {variant.name}"] = str(error)
            else:
                rows.append({"group": variant.group, "name": variant.name, "num_columns": len(part.columns)} | row)
            done()
        return {"rows": rows, "missing": missing}

    def importance(self) -> dict[str, Any]:
        """Change of the headline gain when the columns of a family come from another pair, in the tested rows alone."""
        columns = self.crossval.dataset.columns
        of_family: dict[str, list[int]] = {}
        for index, column in enumerate(columns):
            of_family.setdefault(column_signal(column).family, []).append(index)
        rows = []
        for family, kept in of_family.items():
            changes = [self.change_without(kept, seed) for seed in range(NUM_PERMUTATIONS)]
            figures = {"change": float(np.mean(changes)), "low": min(changes), "high": max(changes)}
            rows.append({"family": family, "num_columns": len(kept)} | figures)
        gain = self.compared(self.full)["gain"]
        return {"gain": gain, "num_permutations": NUM_PERMUTATIONS, "rows": rows}

    def change_without(self, columns: Sequence[int], seed: int) -> float:
        dataset = self.crossval.dataset
        predicted = []
        for number, (fold, model) in enumerate(zip(self.crossval.folds, self.models, strict=True)):
            generator = np.random.default_rng([self.crossval.config.seed, seed, number])
            part = permuted_columns(dataset.subset(fold.tested), range(len(fold.tested)), columns, generator)
            predicted.append(model.utilities(part))
        shares, scoring = self.shares(self.crossval.averaged(predicted)), self.crossval.scoring
        taken, full = scoring.taken(shares), scoring.taken(self.full)
        tested = ~np.isnan(full)
        return float(scoring.among(scoring.rows[tested].tolist()).headline((taken - full)[tested]))


def calibration(predicted: np.ndarray, measured: np.ndarray, num_merges: int) -> dict[str, list[dict[str, float]]]:
    """Deciles of the predictions and the mean measured for each; (N, K) both, the merge operators first.

    `utility`: of an arm on a context. `advantage`: over the mean of the operators on the context, which is what a
    choice rests on.
    """
    advantages = (values - values[:, :num_merges].mean(1, keepdims=True) for values in (predicted, measured))
    return {"utility": _bins(predicted, measured), "advantage": _bins(*advantages)}


def _bins(said: np.ndarray, true: np.ndarray) -> list[dict[str, float]]:
    said, true = said.ravel(), true.ravel()
    parts = np.array_split(np.argsort(said, kind="stable"), min(_NUM_BINS, len(said)))
    return [
        {"predicted": float(said[part].mean()), "measured": float(true[part].mean()), "count": len(part)}
        for part in parts
    ]
