"""The worker that runs units, in this process or as an actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.signals.candidates.units import ANSWER_UNITS
from simmerge_ray.signals.collect import BatchOutputs, ProbeModel
from simmerge_ray.signals.pipeline import StageModel, staged_continuation
from simmerge_ray.signals.queue import Unit, UnitFailure
from simmerge_ray.signals.samples import exact_sums, opened_blocks, tensor_sample
from simmerge_ray.signals.signature import TensorSample
from simmerge_ray.signals.weights import WeightSums


class SignalWorker:
    """Runs units over a fixed list of checkpoints; holds one model, or one stage of one, at a time.

    A plain class: `on_ray.signal_actors` makes it an actor.
    """

    def __init__(
        self,
        checkpoints: Sequence[CheckpointRef],
        base: CheckpointRef | None,
        num_threads: int | None = None,
        device: str = "cpu",
    ):
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._checkpoints = tuple(checkpoints)
        self._base = base
        self._refs = {ref.id: ref for ref in (*self._checkpoints, *((base,) if base else ()))}
        self._model = ProbeModel(device=device)
        self._stage = StageModel(device=device)

    def run_unit(self, unit: Unit) -> Any:
        """The unit's result; `UnitFailure` for a checkpoint that cannot be used."""
        try:
            if unit.kind == "sums":
                return self._sums(*unit.payload)
            assert unit.checkpoint is not None
            ref = self._refs[unit.checkpoint]
            if unit.kind == "continuation":
                batch, num_tokens, stages = unit.payload
                if stages is None:
                    return self._model.continuation(ref, batch, num_tokens)
                return staged_continuation(self._stage, ref, stages, batch, num_tokens)
            if unit.kind == "stage":
                return self._stage.run(ref, *unit.payload)
            if unit.kind == "outputs":
                return as_arrays(self._model.outputs(ref, *unit.payload))
            if unit.kind in ANSWER_UNITS:
                return ANSWER_UNITS[unit.kind](self._model, ref, *unit.payload)
            return self._samples(ref, *unit.payload)
        except CheckpointError as error:
            return UnitFailure(str(error))

    def _samples(self, ref: CheckpointRef, names: Sequence[str], count: int) -> dict[str, TensorSample]:
        with opened_blocks(filter(None, {ref, self._base})) as blocks:
            base = blocks[self._base.id] if self._base else None
            return {name: tensor_sample(name, blocks[ref.id], base, count) for name in names}

    def _sums(self, thresholds: Mapping[str, np.ndarray], block: int) -> dict[str, WeightSums]:
        with opened_blocks(self._refs.values(), block) as blocks:
            checkpoints = [blocks[ref.id] for ref in self._checkpoints]
            base = blocks[self._base.id] if self._base else None
            return {name: exact_sums(name, checkpoints, base, low, block) for name, low in thresholds.items()}


def as_arrays(outputs: BatchOutputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, hidden, attention as numpy: pickled without torch's wrapping, and without a copy."""
    return outputs.logits.numpy(), outputs.hidden.numpy(), outputs.attention.numpy()
