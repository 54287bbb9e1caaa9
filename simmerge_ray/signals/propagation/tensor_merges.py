"""One tensor of every source: what merges make of it, and the sums that weight signals are computed from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from simmerge_ray.merging.engine.seeds import seed_of
from simmerge_ray.plans.operators.table import OPERATORS
from simmerge_ray.plans.plan import step_weights
from simmerge_ray.signals.propagation.interface import Intermediate, Source, members
from simmerge_ray.signals.propagation.span import blend_shares, kth_largest, trimmed
from simmerge_ray.signals.propagation.tensor_space import TensorSpace, VirtualTensor
from simmerge_ray.signals.weights import TRIM_DENSITY, WeightSums, counted_sums, packed_bits

_ROOM = 1 << 28  # bytes of sources at the sampled coordinates that are held while pairs of them are compared
_KEPT = 32  # intermediates in memory, 8 bytes a sampled coordinate each: prefixes of the plans that are being scored


class TensorMerges:
    """Operators that blend make coefficient vectors, every other one runs on the coordinate sample.

    Args:
        ids: of the base, if any, then of the checkpoints. digests: see `Virtual`.
    """

    def __init__(
        self, name: str, space: TensorSpace, ids: Sequence[str], base: str | None, digests: Mapping[str, str]
    ) -> None:
        self.space = space
        self._name, self._base, self._digests = name, base, digests
        self._index = {one: 1 + place for place, one in enumerate(ids)}  # in the Gram matrix
        # A cache of this object's lifetime: a step of one plan is a step of many others.
        self.of = lru_cache(_KEPT + len(ids))(self._make)

    def pairs(
        self, pairs: Sequence[tuple[Source, Source]], order: Mapping[Source, int]
    ) -> tuple[dict[Source, np.ndarray], list[WeightSums]]:
        """Coefficients (K,) of the sources in some pairs, and the sums of every pair.

        Args:
            order: in which sources are made; what is common to those that follow each other is made once, as the cache
                holds it.
        """
        coefficients: dict[Source, np.ndarray] = {}
        sums: list[WeightSums] = []
        size = max(1, _ROOM // (17 * len(self.space.centre)))  # 8 bytes and 3 bits a coordinate, of two sources
        for start in range(0, len(pairs), size):
            block = pairs[start : start + size]
            sources = sorted({source for pair in block for source in pair}, key=order.__getitem__)
            made = {source: self.of(source) for source in sources}
            bits = {source: self._bits(source, tensor) for source, tensor in made.items()}
            origin = self.space.vector(0)
            grams = self.space.products_of([(origin, made[left], made[right]) for left, right in block])
            sums += [
                self._sums(gram, bits[left], bits[right]) for gram, (left, right) in zip(grams, block, strict=True)
            ]
            coefficients |= {source: tensor.coefficients for source, tensor in made.items()}
        return coefficients, sums

    def seed(self, source: Intermediate, part: Source) -> int:
        """As `engine.seeds.Seeds`, which reads the digests from the files."""
        digests = [self._digests.get(name, name) for name in sorted({*members(part), *self._bases(part)})]
        return seed_of(source.seed, source.step, digests, self._name)

    def _make(self, source: Source) -> VirtualTensor:
        space = self.space
        if isinstance(source, str):
            return space.vector(self._index[source])
        left, right = self.of(source.left), self.of(source.right)
        if source.arm.spec.shares is None:
            return self._on_sample(source, space.sampled(left), space.sampled(right))

        def products(centred: bool) -> tuple[float, float, float]:
            gram = space.products([tensor if centred else space.with_base(tensor) for tensor in (left, right)])
            return float(gram[0, 0]), float(gram[0, 1]), float(gram[1, 1])

        return space.blended(
            left, right, blend_shares(source.arm, source.constant_weight, products, self._base is not None)
        )

    def _on_sample(self, source: Intermediate, left: np.ndarray, right: np.ndarray) -> VirtualTensor:
        """The real operator on the sampled coordinates, as if they were a tensor of one dimension."""
        space, operator = self.space, source.arm.operator
        params: dict[str, Any] = source.arm.param_dict()
        parts = (source.left, source.right)
        if source.arm.spec.trims:  # by the checkpoints' own thresholds, which their sample does not know
            density = float(params["density"])
            left, right = (
                trimmed(vector, self._threshold(part, vector, density), density, bool(params["rescale"]))
                for part, vector in zip(parts, (left, right), strict=True)
            )
            params["density"] = 1.0
        if source.arm.spec.random:
            params["seeds"] = [self.seed(source, part) for part in parts]
        base = torch.from_numpy(space.centre).double()
        tensors = [base + torch.from_numpy(vector) for vector in (left, right)]
        weights = step_weights(operator, source.constant_weight)
        merged = OPERATORS[operator](base if self._base is not None else None, tensors, weights, **params)
        index = [self._index[member] for member in members(source)]
        vectors, origin = np.eye(len(space.gram))[index], np.eye(1, len(space.gram))
        if self._base is not None:
            return space.fitted((merged - base).numpy(), np.concatenate((origin, vectors)))
        # Differences from a mean may be dependent, the checkpoints themselves are not.
        found = space.fitted(merged.numpy(), vectors + origin)
        values = None if found.values is None else found.values - space.centre
        return VirtualTensor(found.coefficients - origin[0], values)

    def _threshold(self, source: Source, vector: np.ndarray, density: float) -> float:
        exact = self.space.threshold(self._index[source], density) if isinstance(source, str) else None
        return kth_largest(vector, density) if exact is None else exact

    def _bases(self, source: Source) -> set[str]:
        """The base, where a step under the source takes it."""
        if isinstance(source, str) or self._base is None:
            return set()
        own = {self._base} if source.arm.spec.uses_base else set()
        return own | self._bases(source.left) | self._bases(source.right)

    def _bits(self, source: Source, tensor: VirtualTensor) -> np.ndarray:
        """`packed_bits` of the task vector at the sampled coordinates, (3, words)."""
        vector = self.space.sampled(tensor).astype(np.float32)
        threshold = math.inf if self._base is None else self._threshold(source, vector, TRIM_DENSITY)
        bits: np.ndarray = packed_bits(vector[None], np.array([threshold], np.float32))[:, 0]
        return bits

    def _sums(self, gram: np.ndarray, left: np.ndarray, right: np.ndarray) -> WeightSums:
        """gram: (3, 3), as it is. left, right: bits of the sample."""
        counts = counted_sums(gram, np.stack([left, right], axis=1)).scaled(self.space.scale)
        return replace(counts, gram=gram)
