"""The analysis of `docs/study-plan.md`, from a study's directory to one JSON value. It trains selectors and no zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.budget import StudyCosts, break_even, candidate_arms, curves
from simmerge_ray.research.study.layout import LoadedPart
from simmerge_ray.research.study.longer import unmerged_utilities
from simmerge_ray.research.study.merges import CONTROL_ARM, LATER_ARM, REFERENCE_ARMS
from simmerge_ray.research.study.subset_choice import compare_subsets, labelled_choices, relative_prediction
from simmerge_ray.research.study.unseen_base import models_without_base
from simmerge_ray.selector.assessment.crossval import predict_unseen
from simmerge_ray.selector.data.dataset import SelectionDataset, build_dataset, join_datasets
from simmerge_ray.selector.data.splits import base_folds, pairs_of
from simmerge_ray.selector.planning.scorer import PlanScorer
from simmerge_ray.selector.planning.tasks import task_pool
from simmerge_ray.signals.propagation.bound import Bound
from simmerge_ray.signals.propagation.evidence import stored_evidence
from simmerge_ray.signals.propagation.interface import Propagator
from simmerge_ray.signals.propagation.second_order import SecondOrder
from simmerge_ray.signals.propagation.table import PROPAGATORS
from simmerge_ray.signals.signature import SignatureStore

PropagatorMaker = Callable[[LoadedPart], Propagator]
ARMS = tuple(arm.label for arm in REFERENCE_ARMS)
ALL_ARMS = (*ARMS, LATER_ARM.label, CONTROL_ARM.label)  # of the selector that comes with the package


def joined(parts: Sequence[LoadedPart], arms: Sequence[str]) -> SelectionDataset:
    """The pairs of all parts as one dataset; LabelError if there are no parts, or they do not fit each other."""
    if not parts:
        raise LabelError("the study has no labels yet; `jobs/study.py` makes them")
    return join_datasets([build_dataset(part.table, part.labels, arms) for part in parts])


def bases_of(parts: Sequence[LoadedPart]) -> dict[str, str]:
    """The base of every checkpoint."""
    return {name: part.catalogue.base.id for part in parts if part.catalogue.base for name in part.catalogue.ids}


def propagators() -> dict[str, PropagatorMaker]:
    """Those that need no probes."""
    return {
        "bound": lambda part: Bound(part.table),
        "second_order": lambda part: SecondOrder(part.table),
        "virtual": lambda part: PROPAGATORS["virtual"](
            stored_evidence(part.table, part.catalogue, SignatureStore(part.signatures))
        ),
    }


def subset_choice(part: LoadedPart, members: Sequence[str], others: SelectionDataset, config: TrainConfig) -> Any:
    """Regret of the choice of a subset among `members`, by a model of the other bases' pairs."""
    propagator = propagators()["virtual"](part)
    columns = [column for column in others.columns if column in set(propagator.columns)]
    elsewhere = dict.fromkeys((c for context in others.contexts for c in (context.left, context.right)), "elsewhere")
    model = models_without_base(others.restricted(columns), elsewhere, [part.name], config)[part.name]
    choices = labelled_choices(part.labels, part.catalogue, members, model.arms)
    pool = task_pool("mean", (), part.table.tasks, part.table.checkpoint_ids, part.catalogue.own_task)
    utilities = unmerged_utilities(part.labels)
    ranked = PlanScorer(part.table, propagator, model).score([choice.plan for choice in choices], pool)
    predicted = {
        choice.plan.id: relative_prediction(row.by_task, utilities, part.catalogue)
        for choice, row in zip(choices, ranked, strict=True)
    }
    return compare_subsets(choices, predicted, model.best_fixed, part.table, utilities, part.catalogue)


def bought(
    parts: Sequence[LoadedPart], dataset: SelectionDataset, base_of: Mapping[str, str], config: TrainConfig
) -> dict[str, Any]:
    """What evaluations buy on pairs, and the number of merges after which labels have paid."""
    folds = base_folds(pairs_of(dataset.contexts), base_of)
    predicted = predict_unseen(dataset, config, folds=folds)
    rows = curves(candidate_arms(dataset, predicted, dict(base_of)), range(1, len(dataset.arms) + 1))
    merged = [label for part in parts for label in part.labels if len(label.plan.steps) == 1]
    # Labels that train a selector: all of them. Signals serve every pair of a catalogue, each is charged its part.
    seconds = sum(label.seconds for label in merged)
    pairs = {tuple(sorted(label.plan.members)) for label in merged}
    signals = sum(part.signal_seconds for part in parts) / len(pairs)
    costs = StudyCosts(seconds / len({label.plan.id for label in merged}), signals, seconds)
    return {"rows": rows, "costs": vars(costs), "break_even": break_even(rows, costs)}
