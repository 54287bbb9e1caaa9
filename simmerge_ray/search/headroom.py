"""How much is there to gain by choosing the merge operator? Measured before any selector is trained.

A *context* is one pair of checkpoints on one task, with the utility of every item under both parents and under the
merge of every arm. Everything is computed from two halves of the items, the even and the odd ones. In the direction
(choose, score), the *choosing* half decides which parent is the expert and which arm is taken, and the *scoring* half
gives every utility, so no choice is rewarded for the noise that it was made on.

    GapClosed = (u(merge) - u(auxiliary)) / (u(expert) - u(auxiliary))

A direction is defined where the parents' gap on the choosing half is at least `MIN_GAP` and at least two paired
standard errors; else it is missing, never 0. The two directions of a context are combined by averaging numerators and
denominators over the defined ones, so that a context counts once. It is missing when both directions are, or when the
averaged denominator is not positive: then the halves do not agree which parent is the expert. A set of contexts is
summarised by the ratio of sums per task, then the mean over tasks; the mean of the contexts' ratios stands beside it.

Two objectives are reported. `per_context` may take another arm for each task of a pair. `per_merge`, the headline,
takes one arm per pair: the best on the choosing half by GapClosed averaged over the pair's defined tasks.

Keeping a parent is a choice as well, and has figures of its own (`KeepHeadroom`): it is no fixed arm, since which of
the two is called left says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from simmerge_ray.base.errors import InputError
from simmerge_ray.plans.keeping import KEEP_ARMS

MIN_GAP = 0.10
NUM_STANDARD_ERRORS = 2.0
_HALVES = (slice(0, None, 2), slice(1, None, 2))


@dataclass(frozen=True)
class Context:
    """One pair on one task; every array holds one utility per item, in the same order of items."""

    left: str
    right: str
    task: str
    arms: Mapping[str, np.ndarray]
    left_items: np.ndarray
    right_items: np.ndarray

    def with_parents(self) -> Context:
        """Both parents as further arms."""
        kept = dict(zip(KEEP_ARMS, (self.left_items, self.right_items), strict=True))
        return replace(self, arms={**self.arms, **kept})


@dataclass(frozen=True)
class TaskHeadroom:
    """One task's share of an `ObjectiveHeadroom`; every figure is a ratio of sums over the task's defined contexts.
    intervals: of the arms and, as "", of the oracle, by checkpoints drawn anew; None where no resample holds a pair."""

    num_contexts: int
    arm_gap_closed: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float] | None]
    best_fixed_arm: str
    split_half_oracle: float
    maximum: float


@dataclass(frozen=True)
class KeepHeadroom:
    """Where the parents as they are may be taken, too: GapClosed of the better parent and of the best of arms and
    parents, chosen on one half and scored on the other. gain: of the latter over the best fixed arm, with the interval
    of `ObjectiveHeadroom`. win_share: units in which a parent leads all arms by two paired standard errors."""

    better_parent: float
    split_half_oracle: float
    gain: float
    gain_interval: tuple[float, float] | None
    win_share: float


@dataclass(frozen=True)
class ObjectiveHeadroom:
    """GapClosed when one arm is taken per context, or per merge.

    `num_units` counts what one arm is chosen for. `split_half_oracle` chooses on one half and is scored on the other;
    `maximum` chooses and scores on the same items and is inflated by noise. `gain` is the oracle minus `best_fixed`,
    the arm that is best over all contexts; `gain_interval` is its 95 % interval when checkpoints are resampled, that
    arm kept (None when no resample holds a pair). `arm_win_share` is the share of units in which an arm leads the
    runner-up by two paired standard errors.
    """

    num_units: int
    best_fixed_arm: str
    best_fixed: float
    split_half_oracle: float
    maximum: float
    gain: float
    gain_interval: tuple[float, float] | None
    split_half_oracle_mean_ratio: float
    arm_win_share: Mapping[str, float]
    tasks: Mapping[str, TaskHeadroom]
    keep: KeepHeadroom


@dataclass(frozen=True)
class HeadroomReport:
    """`arm_gap_closed` and `arm_mean_ratio` are of one arm taken everywhere, so they belong to both objectives."""

    num_contexts: int
    num_defined: int
    num_checkpoints: int
    min_items: int
    arm_gap_closed: Mapping[str, float]
    arm_mean_ratio: Mapping[str, float]
    per_context: ObjectiveHeadroom
    per_merge: ObjectiveHeadroom

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


def headroom(contexts: Sequence[Context], num_resamples: int = 2000, seed: int = 0) -> HeadroomReport:
    """All statistics of a set of contexts; raises `InputError` when none of them is defined."""
    arms = _checked_arms(contexts)
    options = defined_gaps([context.with_parents() for context in contexts], (*arms, *KEEP_ARMS))
    defined = options.only(slice(len(arms)))
    if not defined.gaps:
        raise InputError(
            f"none of the {len(contexts)} contexts has parents that differ by {MIN_GAP} and by "
            f"{NUM_STANDARD_ERRORS:g} standard errors, so GapClosed is not defined"
        )
    merges: dict[tuple[str, str], list[int]] = {}
    for i, gap in enumerate(defined.gaps):
        merges.setdefault(gap.checkpoints, []).append(i)
    return HeadroomReport(
        num_contexts=len(contexts),
        num_defined=len(defined.gaps),
        num_checkpoints=len({name for context in contexts for name in (context.left, context.right)}),
        min_items=min(len(context.left_items) for context in contexts),
        arm_gap_closed=dict(zip(arms, defined.headline(defined.closed.T).tolist(), strict=True)),
        arm_mean_ratio=dict(zip(arms, defined.mean_ratio(defined.closed.T).tolist(), strict=True)),
        per_context=_objective(options, arms, [[i] for i in range(len(defined.gaps))], num_resamples, seed),
        per_merge=_objective(options, arms, list(merges.values()), num_resamples, seed),
    )


def headline(
    tasks: Sequence[str] | np.ndarray, numerators: np.ndarray, gap: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """GapClosed of D defined contexts: ratio of sums per task, then the mean over the tasks that have weight.

    Args:
        tasks, gap: (D,). numerators: (..., D). weights: (..., D), how often each context counts; None: once.

    Returns:
        (...), NaN where no context counts.
    """
    counts, of_context = np.ones(len(gap)) if weights is None else weights, np.asarray(tasks)
    ratios = []
    for task in np.unique(of_context):
        of_task = of_context == task
        total = (counts * gap)[..., of_task].sum(-1)
        closed = (counts * numerators)[..., of_task].sum(-1)
        ratios.append(np.divide(closed, total, out=np.full(np.shape(closed), np.nan), where=total > 0))
    if not ratios:
        return np.full(np.broadcast_shapes(numerators.shape, counts.shape)[:-1], np.nan)
    return mean_of_known(ratios)


def mean_of_known(ratios: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of arrays of one shape without their NaNs; NaN where all are."""
    known = ~np.isnan(ratios)
    mean = np.where(known, ratios, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return np.where(known.any(0), mean, np.nan)


@dataclass(frozen=True)
class _Direction:
    """One defined direction: per arm the GapClosed on the choosing half, and the numerator on the scoring half."""

    choosing_ratio: np.ndarray  # (num_arms,)
    choosing_gap: float
    closed: np.ndarray  # (num_arms,)
    gap: float

    def only(self, arms: slice) -> _Direction:
        return replace(self, choosing_ratio=self.choosing_ratio[arms], closed=self.closed[arms])


@dataclass(frozen=True)
class _Gap:
    """A defined context: numerators per arm and denominator of GapClosed, averaged over the defined directions."""

    checkpoints: tuple[str, str]  # sorted, so that the order of the parents does not matter
    task: str
    directions: tuple[_Direction | None, _Direction | None]
    closed: np.ndarray  # (num_arms,)
    gap: float
    items: np.ndarray  # (num_arms, num_items)

    def only(self, arms: slice) -> _Gap:
        first, second = (None if one is None else one.only(arms) for one in self.directions)
        return replace(self, directions=(first, second), closed=self.closed[arms], items=self.items[arms])

    @property
    def choosing_gap(self) -> float:
        return float(np.mean([direction.choosing_gap for direction in self.directions if direction is not None]))


@dataclass(frozen=True)
class DefinedGaps:
    """The D defined ones of a set of contexts.

    rows: (D,) their indices. tasks: (D,). closed: (D, K) numerators of GapClosed per arm. gap: (D,) denominators.
    """

    rows: np.ndarray
    tasks: np.ndarray
    closed: np.ndarray
    gap: np.ndarray
    gaps: tuple[_Gap, ...]

    def only(self, arms: slice) -> DefinedGaps:
        """The same contexts with some of the arms."""
        return replace(self, closed=self.closed[:, arms], gaps=tuple(gap.only(arms) for gap in self.gaps))

    def headline(self, numerators: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return headline(self.tasks, numerators, self.gap, weights)

    def mean_ratio(self, numerators: np.ndarray) -> np.ndarray:
        return np.asarray((numerators / self.gap).mean(-1))


def defined_gaps(contexts: Sequence[Context], arms: Sequence[str]) -> DefinedGaps:
    """Numerators and denominators of GapClosed for all arms, from which that of any policy follows; D may be 0."""
    gaps = {row: gap for row, context in enumerate(contexts) if (gap := _gap(context, arms)) is not None}
    return DefinedGaps(
        rows=np.array(list(gaps), dtype=np.int64),
        tasks=np.array([gap.task for gap in gaps.values()]),
        closed=np.array([gap.closed for gap in gaps.values()]).reshape(len(gaps), len(arms)),
        gap=np.array([gap.gap for gap in gaps.values()]),
        gaps=tuple(gaps.values()),
    )


def _checked_arms(contexts: Sequence[Context]) -> tuple[str, ...]:
    if not contexts:
        raise InputError("no contexts: headroom needs at least one pair with the utilities of its merges")
    arms = tuple(contexts[0].arms)
    if not arms:
        raise InputError(f"{_name(contexts[0])} has no arms")
    for context in contexts:
        if set(context.arms) != set(arms):
            raise InputError(f"{_name(context)} has arms {sorted(context.arms)}, the first context {sorted(arms)}")
        shape = np.shape(context.left_items)
        if len(shape) != 1 or shape[0] < 4:
            raise InputError(f"{_name(context)} has items of shape {shape}; both halves need at least two items")
        for what, items in (("right parent", context.right_items), *context.arms.items()):
            if np.shape(items) != shape:
                raise InputError(f"{_name(context)}: {what} has items of shape {np.shape(items)}, the left {shape}")
        if not all(np.isfinite(one).all() for one in (context.left_items, context.right_items, *context.arms.values())):
            raise InputError(f"{_name(context)} has a utility that is not a finite number")
    return arms


def _name(context: Context) -> str:
    return f"context {context.left} + {context.right} on {context.task}"


def _gap(context: Context, arms: Sequence[str]) -> _Gap | None:
    items = np.array([context.arms[arm] for arm in arms], dtype=np.float64)
    parents = np.array([context.left_items, context.right_items], dtype=np.float64)
    halves = (_HALVES, _HALVES[::-1])
    directions = tuple(_direction(items, parents, choosing, scoring) for choosing, scoring in halves)
    defined = [direction for direction in directions if direction is not None]
    gap = float(np.mean([direction.gap for direction in defined])) if defined else 0.0
    if gap <= 0:
        return None
    first, second = sorted((context.left, context.right))
    return _Gap(
        checkpoints=(first, second),
        task=context.task,
        directions=(directions[0], directions[1]),
        closed=np.mean([direction.closed for direction in defined], axis=0),
        gap=gap,
        items=items,
    )


def _direction(items: np.ndarray, parents: np.ndarray, choosing: slice, scoring: slice) -> _Direction | None:
    lead, standard_error = _paired(parents[0, choosing] - parents[1, choosing])
    if abs(lead) < max(MIN_GAP, NUM_STANDARD_ERRORS * standard_error):
        return None
    expert, auxiliary = parents if lead > 0 else parents[::-1]
    floor = auxiliary[scoring].mean()
    return _Direction(
        choosing_ratio=(items[:, choosing].mean(axis=1) - auxiliary[choosing].mean()) / abs(lead),
        choosing_gap=abs(lead),
        closed=items[:, scoring].mean(axis=1) - floor,
        gap=float(expert[scoring].mean() - floor),
    )


def _paired(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences and its standard error."""
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))


def _objective(
    options: DefinedGaps, arms: Sequence[str], units: Sequence[Sequence[int]], num_resamples: int, seed: int
) -> ObjectiveHeadroom:
    """options: the arms, then both parents. `units` lists the contexts (indices into `gaps`) for which one and the same
    arm is taken."""
    defined = options.only(slice(len(arms)))
    fixed = defined.headline(defined.closed.T)
    best_fixed = int(np.argmax(fixed))
    oracle, maximum = np.empty((2, len(defined.gaps)))
    num_wins = np.zeros(len(arms))
    for unit in units:
        members = [defined.gaps[i] for i in unit]
        oracle[unit] = _split_half(members)
        pooled = np.mean([member.closed / member.choosing_gap for member in members], axis=0)
        maximum[unit] = [member.closed[_best(pooled)].mean() for member in members]
        if (winner := _clear_winner(members)) is not None:
            num_wins[winner] += 1
    split_half_oracle = float(defined.headline(oracle))
    return ObjectiveHeadroom(
        num_units=len(units),
        best_fixed_arm=arms[best_fixed],
        best_fixed=float(fixed[best_fixed]),
        split_half_oracle=split_half_oracle,
        maximum=float(defined.headline(maximum)),
        gain=split_half_oracle - float(fixed[best_fixed]),
        gain_interval=_bootstrap_interval(defined, oracle - defined.closed[:, best_fixed], num_resamples, seed),
        split_half_oracle_mean_ratio=float(defined.mean_ratio(oracle)),
        arm_win_share=dict(zip(arms, (num_wins / len(units)).tolist(), strict=True)),
        tasks=_per_task(defined, arms, oracle, maximum, num_resamples, seed),
        keep=_keep(options, best_fixed, units, num_resamples, seed),
    )


def _keep(
    options: DefinedGaps, best_fixed: int, units: Sequence[Sequence[int]], num_resamples: int, seed: int
) -> KeepHeadroom:
    """options: the arms, then both parents. best_fixed: one of the arms."""
    parents, num_arms = options.only(slice(-2, None)), options.closed.shape[1] - 2
    better, oracle = np.empty((2, len(options.gaps)))
    num_wins = 0
    for unit in units:
        better[unit] = _split_half([parents.gaps[i] for i in unit])
        oracle[unit] = _split_half(members := [options.gaps[i] for i in unit])
        winner = _clear_winner(members)
        num_wins += winner is not None and winner >= num_arms
    gains = oracle - options.closed[:, best_fixed]
    return KeepHeadroom(
        better_parent=float(options.headline(better)),
        split_half_oracle=float(options.headline(oracle)),
        gain=float(options.headline(gains)),
        gain_interval=_bootstrap_interval(options, gains, num_resamples, seed),
        win_share=num_wins / len(units),
    )


def _split_half(members: Sequence[_Gap]) -> list[float]:
    """Numerator of each member when the arm of all of them is chosen on one half and scored on the other."""
    scores: list[list[float]] = [[] for _ in members]
    for side in (0, 1):
        directions = [member.directions[side] for member in members]
        ratios = [direction.choosing_ratio for direction in directions if direction is not None]
        if not ratios:
            continue
        best = _best(np.mean(ratios, axis=0))
        for score, direction in zip(scores, directions, strict=True):
            if direction is not None:
                score.append(float(direction.closed[best].mean()))
    return [float(np.mean(score)) for score in scores]


def _best(values: np.ndarray) -> np.ndarray:
    """Indices of the best arms: tied arms are averaged, so that their order in the table decides nothing."""
    return np.flatnonzero(values >= values.max() - 1e-12)


def _clear_winner(members: Sequence[_Gap]) -> int | None:
    """The arm that leads the runner-up by two paired standard errors, pooled over the members, if there is one."""
    if len(members[0].items) == 1:
        return None
    means = np.mean([member.items.mean(axis=1) / member.choosing_gap for member in members], axis=0)
    runner_up, winner = np.argsort(means, kind="stable")[-2:]
    leads = [_paired(member.items[winner] - member.items[runner_up]) for member in members]
    scaled = np.array(leads) / np.array([[member.choosing_gap] for member in members])
    lead = scaled[:, 0].mean()
    standard_error = np.sqrt((scaled[:, 1] ** 2).sum()) / len(members)
    return int(winner) if lead > 0 and lead >= NUM_STANDARD_ERRORS * standard_error else None


def _per_task(
    defined: DefinedGaps, arms: Sequence[str], oracle: np.ndarray, maximum: np.ndarray, num_resamples: int, seed: int
) -> dict[str, TaskHeadroom]:
    tasks = {}
    for task in np.unique(defined.tasks).tolist():
        rows = defined.tasks == task
        *fixed, of_oracle, of_maximum = (
            float(one[rows].sum() / defined.gap[rows].sum()) for one in (*defined.closed.T, oracle, maximum)
        )
        best = arms[int(np.argmax(fixed))]
        gaps = tuple(gap for gap, counts in zip(defined.gaps, rows, strict=True) if counts)
        of_task = DefinedGaps(defined.rows[rows], defined.tasks[rows], defined.closed[rows], defined.gap[rows], gaps)
        columns = dict(zip(arms, of_task.closed.T, strict=True)) | {"": oracle[rows]}
        intervals = {arm: _bootstrap_interval(of_task, one, num_resamples, seed) for arm, one in columns.items()}
        by_arm = dict(zip(arms, fixed, strict=True))
        tasks[task] = TaskHeadroom(int(rows.sum()), by_arm, intervals, best, of_oracle, of_maximum)
    return tasks


def _bootstrap_interval(
    defined: DefinedGaps, gains: np.ndarray, num_resamples: int, seed: int
) -> tuple[float, float] | None:
    """95 % percentile interval of the headline of `gains` (numerators) when checkpoints are drawn with replacement.

    A pair weighs the product of how often its two checkpoints were drawn: pairs that share one are not independent.
    A resample counts the tasks that it holds; None when no resample holds a pair at all.
    """
    checkpoints = sorted({name for gap in defined.gaps for name in gap.checkpoints})
    pairs = np.array([[checkpoints.index(name) for name in gap.checkpoints] for gap in defined.gaps])
    num = len(checkpoints)
    drawn = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=num_resamples)
    weights = (drawn[:, pairs[:, 0]] * drawn[:, pairs[:, 1]]).astype(np.float64)
    values = defined.headline(gains, weights)
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
