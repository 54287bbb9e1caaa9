"""The audit: merge in memory, run the probes, sum over all coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.signals.compute import matrix_entry
from simmerge_ray.signals.features import feature_columns
from simmerge_ray.signals.pairs import output_matrices
from simmerge_ray.signals.propagation.interface import Propagator, Source, SourcePair, plan_results
from simmerge_ray.signals.propagation.merged import Tensors, merged_steps, model_of, run_probes
from simmerge_ray.signals.propagation.span import kth_largest
from simmerge_ray.signals.samples import TensorBlocks, opened_blocks, trim_threshold
from simmerge_ray.signals.signature import TaskOutputs, Weights
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.signals.tokens import ProbeTokens
from simmerge_ray.signals.weights import BLOCK_ELEMENTS, TRIM_DENSITY, WeightSums, sums_in_blocks, weight_matrices


class Exact(Propagator):
    """Delivers every column, by doing what the others predict; all intermediates of a plan are in memory meanwhile.

    Args:
        tokens: of every task. outputs: of a checkpoint on a task, from the same tokens. weights: the samples by id, for
            the exact trim thresholds of the checkpoints. dtype: to which an intermediate is rounded before it is run
            and compared (what a merge on disk would be); float32 leaves it as it is.
    """

    name = "exact"

    def __init__(
        self,
        table: SignalTable,
        catalogue: Catalogue,
        tokens: Mapping[str, ProbeTokens],
        outputs: Callable[[str, str], TaskOutputs],
        weights: Mapping[str, Weights],
        dtype: str = "F32",
    ) -> None:
        super().__init__(table, feature_columns(catalogue.base is not None), gradients=True)
        self._catalogue, self._tokens = catalogue, tokens
        self._outputs, self._weights, self._dtype = outputs, weights, dtype
        # One plan at a time, for all its tasks.
        self._merges = lru_cache(1)(self._merge)
        self._run = lru_cache(8)(self._run_probes)
        self._weight_signals = lru_cache(8)(self._compare_weights)

    def _features(self, pairs: Sequence[SourcePair], columns: Sequence[str], num_threads: int) -> np.ndarray:
        values = np.empty((len(columns), len(pairs)))
        for place, pair in enumerate(pairs):  # in one thread: two cannot load models at the same time
            outputs = [self._run(pair.plan, source, pair.task) for source in (pair.left, pair.right)]
            matrices = self._weight_signals(pair.plan, pair.left, pair.right)
            matrices = matrices | output_matrices(outputs, self._catalogue.base is not None)
            values[:, place] = [matrix_entry(matrices, column, 0, 1) for column in columns]
        return values

    def _merge(self, plan: MergePlan) -> dict[Source, tuple[Tensors, Any]]:
        """Tensors and model of every intermediate."""
        like = self._catalogue.ref(plan.members[0])
        merges = zip(plan_results(plan)[:-1], merged_steps(plan, self._catalogue, self._dtype), strict=False)
        return {source: (tensors, model_of(tensors, like, plan.label)) for source, tensors in merges}

    def _run_probes(self, plan: MergePlan, source: Source, task: str) -> TaskOutputs:
        if isinstance(source, str):
            return self._outputs(source, task)
        return run_probes(self._merges(plan)[source][1], self._catalogue.ref(plan.members[0]), self._tokens[task])

    def _compare_weights(self, plan: MergePlan, left: Source, right: Source) -> dict[str, np.ndarray]:
        with opened_blocks(self._catalogue.all_refs) as blocks:
            names = next(iter(self._weights.values()))
            sums = {name: self._tensor_sums(plan, name, (left, right), blocks) for name in names}
        return weight_matrices(sums, self._catalogue.base is not None)

    def _tensor_sums(
        self, plan: MergePlan, name: str, pair: tuple[Source, Source], blocks: Mapping[str, TensorBlocks]
    ) -> WeightSums:
        base, size = self._catalogue.base, next(iter(blocks.values())).num_elements(name)
        spans = [(start, min(start + BLOCK_ELEMENTS, size)) for start in range(0, size, BLOCK_ELEMENTS)]

        def values(source: Source) -> np.ndarray:
            if isinstance(source, str):
                return np.concatenate([blocks[source].read(name, *span) for span in spans])
            return self._merges(plan)[source][0][name].reshape(-1).numpy()

        def threshold(source: Source, vector: np.ndarray) -> float:
            if isinstance(source, str):
                return trim_threshold(self._weights[source][name])
            return math.inf if base is None else kth_largest(vector, TRIM_DENSITY)

        if base is not None:
            centre = values(base.id)
        else:
            total = sum((values(one) for one in blocks), start=np.zeros(size))
            centre = (total / len(blocks)).astype(np.float32)
        vectors = np.stack([values(source) - centre for source in pair])
        thresholds = np.array([threshold(*one) for one in zip(pair, vectors, strict=True)])
        return sums_in_blocks(lambda start, stop: (vectors[:, start:stop], centre[start:stop]), size, thresholds)
