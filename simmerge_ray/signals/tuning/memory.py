"""Memory of a tuning, stated before it starts, and what keeps activations small: layers are computed twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.checkpoints.adapters import LoraAdapter
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.checkpoints.size import ModelShape, model_shape

LOSS_POSITIONS = 32  # whose logits the objective takes at a time
_TOKENS = 2048  # of a micro-batch: small models take as many rows as fill a core, large ones fewer
_LOGITS = 52_000_000  # bytes of a micro-batch
_MOST_ACTIVATIONS = 256_000_000  # bytes; beyond, layers keep their inputs only


def stated_bytes(catalogue: Catalogue, batches: Mapping[str, Sequence[TokenBatch]], config: TuneConfig) -> int:
    """Memory of a tuning, float32: model, base and a task vector of every member (a LoRA member of the base has small
    factors instead), the largest tensor's gradient, and the activations of the largest micro-batch.

    Near the end of the backward pass the largest tensor may need room twice (tied embeddings); the activations are
    gone then.
    """
    assert catalogue.base is not None, "checked by the caller"
    sizes = [int(np.prod(spec.shape)) for spec in read_headers(catalogue.base).values()]
    dense = sum(not is_low_rank(ref, catalogue.base) for ref in catalogue.checkpoints)
    shape = model_shape(read_config(catalogue.base))
    largest = _largest(catalogue.base, batches, config)
    return tuning_bytes(sum(sizes), max(sizes), dense, shape, largest, config.max_tokens)


def tuning_bytes(
    num_elements: float, largest: int, dense: int, shape: ModelShape, batch: tuple[int, int], answer_tokens: int
) -> int:
    """`stated_bytes` of a model of a shape.

    Args:
        num_elements: of the model. largest: of its largest tensor. dense: members that are no adapters of the base.
        batch: rows and tokens of a row, answer included, of the largest micro-batch.
    """
    layers = _layers_bytes(shape, *batch, recomputed=are_recomputed(shape, batch))
    activations = layers + _logits_bytes(shape, batch[0] * answer_tokens)
    return int(4 * num_elements * (2 + dense)) + 4 * largest + max(4 * largest, activations)


def are_recomputed(shape: ModelShape, batch: tuple[int, int]) -> bool:
    """Whether the activations of all layers are so large that layers keep their inputs only. batch: its rows and their
    tokens."""
    return _layers_bytes(shape, *batch) > _MOST_ACTIVATIONS


def recomputes(base: CheckpointRef, batches: Mapping[str, Sequence[TokenBatch]], config: TuneConfig) -> bool:
    """`are_recomputed` of the largest micro-batch."""
    return are_recomputed(model_shape(read_config(base)), _largest(base, batches, config))


def rows_at_once(base: CheckpointRef, width: int, max_tokens: int) -> int:
    """Rows of a micro-batch of probes with answers, `width` tokens together."""
    return rows_of(model_shape(read_config(base)), width, max_tokens)


def rows_of(shape: ModelShape, width: int, max_tokens: int) -> int:
    """`rows_at_once` of a model of a shape."""
    return max(1, min(_TOKENS // width, _LOGITS // (4 * max_tokens * shape.vocab_size)))


def recompute_layers(model: Any) -> None:
    """Let every decoder layer keep its inputs only, and run again in the backward pass (gradient checkpointing)."""
    from torch.utils.checkpoint import checkpoint

    from simmerge_ray.signals.collect import decoder_layers

    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def is_low_rank(ref: CheckpointRef, base: CheckpointRef) -> bool:
    """Whether a member is an adapter of the base, whose task vectors are kept as factors."""
    if ref.adapter is None or str(ref.path) != str(base.path) or base.adapter is not None:
        return False
    return LoraAdapter(ref, read_headers(ref)).is_low_rank


def _largest(base: CheckpointRef, batches: Mapping[str, Sequence[TokenBatch]], config: TuneConfig) -> tuple[int, int]:
    """(rows, tokens of a row with its answer) of the largest micro-batch."""
    shapes = []
    for of_task in batches.values():
        width = max(batch.input_ids.shape[1] for batch in of_task) + config.max_tokens
        num_probes = sum(len(batch.input_ids) for batch in of_task)
        shapes.append((min(num_probes, rows_at_once(base, width, config.max_tokens)), width))
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def _layers_bytes(shape: ModelShape, rows: int, width: int, recomputed: bool = False) -> int:
    """What the layers keep for the backward pass; with `recomputed` inputs, and one layer with its gradients."""
    tokens = rows * width
    heads = shape.heads * shape.head_size
    layer = tokens * (10 * shape.hidden_size + 6 * heads + 5 * shape.intermediate_size + 4 * shape.heads * width)
    if recomputed:
        return 4 * (shape.layers * tokens * shape.hidden_size + 2 * layer)
    return 4 * shape.layers * layer


def _logits_bytes(shape: ModelShape, positions: int) -> int:
    """Logits, their gradient and its parts, and what the objective makes of a few positions."""
    return 4 * shape.vocab_size * (3 * positions + 6 * min(positions, LOSS_POSITIONS))
