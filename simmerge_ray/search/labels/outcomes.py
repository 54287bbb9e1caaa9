"""What a label says: an outcome, its settings, and the key of all that a utility depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from simmerge_ray.base.errors import LabelError
from simmerge_ray.base.storage import digest_json
from simmerge_ray.plans.plan import MergePlan

# Stays 1 although files have schema 2: a measured label is the same one.
_KEY_SCHEMA = 1


@dataclass(frozen=True)
class Evaluated:
    """Per-item utilities, (num_items,) in [0, 1]."""

    items: np.ndarray

    @property
    def utility(self) -> float:
        return float(self.items.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, from the items' variance."""
        return float(self.items.std(ddof=1) / np.sqrt(len(self.items))) if len(self.items) > 1 else 0.0


@dataclass(frozen=True)
class Measured(Evaluated):
    """Per-item utilities of an evaluated merge, (num_items,) in [0, 1]."""


@dataclass(frozen=True)
class Stopped(Evaluated):
    """Per-item utilities, (num_evaluated,), of a merge that a search gave up after a part of the items.

    Not a `Measured`: nothing learns from it, and its utility is not compared with that of all items.
    """


@dataclass(frozen=True)
class Infeasible:
    """Why a merge has no utility."""

    reason: str


Outcome = Measured | Stopped | Infeasible


@dataclass(frozen=True)
class EvaluationSettings:
    """What a utility depends on besides weights and items."""

    evaluator: str
    dtype: str
    max_model_len: int


@dataclass(frozen=True)
class LabeledPlan:
    """One (plan, task) with its outcome and all it was made from.

    checkpoints: content digest of every checkpoint that was read, by id. seconds: merge and evaluation. same_as: label
    of the plan that was evaluated in its place, because both are one merge.
    """

    plan: MergePlan
    task: str
    task_digest: str
    outcome: Outcome
    settings: EvaluationSettings
    checkpoints: Mapping[str, str]
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    same_as: str | None = None

    @property
    def key(self) -> str:
        return label_key(self.plan, self.task_digest, self.settings, self.checkpoints)


def label_key(plan: MergePlan, task_digest: str, settings: EvaluationSettings, checkpoints: Mapping[str, str]) -> str:
    """Digest of all that a utility depends on."""
    return digest_json([_KEY_SCHEMA, plan.id, task_digest, vars(settings), dict(checkpoints)])


def used_digests(plan: MergePlan, digests: Mapping[str, str], base_id: str | None) -> dict[str, str]:
    """Content digests of the checkpoints that a plan reads, the base only where an operator takes it."""
    used = [*plan.members, *([base_id] if base_id and plan.uses_base else [])]
    return {checkpoint_id: digests[checkpoint_id] for checkpoint_id in sorted(set(used))}


def check_comparable(labels: Sequence[LabeledPlan]) -> None:
    """Refuse to mix labels of different items, evaluators or checkpoint contents under one name.

    Raises:
        LabelError: naming what differs.
    """
    items: dict[str, str] = {}
    contents: dict[str, str] = {}
    settings: EvaluationSettings | None = None
    for label in labels:
        if items.setdefault(label.task, label.task_digest) != label.task_digest:
            raise LabelError(
                f"labels of task {label.task!r} were made with different items; keep them in separate stores"
            )
        if settings is not None and settings != label.settings:
            raise LabelError(f"labels were made with different settings: {settings} and {label.settings}")
        settings = label.settings
        for checkpoint_id, digest in label.checkpoints.items():
            if contents.setdefault(checkpoint_id, digest) != digest:
                raise LabelError(f"labels were made with different contents of checkpoint {checkpoint_id!r}")
