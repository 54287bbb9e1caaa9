"""What a run needs, estimated before it starts: memory of a worker, disk for the signatures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.checkpoints.size import model_shape
from simmerge_ray.signals.signature import (
    GREEDY_SHARE,
    NUM_GREEDY_TOKENS,
    SignatureSpec,
    outputs_bytes,
    weights_bytes,
)
from simmerge_ray.signals.stages import LayerRange, activation_bytes, model_bytes, plan_stages

BLOCK_VALUES = 1 << 22  # elements of a block of logits over all checkpoints, when pairs are computed


@dataclass(frozen=True)
class Bounds:
    """Bytes. worker: weights and activations of one worker, above the libraries. signature: one checkpoint, all tasks.

    driver: what joins the signatures, a task at a time.
    stages: how often a checkpoint is cut; 1 when it is run whole. boundary: hidden states between stages that wait in
    the driver at a time.
    """

    worker: int
    driver: int
    signature: int
    num_checkpoints: int
    stages: int
    boundary: int

    def lines(self) -> list[str]:
        """For people."""
        how = "whole" if self.stages == 1 else f"in {self.stages} stages of layers, {_size(self.boundary)} between them"
        return [
            f"memory of a worker: at most {_size(self.worker)} above the libraries, a checkpoint at a time, {how}",
            f"memory of the driver: at most {_size(self.driver)}",
            f"signatures: {_size(self.signature)} a checkpoint, "
            f"at most {_size(self.signature * self.num_checkpoints)} on disk",
        ]


def stages_for(ref: CheckpointRef, spec: SignatureSpec, memory_gb: float | None) -> list[LayerRange] | None:
    """How a checkpoint is cut to fit `memory_gb`; None where it is run whole.

    Raises:
        ConfigError: not even one layer fits.
    """
    if memory_gb is None:
        return None
    activations = working_bytes(ref, spec)
    stages = plan_stages(ref, int(memory_gb * 1e9), activations)
    return stages if len(stages) > 1 else None


def bounds(catalogue: Catalogue, spec: SignatureSpec, num_batches: Sequence[int], memory_gb: float | None) -> Bounds:
    """Bounds of a run.

    Args:
        num_batches: micro-batches of each task.

    Raises:
        ConfigError: `memory_gb` is too small.
    """
    ref = catalogue.checkpoints[0]
    specs, config = read_headers(ref), read_config(ref)
    stages = stages_for(ref, spec, memory_gb)
    sizes = [math.prod(one.shape) for one in specs.values()]
    width = spec.max_tokens + NUM_GREEDY_TOKENS
    one_task, sample = outputs_bytes(spec, config, width), weights_bytes(spec, sizes)
    return Bounds(
        worker=int(memory_gb * 1e9) if stages and memory_gb else model_bytes(specs) + working_bytes(ref, spec),
        driver=driver_bytes(len(catalogue.all_refs), one_task + sample),
        signature=len(num_batches) * one_task + sample,
        num_checkpoints=len(catalogue.all_refs),
        stages=len(stages) if stages else 1,
        boundary=4 * sum(num_batches) * spec.batch_size * width * model_shape(config).hidden_size,
    )


def driver_bytes(num_checkpoints: int, signature_bytes: int) -> int:
    """Memory of what joins the signatures of one task.

    Args:
        signature_bytes: of one checkpoint on one task, its weight sample included.
    """
    # An object is bytes before it becomes arrays, and the heap keeps what small arrays leave: measured is a little
    # less than twice their size. A pair's logits are float64 in blocks.
    return 2 * (num_checkpoints + 1) * signature_bytes + 6 * 8 * BLOCK_VALUES


def working_bytes(ref: CheckpointRef, spec: SignatureSpec) -> int:
    """What a worker needs beside the weights, at most."""
    positions = spec.num_positions + math.ceil(spec.num_positions / GREEDY_SHARE)
    return activation_bytes(read_config(ref), spec.batch_size, spec.max_tokens + NUM_GREEDY_TOKENS, positions)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
