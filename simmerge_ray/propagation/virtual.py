"""Virtual checkpoints: intermediates computed from signatures alone.

Operators that blend (linear, task arithmetic, slerp, nuslerp) make coefficient vectors over [base, task vectors], as
exact as the Gram matrix at any depth; every other operator runs on the coordinate sample (see `tensor_space`). Outputs
are mixtures of the checkpoints'. Rounding of intermediates to an output dtype is left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from simmerge_ray.operators.shares import MIN_NORM
from simmerge_ray.operators.table import OPERATORS
from simmerge_ray.plans import MergePlan, step_weights
from simmerge_ray.propagation.halfway import curve_shares
from simmerge_ray.propagation.interface import Intermediate, Source, members, propagated
from simmerge_ray.propagation.mixture import mixed_outputs
from simmerge_ray.propagation.span import SPAN_OPERATORS, blend_shares, kth_largest, trimmed
from simmerge_ray.propagation.tensor_space import TensorSpace, VirtualTensor, tensor_space
from simmerge_ray.signals.compute import matrix_entry
from simmerge_ray.signals.features import feature_columns
from simmerge_ray.signals.pairs import output_matrices
from simmerge_ray.signals.samples import sampled_weight_sums
from simmerge_ray.signals.signature import TaskOutputs, Weights
from simmerge_ray.signals.table import PairSignals, SignalTable
from simmerge_ray.signals.weights import TRIM_DENSITY, WeightSums, sums_in_blocks, weight_matrices

Array = np.ndarray
_KEPT = 32  # intermediates in memory, 8 bytes a sampled coordinate each: prefixes of the plans that are being scored
_KEPT_OUTPUTS = 8  # mixtures, each as large as a checkpoint's outputs on a task
_TINY = 1e-30
VirtualCheckpoint = Mapping[str, VirtualTensor]


class Virtual:
    """Delivers every column.

    Outputs of an intermediate are the mixture of its checkpoints' by one share each (see `shares`).

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
        self._table, self._ids, self._outputs = table, tuple(ids), outputs
        self._base = table.provenance.get("base")
        self._digests = digests or {}
        self.columns = feature_columns(self._base is not None)
        samples = [weights[name] for name in self._ids]
        known = sums or sampled_weight_sums(samples, weights[self._base] if self._base is not None else None)
        self._spaces = {
            name: tensor_space([one[name] for one in samples], known[name].gram, self._base is not None)
            for name in known
        }
        # Caches of this object's lifetime: a step of one plan is a step of many others.
        self._checkpoint = lru_cache(_KEPT + len(self._ids))(self._make_checkpoint)
        self._mixture = lru_cache(_KEPT_OUTPUTS)(self._make_mixture)
        self._sampled_vectors = lru_cache(_KEPT + len(self._ids))(self._make_sampled_vectors)
        self._weight_signals = lru_cache(_KEPT)(self._compare_weights)

    def steps(self, plan: MergePlan, task: str, first: int = 0) -> list[PairSignals]:
        return propagated(plan, task, self._table, self.columns, lambda a, b: self._between(a, b, task), first=first)

    def _between(self, left: Source, right: Source, task: str) -> Mapping[str, float]:
        with_base = self._base is not None
        matrices = output_matrices([self._mixture(left, task), self._mixture(right, task)], with_base)
        matrices |= self._weight_signals(left, right)
        return {column: matrix_entry(matrices, column, 0, 1) for column in self.columns}

    def _compare_weights(self, left: Source, right: Source) -> dict[str, Array]:
        """The same for every task."""
        sums = {name: self._pair_sums(name, left, right) for name in self._spaces}
        return weight_matrices(sums, self._base is not None)

    # Weights

    def _make_checkpoint(self, source: Source) -> VirtualCheckpoint:
        if isinstance(source, str):
            index = 1 + self._ids.index(source)
            return {name: space.vector(index) for name, space in self._spaces.items()}
        return {name: self._merged(name, source) for name in self._spaces}

    def _merged(self, name: str, source: Intermediate) -> VirtualTensor:
        space = self._spaces[name]
        left, right = (self._checkpoint(part)[name] for part in (source.left, source.right))
        if source.arm.operator not in SPAN_OPERATORS:
            return self._on_sample(name, source, space.sampled(left), space.sampled(right))

        def products(centred: bool) -> tuple[float, float, float]:
            gram = space.products([tensor if centred else space.with_base(tensor) for tensor in (left, right)])
            return float(gram[0, 0]), float(gram[0, 1]), float(gram[1, 1])

        shares = blend_shares(source.arm, source.constant_weight, products, self._base is not None)
        return space.blended(left, right, shares)

    def _on_sample(self, name: str, source: Intermediate, left: Array, right: Array) -> VirtualTensor:
        """The real operator on the sampled coordinates, as if they were a tensor of one dimension."""
        space, operator = self._spaces[name], source.arm.operator
        params: dict[str, Any] = source.arm.param_dict()
        parts = (source.left, source.right)
        if operator == "ties" and not space.is_whole:
            density = float(params["density"])
            left, right = (
                trimmed(vector, self._threshold(space, part, vector, density), density)
                for part, vector in zip(parts, (left, right), strict=True)
            )
            params["density"] = 1.0
        if source.arm.spec.random:
            params["seeds"] = [self._seed(source, part, name) for part in parts]
        base = torch.from_numpy(space.centre).double()
        tensors = [base + torch.from_numpy(vector) for vector in (left, right)]
        weights = step_weights(operator, source.constant_weight)
        merged = OPERATORS[operator](base if self._base is not None else None, tensors, weights, **params)
        index = [1 + self._ids.index(member) for member in members(source)]
        vectors, origin = np.eye(len(space.gram))[index], np.eye(1, len(space.gram))
        if self._base is not None:
            return space.fitted((merged - base).numpy(), np.concatenate((origin, vectors)))
        # Differences from a mean may be dependent, the checkpoints themselves are not.
        found = space.fitted(merged.numpy(), vectors + origin)
        values = None if found.values is None else found.values - space.centre
        return VirtualTensor(found.coefficients - origin[0], values)

    def _threshold(self, space: TensorSpace, source: Source, vector: Array, density: float) -> float:
        exact = space.threshold(1 + self._ids.index(source), density) if isinstance(source, str) else None
        return kth_largest(vector, density) if exact is None else exact

    def _seed(self, source: Intermediate, part: Source, tensor: str) -> int:
        """As `merging.compute.Seeds`, which reads the digests from the files."""
        digests = [self._digests.get(name, name) for name in sorted({*members(part), *self._bases(part)})]
        text = "\0".join([str(source.seed), str(source.step), *digests, tensor])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def _bases(self, source: Source) -> set[str]:
        """The base, where a step under the source takes it."""
        if isinstance(source, str) or self._base is None:
            return set()
        own = {str(self._base)} if source.arm.spec.uses_base else set()
        return own | self._bases(source.left) | self._bases(source.right)

    def _pair_sums(self, name: str, left: Source, right: Source) -> WeightSums:
        space = self._spaces[name]
        gram = space.products([space.vector(0), *(self._checkpoint(source)[name] for source in (left, right))])
        vectors, thresholds = zip(*(self._sampled_vectors(source)[name] for source in (left, right)), strict=True)
        rows = np.stack(vectors)
        sums = sums_in_blocks(
            lambda start, stop: (rows[:, start:stop], space.centre[start:stop]), rows.shape[1], np.array(thresholds)
        )
        return replace(sums.scaled(space.scale), gram=gram)

    def _make_sampled_vectors(self, source: Source) -> dict[str, tuple[Array, float]]:
        """Task vector at the sampled coordinates, float32, and the threshold of `trimmed_overlap`, by tensor."""
        found = {}
        for name, space in self._spaces.items():
            vector = space.sampled(self._checkpoint(source)[name]).astype(np.float32)
            threshold = math.inf if self._base is None else self._threshold(space, source, vector, TRIM_DENSITY)
            found[name] = vector, threshold
        return found

    # Outputs

    def shares(self, source: Source) -> dict[str, float]:
        """Shares of the checkpoints (and of the base, where there is one) in the outputs of a source; sum 1."""
        found, _ = self._coefficients(source)
        total = float(found.sum())
        if self._base is None:
            return dict(zip(members(source), (found / total).tolist(), strict=True))
        return {str(self._base): 1.0 - total, **dict(zip(members(source), found.tolist(), strict=True))}

    def _coefficients(self, source: Source) -> tuple[Array, Array]:
        """Of each member i: coefficient c_i, and `<d_i, d_m> / |d_i|^2` with the merged task vector d_m; (members,).

        Averaged over tensors with weights `|d_i|^2 / |base|^2`: what a tensor changes goes with its relative change
        (with absolute ones embeddings hide the layers).
        """
        index = [1 + self._ids.index(name) for name in members(source)]
        coefficients, along, energy = np.zeros((3, len(index)))
        for name, tensor in self._checkpoint(source).items():
            space = self._spaces[name]
            relative = space.gram[index] / max(float(space.gram[0, 0]), MIN_NORM**2)
            squares = relative[range(len(index)), index] + _TINY  # a checkpoint that has not moved counts its tensors
            coefficients += squares * tensor.coefficients[index]
            along += relative @ tensor.coefficients
            energy += squares
        return coefficients / energy, along / energy

    def _make_mixture(self, source: Source, task: str) -> TaskOutputs:
        if isinstance(source, str):
            return self._outputs(source, task)
        if self._halfway is None:
            shares = self.shares(source)
            return mixed_outputs([self._outputs(name, task) for name in shares], list(shares.values()))
        coefficients, along = (values.tolist() for values in self._coefficients(source))
        half, full = zip(*map(curve_shares, coefficients, along), strict=True)
        names = members(source)
        outputs = [
            self._outputs(str(self._base), task),
            *(self._halfway(name, task) for name in names),
            *(self._outputs(name, task) for name in names),
        ]
        return mixed_outputs(outputs, [1.0 - sum(half) - sum(full), *half, *full])
