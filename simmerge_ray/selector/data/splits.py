"""What is left out when a selector is tested: pairs, checkpoints, bases or domains.

A fold names rows to train on and rows to test. A pair that is tested in several folds is averaged over them and counted
once (`fold_mean`); figures have intervals by resampling bases, then checkpoints (`resampled_weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import LabelError
from simmerge_ray.search.headroom import Context

Pair = tuple[str, str]
Group = tuple[str, ...]  # checkpoints of a merge


@dataclass(frozen=True)
class Fold:
    """name: what is left out. training, tested: rows."""

    name: str
    training: tuple[int, ...]
    tested: tuple[int, ...]

    def among(self, rows: Iterable[int]) -> Fold:
        """The same fold of these rows alone."""
        kept = set(rows)
        return Fold(self.name, *(tuple(row for row in part if row in kept) for part in (self.training, self.tested)))


def pairs_of(contexts: Iterable[Context]) -> tuple[Pair, ...]:
    """(left, right) of each context."""
    return tuple((context.left, context.right) for context in contexts)


def rows_by_pair(pairs: Iterable[Group]) -> dict[Group, list[int]]:
    """Rows of each pair (or larger group) in either order, by its sorted names."""
    found: dict[Group, list[int]] = {}
    for row, names in enumerate(pairs):
        found.setdefault(tuple(sorted(names)), []).append(row)
    return found


def checkpoint_folds(pairs: Sequence[Group], max_groups: int, seed: int) -> list[Fold]:
    """Each group of checkpoints left out in turn, with all its pairs: *one model unseen*. At most `max_groups` of about
    one size, drawn at random if there are more checkpoints."""
    names = sorted({name for pair in pairs for name in pair})
    if len(names) > max_groups:
        names = [names[index] for index in np.random.default_rng([seed, len(names)]).permutation(len(names))]
    num_groups = min(max_groups, len(names))
    groups = [sorted(names[index::num_groups]) for index in range(num_groups)]
    return [_fold(", ".join(group), [any(name in group for name in pair) for pair in pairs]) for group in groups]


def random_pair_folds(pairs: Sequence[Pair], max_groups: int, seed: int) -> list[Fold]:
    """Pairs left out at random, whose checkpoints were seen in other pairs: the easiest split, shown to compare."""
    units = [rows for _, rows in sorted(rows_by_pair(pairs).items())]
    order = np.random.default_rng([seed, len(units)]).permutation(len(units))
    num_groups, group = min(max_groups, len(units)), np.zeros(len(pairs), dtype=int)
    for place, unit in enumerate(order):
        group[units[unit]] = place % num_groups
    return [_fold(f"pairs {number}", (group == number).tolist()) for number in range(num_groups)]


def base_folds(pairs: Sequence[Pair], base_of: Mapping[str, str]) -> list[Fold]:
    """All checkpoints of a base left out together: *unseen model and unseen base*. Raises LabelError: a checkpoint
    without a base, a pair of two bases, or a single base."""
    for pair in pairs:
        bases = [base_of.get(name) for name in pair]
        if None in bases or bases[0] != bases[1]:
            raise LabelError(f"checkpoints {pair[0]!r} and {pair[1]!r} have the bases {bases}; one base is needed")
    bases_found = sorted({base_of[left] for left, _ in pairs})
    if len(bases_found) < 2:
        raise LabelError(f"the labels are of one base ({', '.join(bases_found)}); an unseen base needs a second one")
    return [_fold(base, [base_of[left] == base for left, _ in pairs]) for base in bases_found]


def domain_folds(contexts: Sequence[Context]) -> list[Fold]:
    """Each task left out in turn, with every pair that was measured on it: *unseen domain*.

    Such pairs are tested whole, on both parents' tasks: one arm serves the merge, and is chosen for both together.
    Raises LabelError: fewer than three tasks, so that nothing is left to train on."""
    tasks = sorted({context.task for context in contexts})
    if len(tasks) < 3:
        raise LabelError(f"the labels are of the tasks {', '.join(tasks)}; an unseen domain needs three tasks at least")
    pairs = [frozenset((c.left, c.right)) for c in contexts]
    touching = {task: {pair for pair, c in zip(pairs, contexts, strict=True) if c.task == task} for task in tasks}
    return [_fold(task, [pair in touching[task] for pair in pairs]) for task in tasks]


def _fold(name: str, left_out: Sequence[bool]) -> Fold:
    rows = range(len(left_out))
    return Fold(name, tuple(i for i in rows if not left_out[i]), tuple(i for i in rows if left_out[i]))


def fold_mean(folds: Sequence[Fold], values: Sequence[np.ndarray], num_rows: int) -> np.ndarray:
    """Per fold (num tested, ...) -> (num_rows, ...): the mean over the folds that tested a row, NaN where none did."""
    total = np.zeros((num_rows, *values[0].shape[1:]))
    count = np.zeros((num_rows,) + (1,) * (values[0].ndim - 1))
    for fold, value in zip(folds, values, strict=True):
        total[list(fold.tested)] += value
        count[list(fold.tested)] += 1
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def resampled_weights(
    pairs: Sequence[Group], base_of: Mapping[str, str] | None, num_resamples: int, seed: int
) -> np.ndarray:
    """(num_resamples, N): how often each pair is in a sample of bases with replacement, then of their checkpoints.

    A pair weighs the product of how often its two checkpoints were drawn, since pairs that share one are not
    independent. Without `base_of`, or with one base, only checkpoints are drawn. Groups of more members likewise, all
    of one size.
    """
    generator = np.random.default_rng(seed)
    names = sorted({name for pair in pairs for name in pair})
    bases = {name: (base_of or {}).get(name, "") for name in names}
    groups = [[name for name in names if bases[name] == base] for base in sorted(set(bases.values()))]
    weights = np.zeros((num_resamples, len(pairs)))
    drawn = generator.integers(len(groups), size=(num_resamples, len(groups)))
    place = {name: (index, member) for index, group in enumerate(groups) for member, name in enumerate(group)}
    for slot in range(len(groups)):
        for index, group in enumerate(groups):
            chosen = np.flatnonzero(drawn[:, slot] == index)
            inside = [row for row, pair in enumerate(pairs) if {place[name][0] for name in pair} == {index}]
            if not len(chosen) or not inside:
                continue
            counts = generator.multinomial(len(group), np.full(len(group), 1 / len(group)), size=len(chosen))
            members = np.array([[place[name][1] for name in pairs[row]] for row in inside])
            weights[np.ix_(chosen, np.array(inside))] += counts[:, members].prod(axis=2)
    return weights
