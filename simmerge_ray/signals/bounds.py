"""What a run needs, estimated before it starts: memory of a worker, disk for the signatures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # it imports torch, which an estimate needs not
    from simmerge_ray.signals.candidates.answers import AnswerSpec

_HEADER_BYTES = 512  # of a small file of a signature
FIRST_POINTS, _FIRST_BYTES = 256, 300_000_000  # of all that is computed at once where a table is appended to
BLOCK_VALUES = 1 << 22  # elements of a block of logits over all checkpoints, when pairs are computed


def stages_for(ref: CheckpointRef, spec: SignatureSpec, memory_gb: float | None) -> list[LayerRange] | None:
    """How a checkpoint is cut to fit `memory_gb`; None where it is run whole.

    Raises:
        ConfigError: not even one layer fits.
    """
    if memory_gb is None:
        return None
    stages = plan_stages(ref, int(memory_gb * 1e9), working_bytes(ref, spec))
    return stages if len(stages) > 1 else None


def bounds(
    catalogue: Catalogue,
    spec: SignatureSpec,
    num_batches: Sequence[int],
    memory_gb: float | None,
    weights: str = "exact",
) -> list[str]:
    """For people: memory of a worker and the driver, and disk for the signatures, of a run.

    num_batches: micro-batches of each task. Raises ConfigError where `memory_gb` is too small.
    """
    ref, num_checkpoints = catalogue.checkpoints[0], len(catalogue.all_refs)
    stages, width = stages_for(ref, spec, memory_gb), spec.max_tokens + NUM_GREEDY_TOKENS
    sample, signature = (signature_bytes(ref, spec, count) for count in (0, len(num_batches)))
    one_task = (signature - sample) // max(1, len(num_batches))
    together = num_checkpoints
    if catalogue.base is not None and weights == "sampled":
        together = min(together, first_points(signature))  # the others are appended
    how = "whole"
    if stages:
        # Hidden states between stages that wait in the driver at a time.
        boundary = 4 * sum(num_batches) * spec.batch_size * width * model_shape(read_config(ref)).hidden_size
        how = f"in {len(stages)} stages of layers, {_size(boundary)} between them"
    worker = held_bytes(ref, spec, memory_gb)
    return [
        f"memory of a worker: at most {_size(worker)} above the libraries, a checkpoint at a time, {how}",
        f"memory of the driver: at most {_size(driver_bytes(together, one_task + sample))}",
        f"signatures: {_size(signature)} a checkpoint, at most {_size(signature * num_checkpoints)} on disk",
    ]


def signature_bytes(ref: CheckpointRef, spec: SignatureSpec, num_tasks: int) -> int:
    """Of one checkpoint, at most: its sample of weights, and its outputs on so many tasks."""
    sample = weights_bytes(spec, [math.prod(one.shape) for one in read_headers(ref).values()])
    return num_tasks * outputs_bytes(spec, read_config(ref), spec.max_tokens + NUM_GREEDY_TOKENS) + sample


def first_points(num_bytes: int) -> int:
    """Of a table that is appended to, how many signatures of so many bytes are computed at once, at first."""
    return max(2, min(FIRST_POINTS, _FIRST_BYTES // num_bytes))


def answer_bounds(num_answers: Sequence[int], num_checkpoints: int, vocabulary: int, spec: AnswerSpec) -> str:
    """For people: disk for the answers in signatures.

    Args:
        num_answers: of each owner. num_checkpoints: that are run over them.
    """
    kept = min(spec.num_kept, vocabulary)
    positions = sum(num_answers) * spec.max_tokens
    # Of a position the kept tokens with their log-probabilities at every checkpoint, and once the owner's own choice.
    size = positions * (num_checkpoints * 4 * (kept + 1) + 20 * kept + 16)
    size += _HEADER_BYTES * len(num_answers) * (num_checkpoints + 2)
    return f"answers: {len(num_answers)} checkpoints' own, at most {_size(size)} on disk"


def held_bytes(ref: CheckpointRef, spec: SignatureSpec, memory_gb: float | None) -> int:
    """Weights and activations of one worker, above the libraries, at most."""
    if memory_gb is not None and stages_for(ref, spec, memory_gb):
        return int(memory_gb * 1e9)
    return model_bytes(read_headers(ref)) + working_bytes(ref, spec)


def driver_bytes(num_checkpoints: int, signature_bytes: int) -> int:
    """Memory of what joins the signatures, weight samples included, of one task."""
    # An object is bytes before it becomes arrays, and the heap keeps what small arrays leave: measured is a little
    # less than twice their size. A pair's logits are float64 in blocks.
    return 2 * (num_checkpoints + 1) * signature_bytes + 6 * 8 * BLOCK_VALUES


def working_bytes(ref: CheckpointRef, spec: SignatureSpec) -> int:
    """What a worker needs beside the weights, at most."""
    positions = spec.num_positions + math.ceil(spec.num_positions / GREEDY_SHARE)
    return activation_bytes(read_config(ref), spec.batch_size, spec.max_tokens + NUM_GREEDY_TOKENS, positions)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
