"""Predictions for the longer plans of each base by selectors that were trained on pairs of the other bases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study import longer
from simmerge_ray.research.study.layout import LoadedPart
from simmerge_ray.research.study.longer import Group, MeasuredFold, Utilities, compare, unmerged_utilities
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import Scoring
from simmerge_ray.selector.models.model import FittedModel
from simmerge_ray.selector.models.train import fit_models
from simmerge_ray.selector.planning.scorer import PlanScorer
from simmerge_ray.selector.planning.search import AGGREGATES
from simmerge_ray.selector.planning.tasks import task_pool
from simmerge_ray.signals.propagation.interface import Propagator

Picks = dict[Group, dict[str, list[MeasuredFold]]]  # what each policy takes, by group
Agreement = dict[int, list[tuple[float, tuple[str, tuple[str, ...]]]]]  # Kendall's tau and unit of groups, by size


@dataclass(frozen=True)
class UnseenBaseModel:
    """What the plan scorer needs of a selector, without its calibration."""

    arms: tuple[str, ...]
    columns: tuple[str, ...]
    best_fixed: str
    fitted: FittedModel
    label_error: float = 0.0  # its intervals are not shown

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.fitted.predict(features)


def models_without_base(
    dataset: SelectionDataset, base_of: Mapping[str, str], bases: Sequence[str], config: TrainConfig
) -> dict[str, UnseenBaseModel]:
    """For each base a model of all pairs of other bases (LabelError if there are none); a base without pairs in the
    dataset is simply not excluded."""
    rows = [[row for row, c in enumerate(dataset.contexts) if base_of[c.left] != base] for base in bases]
    for base, others in zip(bases, rows, strict=True):
        if not others:
            raise LabelError(f"all labels are of one base, {base}; a model that has not seen it needs a second one")
    scoring = Scoring.of(dataset.contexts, dataset.arms)
    found = {}
    for base, training, fitted in zip(bases, rows, fit_models(dataset, rows, config), strict=True):
        best_fixed = dataset.arms[scoring.among(training).best_fixed()]
        found[base] = UnseenBaseModel(dataset.arms, dataset.columns, best_fixed, fitted)
    return found


def scores_of(
    part: LoadedPart, plans: Sequence[MeasuredFold], propagator: Propagator, model: UnseenBaseModel
) -> dict[str, dict[str, float]]:
    """Score by aggregate and plan id, on the tasks of each plan's members."""
    pool = task_pool("mean", (), part.table.tasks, part.table.checkpoint_ids, part.catalogue.own_task)
    ranked = PlanScorer(part.table, propagator, model).score_by_aggregate([fold.plan for fold in plans], pool)
    return {
        aggregate: {fold.plan.id: row.score for fold, row in zip(plans, rows, strict=True)}
        for aggregate, rows in ranked.items()
    }


def longer_plans(
    parts: Sequence[LoadedPart],
    dataset: SelectionDataset,
    base_of: Mapping[str, str],
    config: TrainConfig,
    propagators: Mapping[str, Callable[[LoadedPart], Propagator]],
) -> dict[str, Any]:
    """The comparison of `longer.compare` for every propagator, size and weighting, and the agreement of ranks.

    Args:
        propagators: how each is made for a part.

    Returns:
        `tables`: rows by "propagator, size, weighting" (aggregate `last`; size `all` pools them); `aggregates`: pooled
        utility of the predicted plan by propagator and aggregate; `tau`: by propagator and size, mean over groups with
        interval.

    Raises:
        LabelError: no plan of three or more has a pooled utility.
    """
    bases = [part.catalogue.base.id for part in parts if part.catalogue.base is not None]
    own_task = {name: task for part in parts for name, task in part.catalogue.own_task.items()}
    utilities = {base: unmerged_utilities(part.labels) for base, part in zip(bases, parts, strict=True)}
    found: dict[str, Any] = {"tables": {}, "aggregates": {}, "tau": {}}
    for name, make in propagators.items():
        first = make(parts[0])
        columns = [column for column in dataset.columns if column in set(first.columns)]
        models = models_without_base(dataset.restricted(columns), base_of, bases, config)
        picks: dict[str, Picks] = {aggregate: {} for aggregate in AGGREGATES}
        agreement: Agreement = {}
        made = chain([first], map(make, parts[1:]))  # one at a time: each holds the evidence of a base
        for base, part, propagator in zip(bases, parts, made, strict=True):
            _pick(part, propagator, models[base], utilities[base], picks, agreement)
        rows = {aggregate: compare(chosen, utilities, own_task) for aggregate, chosen in picks.items()}
        if not any(rows.values()):
            raise LabelError("no plan of three or more was measured where pooled utility is defined")
        for label, keys in _selections(picks["last"]).items():
            chosen = {key: picks["last"][key] for key in keys}
            found["tables"][f"{name}, {label}"] = compare(chosen, utilities, own_task)
        found["aggregates"][name] = {aggregate: of_policy[0]["pooled"] for aggregate, of_policy in rows.items()}
        found["tau"][name] = {}
        for size, values in sorted(agreement.items()):
            taus, units = np.array([tau for tau, _ in values]), [unit for _, unit in values]
            row = {"tau": float(taus.mean()), "interval": longer.resampled_interval(taus, units)}
            found["tau"][name][str(size)] = row | {"num_groups": len(values)}
    return found


def _pick(
    part: LoadedPart,
    propagator: Propagator,
    model: UnseenBaseModel,
    utilities: Utilities,
    picks: dict[str, Picks],
    agreement: Agreement,
) -> None:
    """Add what every policy takes of the groups of one base, by aggregate, and Kendall's tau of each, by size."""
    folds = longer.candidates(part.labels, part.catalogue)
    groups = _grouped(folds)
    for aggregate, scores in scores_of(part, folds, propagator, model).items():
        for key, group in groups.items():
            equal = [fold for fold in folds if fold.group == (*key[:2], "equal")]
            linear = [fold for fold in equal if fold.arm == "linear"]
            picks[aggregate][key] = longer.choices(group, scores, model.best_fixed, utilities, part.catalogue, linear)
            tau = longer.rank_agreement(group, scores) if aggregate == "last" else None
            if tau is not None:
                agreement.setdefault(len(key[1]), []).append((tau, key[:2]))


def _grouped(found: Sequence[MeasuredFold]) -> dict[Group, list[MeasuredFold]]:
    groups: dict[Group, list[MeasuredFold]] = {}
    for fold in sorted(found, key=lambda fold: fold.group):
        groups.setdefault(fold.group, []).append(fold)
    # A catalogue of which every subset is labelled has a few plans of each; a choice needs more.
    return {key: group for key, group in groups.items() if len({fold.arm for fold in group}) > 1 and len(group) > 4}


def _selections(picks: Mapping[Group, Any]) -> dict[str, list[Group]]:
    """Names of the tables and the groups that they are of."""
    found: dict[str, list[Group]] = {}
    for key in picks:
        for size in (f"{len(key[1])}-way", "all"):
            for weighting in (key[2], "both"):
                found.setdefault(f"{size}, {weighting}", []).append(key)
    return found
