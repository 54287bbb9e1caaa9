"""Virtual checkpoints: intermediates computed from signatures alone.

Operators that blend (linear, task arithmetic, slerp, nuslerp) make coefficient vectors over [base, task vectors], as
exact as the Gram matrix at any depth; every other operator runs on the coordinate sample (see `tensor_space`). Outputs
are mixtures of the checkpoints'. Rounding of intermediates to an output dtype is left out.

Many steps are computed in two passes. Weights go tensor by tensor, through all folds at once, so that what plans have
in common is merged once while the tensor's sample is at hand. Outputs go task by task: right sides are prepared once,
each left side is mixed and prepared once and compared with all its right sides (see `outputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from threading import Lock

import numpy as np

from simmerge_ray.plans.operators.shares import MIN_NORM
from simmerge_ray.signals.compute import matrix_entry
from simmerge_ray.signals.features import column_signal, feature_columns
from simmerge_ray.signals.propagation.halfway import curve_shares
from simmerge_ray.signals.propagation.interface import Propagator, Source, SourcePair, fold_path, members
from simmerge_ray.signals.propagation.outputs import OutputPairs, PreparedOutputs, mixed_outputs, prepared_outputs
from simmerge_ray.signals.propagation.tensor_merges import TensorMerges
from simmerge_ray.signals.propagation.tensor_space import tensor_space
from simmerge_ray.signals.samples import sampled_weight_sums
from simmerge_ray.signals.signature import TaskOutputs, Weights
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.signals.weights import WeightSums, weight_matrices

Pair = tuple[Source, Source]
_Part = tuple[str, bool, float]  # checkpoint; whether half of the way to it from the base; share
_MANY = 128  # checkpoints of which no sums of all pairs are made
_KEPT, _FEW = 32, 8  # groups of so few pairs, the steps of a plan, whose weights are kept: the same for every task
_ROOM = 1 << 29  # bytes of outputs, and as much of prepared ones, that are held while a task's pairs are compared
_TOGETHER = 12  # pairs in one call of `weight_matrices`: many cost little more than one, and unwanted ones grow
_TINY = 1e-30


class Virtual(Propagator):
    """Delivers every column. merges: of every tensor, by name, made when they are first asked for.

    Outputs of an intermediate are the mixture of its checkpoints' by one share each (see `_parts`).

    Args:
        ids: of the base, if any, then of the checkpoints, in the order of `sums`.
        outputs: of a checkpoint on a task. weights: the samples by id.
        sums: exact sums of every tensor, by name; None takes those of the samples, with the exact norms.
        digests: of the checkpoints, so that random operators draw the masks of the real merge where a tensor is kept
            whole; elsewhere another draw of the same distribution takes their place.
        halfway: outputs of base + task vector / 2 of a checkpoint on a task. With them this is `curved`: every
            checkpoint's part in the outputs follows its own curve (see `halfway`) in place of a straight line.
    """

    def __init__(
        self,
        table: SignalTable,
        ids: Sequence[str],
        outputs: Callable[[str, str], TaskOutputs],
        weights: Mapping[str, Weights],
        sums: Mapping[str, WeightSums] | None = None,
        digests: Mapping[str, str] | None = None,
        halfway: Callable[[str, str], TaskOutputs] | None = None,
    ) -> None:
        self.name = "virtual" if halfway is None else "curved"
        self._halfway = halfway
        self._base: str | None = table.provenance.get("base")
        super().__init__(table, feature_columns(self._base is not None))
        self._ids, self._outputs = tuple(ids), outputs
        self._samples, self._sums, self._digests = weights, sums, digests or {}
        self._of_few = lru_cache(_KEPT)(lambda pairs: self._weights(pairs, map))
        self._among = lru_cache(1)(
            lambda ids: Virtual(table, ids, outputs, weights, None, digests, halfway)  # of these checkpoints alone
        )

    @cached_property
    def merges(self) -> dict[str, TensorMerges]:
        samples, base = [self._samples[name] for name in self._ids], self._base
        known = self._sums or sampled_weight_sums(samples, self._samples[base] if base is not None else None)
        return {
            name: TensorMerges(
                name,
                tensor_space([sample[name] for sample in samples], sums_of.gram, base is not None),
                self._ids,
                base,
                self._digests,
            )
            for name, sums_of in known.items()
        }

    def among(self, ids: Collection[str]) -> Propagator:
        if len(self._ids) <= _MANY or self._base is None or self._sums is not None:
            return self
        return self._among((self._base, *sorted(ids)))

    def _features(self, pairs: Sequence[SourcePair], columns: Sequence[str], num_threads: int) -> np.ndarray:
        if len(self._ids) > _MANY and self._base is not None and self._sums is None:
            # Sums of all with all would fill the memory; with a base those of the members are all that counts.
            merged = {name for pair in pairs for side in (pair.left, pair.right) for name in members(side)}
            if len(merged) + 1 < len(self._ids):
                return self.among(merged)._features(pairs, columns, num_threads)
        same: dict[Source, Source] = {}  # equal sources as one object, so that finding them again costs nothing
        by_task: dict[str, dict[Pair, int]] = {}
        for place, pair in enumerate(pairs):
            both = same.setdefault(pair.left, pair.left), same.setdefault(pair.right, pair.right)
            by_task.setdefault(pair.task, {})[both] = place
        different = dict.fromkeys(both for places in by_task.values() for both in places)
        # Pairs of the same checkpoints together, for the weights of the sample (see `TensorSpace.products_of`).
        ordered = sorted(different, key=lambda pair: sorted({*members(pair[0]), *members(pair[1])}))
        with ThreadPoolExecutor(num_threads) as threads:
            if len(ordered) <= _FEW:
                parts, of_weights = self._of_few(tuple(ordered))
            else:
                parts, of_weights = self._weights(ordered, threads.map)
            number = {pair: index for index, pair in enumerate(ordered)}
            values = np.empty((len(columns), len(pairs)))
            for task, places in by_task.items():
                chosen, into = [number[pair] for pair in places], list(places.values())
                found = {column: of_pairs[chosen] for column, of_pairs in of_weights.items()}
                if any(column not in found for column in columns):
                    found |= self._compare_outputs(list(places), task, parts, threads)
                for index, column in enumerate(columns):
                    values[index, into] = found[column]
        assert np.isfinite(values).all()
        return values

    # Weights

    def _weights(
        self, pairs: Sequence[Pair], spread: Callable[..., Iterable[tuple[dict[Source, np.ndarray], list[WeightSums]]]]
    ) -> tuple[dict[Source, list[_Part]], dict[str, np.ndarray]]:
        """The parts of every source in the pairs, and the columns of weights, (N,) each; the same for every task."""
        sources = sorted({source for pair in pairs for source in pair}, key=fold_path)
        order = {source: place for place, source in enumerate(sources)}
        merged = spread(lambda one: one.pairs(pairs, order), self.merges.values())
        found = dict(zip(self.merges, merged, strict=True))
        parts = {
            source: self._parts(source, {name: coefficients[source] for name, (coefficients, _) in found.items()})
            for source in sources
        }
        of_weights = [column for column in self.columns if column_signal(column).of_weights]
        values = np.empty((len(of_weights), len(pairs)))
        for start in range(0, len(pairs), _TOGETHER):
            stop = min(start + _TOGETHER, len(pairs))
            sums = {name: _side_by_side(of_pairs[start:stop]) for name, (_, of_pairs) in found.items()}
            matrices = weight_matrices(sums, self._base is not None)
            for index, column in enumerate(of_weights):
                for place in range(stop - start):
                    values[index, start + place] = matrix_entry(matrices, column, 2 * place, 2 * place + 1)
        return parts, dict(zip(of_weights, values, strict=True))

    # Outputs

    def _parts(self, source: Source, coefficients: Mapping[str, np.ndarray]) -> list[_Part]:
        """What the outputs of a source are mixed of; shares of sum 1.

        Args:
            coefficients: (K,) of every tensor, by name.
        """
        names = members(source)
        found, along = self._averaged(names, coefficients)
        total = float(found.sum())
        if self._base is None:
            return [(name, False, share) for name, share in zip(names, (found / total).tolist(), strict=True)]
        if self._halfway is None:
            shares = zip(names, found.tolist(), strict=True)
            return [(self._base, False, 1.0 - total), *((name, False, share) for name, share in shares)]
        half, full = zip(*map(curve_shares, found.tolist(), along.tolist()), strict=True)
        return [
            (self._base, False, 1.0 - sum(half) - sum(full)),
            *((name, True, share) for name, share in zip(names, half, strict=True)),
            *((name, False, share) for name, share in zip(names, full, strict=True)),
        ]

    def _averaged(self, names: Sequence[str], coefficients: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of each member i: coefficient c_i, and `<d_i, d_m> / |d_i|^2` with the merged task vector d_m; (members,).

        Averaged over tensors with weights `|d_i|^2 / |base|^2`: what a tensor changes goes with its relative change
        (with absolute ones embeddings hide the layers).
        """
        index = [1 + self._ids.index(name) for name in names]
        total, along, energy = np.zeros((3, len(index)))
        for name, of_tensor in coefficients.items():
            space = self.merges[name].space
            relative = space.gram[index] / max(float(space.gram[0, 0]), MIN_NORM**2)
            squares = relative[range(len(index)), index] + _TINY  # a checkpoint that has not moved counts its tensors
            total += squares * of_tensor[index]
            along += relative @ of_tensor
            energy += squares
        return total / energy, along / energy

    def _compare_outputs(
        self, pairs: Sequence[Pair], task: str, parts: Mapping[Source, Sequence[_Part]], threads: ThreadPoolExecutor
    ) -> dict[str, np.ndarray]:
        """The columns of outputs, (N,) each."""
        reading, any_outputs = Lock(), self._outputs(self._ids[0], task)
        size = sum(array.nbytes for array in vars(any_outputs).values())

        @lru_cache(max(1, _ROOM // size))
        def outputs(name: str, half: bool) -> TaskOutputs:
            read = self._halfway if half else self._outputs
            assert read is not None
            with reading:  # it may have to run a model, which two threads cannot load at the same time
                return read(name, task)

        def prepared(source: Source) -> PreparedOutputs:
            if isinstance(source, str):
                return prepared_outputs(outputs(source, False))
            mixed = [(outputs(name, half), share) for name, half, share in parts[source]]
            return prepared_outputs(mixed_outputs(*zip(*mixed, strict=True)))

        def compare(left: Source, rights: Sequence[tuple[int, PreparedOutputs]]) -> None:
            one = prepared(left)
            for place, right in rights:
                room.put(place, one, right)

        room = OutputPairs(len(pairs), any_outputs, self._base is not None)
        wanted: dict[Source, list[tuple[int, Source]]] = {}  # by right
        for place, (left, right) in enumerate(pairs):
            wanted.setdefault(right, []).append((place, left))
        for block in _blocks(list(wanted), max(1, _ROOM // (4 * any_outputs.logits.nbytes))):
            by_left: dict[Source, list[tuple[int, PreparedOutputs]]] = {}
            for right, one in zip(block, threads.map(prepared, block), strict=True):
                for place, left in wanted[right]:
                    by_left.setdefault(left, []).append((place, one))
            lefts = sorted(by_left, key=fold_path)
            list(threads.map(compare, lefts, [by_left[left] for left in lefts]))
        return room.columns()


def _blocks(items: Sequence[Source], size: int) -> list[Sequence[Source]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _side_by_side(sums: Sequence[WeightSums]) -> WeightSums:
    """Sums of P pairs as those of 2 P vectors, of which only left and right of each pair have anything in common."""
    gram, rest = np.zeros((2 * len(sums) + 1, 2 * len(sums) + 1)), np.zeros((3, 2 * len(sums), 2 * len(sums)))
    gram[0, 0] = sums[0].gram[0, 0]
    for place, one in enumerate(sums):
        both = slice(2 * place, 2 * place + 2)
        shifted = slice(2 * place + 1, 2 * place + 3)
        gram[0, shifted], gram[shifted, 0], gram[shifted, shifted] = one.gram[0, 1:], one.gram[1:, 0], one.gram[1:, 1:]
        rest[:, both, both] = one.sign_product, one.sign_support, one.overlap
    return WeightSums(gram, *rest)
