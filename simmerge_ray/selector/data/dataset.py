"""Pair signals joined with labels: what a selector is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from simmerge_ray.base.errors import LabelError, unknown_name
from simmerge_ray.plans.keeping import KEEP_ARMS, keeps
from simmerge_ray.search.headroom import Context
from simmerge_ray.search.labels import LabeledPlan, measures_arm, pair_contexts
from simmerge_ray.selector.data.encoding import statistics_of
from simmerge_ray.signals.features import scaled_features
from simmerge_ray.signals.table import SignalTable


@dataclass(frozen=True)
class SelectionDataset:
    """N contexts (pair, task) with K arms.

    features: (N, 2, F), scaled features of (left, right) and of (right, left).
    utilities: (N, K), mean over the items of the merge by each arm; the last two may be the parents as they are
    (`with_keep`).
    statistics: (N, S), entropy and loss of the base on the task of each context; None without a base.
    weights: whether weight signals are `exact` or `sampled`; a selector is not asked about tables of the other kind.
    """

    contexts: tuple[Context, ...]
    arms: tuple[str, ...]
    columns: tuple[str, ...]
    features: np.ndarray
    utilities: np.ndarray
    weights: str = "exact"
    statistics: np.ndarray | None = None

    @property
    def tasks(self) -> list[str]:
        """(N,): of the contexts."""
        return [context.task for context in self.contexts]

    @property
    def label_error(self) -> float:
        """Standard error of a label, root mean square over arms and contexts: what no prediction can be surer than."""
        every = [items for context in self.contexts for items in context.arms.values() if len(items) > 1]
        return float(np.sqrt(np.mean([items.var(ddof=1) / len(items) for items in every]))) if every else 0.0

    def subset(self, rows: Sequence[int]) -> SelectionDataset:
        """The contexts at the given rows."""
        index = np.asarray(rows, dtype=np.int64)
        statistics = None if self.statistics is None else self.statistics[index]
        contexts, features = tuple(self.contexts[row] for row in rows), self.features[index]
        part = replace(self, contexts=contexts, features=features, utilities=self.utilities[index])
        return replace(part, statistics=statistics)

    def restricted(self, columns: Sequence[str]) -> SelectionDataset:
        """The same contexts with these feature columns only, e.g. those that a propagator delivers. Raises LabelError:
        a column that the dataset does not have, or none."""
        if unknown := [column for column in columns if column not in self.columns]:
            raise LabelError(unknown_name("feature column", unknown[0], self.columns))
        if not columns:
            raise LabelError("no such features are in the signal tables")
        kept = [index for index, column in enumerate(self.columns) if column in set(columns)]
        return replace(self, columns=tuple(self.columns[i] for i in kept), features=self.features[..., kept])


def build_dataset(
    table: SignalTable, labels: Sequence[LabeledPlan], arms: Sequence[str] | None = None
) -> SelectionDataset:
    """Join a signal table with labels. arms: labels of the arms to choose from; None takes every arm that was measured
    on all pairs. Raises LabelError: no context has all arms, labels cannot be compared with each other, or the signals
    were computed from other contents of a checkpoint than the labels."""
    check_same_checkpoints(table, labels)
    chosen = tuple(arms) if arms is not None else common_arms(labels)
    contexts = pair_contexts(labels, chosen)
    if not contexts:
        raise LabelError(f"no pair was measured with all of the arms {', '.join(chosen) or '(none)'} and both parents")
    features = np.array([pair_features(table, c.left, c.right, c.task) for c in contexts])
    utilities = np.array([[context.arms[arm].mean() for arm in chosen] for context in contexts])
    told = table.provenance["weights"], statistics_of(table, [context.task for context in contexts])
    return SelectionDataset(tuple(contexts), chosen, table.columns, features, utilities, *told)


def with_keep(dataset: SelectionDataset) -> SelectionDataset:
    """The same contexts with two more arms, keep(left) and keep(right): every context has their utilities."""
    if keeps(dataset.arms):
        return dataset
    kept = [[one.left_items.mean(), one.right_items.mean()] for one in dataset.contexts]
    utilities = np.hstack([dataset.utilities, np.array(kept).reshape(-1, 2)])
    return replace(dataset, arms=(*dataset.arms, *KEEP_ARMS), utilities=utilities)


def join_datasets(parts: Sequence[SelectionDataset]) -> SelectionDataset:
    """The contexts of several data sets, of other checkpoints each. Raises LabelError: there is none, or they differ in
    arms, feature columns or kind of weight signals."""
    if not parts:
        raise LabelError("there is no data set to join")
    first = parts[0]
    for other in parts[1:]:
        where = f"{first.contexts[0].left} and {other.contexts[0].left}"
        arms = f"{', '.join(first.arms)}; {', '.join(other.arms)}"
        columns = ", ".join(sorted(set(first.columns) ^ set(other.columns))[:4]) or "their order"
        for name, problem in (
            ("arms", f"the data sets of {where} have other arms ({arms}): choose arms that were measured for both"),
            ("columns", f"the signals of {where} have other columns ({columns}): compute both with the same options, "
                        "all with a base or all without"),
            ("weights", f"the weight signals of {where} are {first.weights} and {other.weights}: compute both with the "
                        "same --weights"),
        ):  # fmt: skip
            if getattr(first, name) != getattr(other, name):
                raise LabelError(problem)
    known = [part.statistics for part in parts if part.statistics is not None]
    return replace(
        first,
        contexts=tuple(context for part in parts for context in part.contexts),
        features=np.concatenate([part.features for part in parts]),
        utilities=np.concatenate([part.utilities for part in parts]),
        statistics=np.concatenate(known) if len(known) == len(parts) else None,
    )


def pair_features(
    table: SignalTable, left: str, right: str, task: str, columns: Sequence[str] | None = None
) -> np.ndarray:
    """(2, F) scaled features of both orders of a pair; None takes all columns of the table."""
    row = table.get(left, right, task)
    return np.array([scaled_features(side.features, columns or table.columns) for side in (row, row.swap())])


def parent_utilities(dataset: SelectionDataset) -> dict[str, dict[str, float]]:
    """Measured utility of the checkpoints as they are, by task and id."""
    found: dict[str, dict[str, float]] = {}
    for context in dataset.contexts:
        for name, items in ((context.left, context.left_items), (context.right, context.right_items)):
            found.setdefault(context.task, {})[name] = float(items.mean())
    return found


def common_arms(labels: Sequence[LabeledPlan]) -> tuple[str, ...]:
    """Arms that were measured on every pair of which some arm was, sorted."""
    by_pair: dict[tuple[str, ...], set[str]] = {}
    for label in labels:
        if measures_arm(label) and (arm := label.plan.pair_arm):
            by_pair.setdefault(tuple(sorted(label.plan.members)), set()).add(arm.label)
    return tuple(sorted(set.intersection(*by_pair.values()))) if by_pair else ()


def check_same_checkpoints(table: SignalTable, labels: Sequence[LabeledPlan]) -> None:
    """Refuse signals and labels of different contents under one checkpoint id. Raises LabelError that names it."""
    known = table.provenance["checkpoints"]
    for label in labels:
        for name, digest in label.checkpoints.items():
            if known.get(name, digest) != digest:
                raise LabelError(
                    f"checkpoint {name!r} has changed between the signals and the labels; compute both again"
                )
