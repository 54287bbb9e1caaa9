"""Which layers of a checkpoint a worker holds at a time: stages, the families that run in them, and their memory.

Everything here is found from `config.json` and headers; `signals.pipeline` runs the stages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from simmerge_ray.base.errors import ConfigError, unknown_name
from simmerge_ray.checkpoints.headers import TensorSpec, read_headers
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.checkpoints.size import model_shape
from simmerge_ray.signals.samples import float_tensors_of

FLOAT32_BYTES = 4  # an element of the weights and of what is computed from them


@dataclass(frozen=True)
class LayerRange:
    """Decoder layers [first, last) of `num_layers`; the first stage embeds, the last one predicts."""

    first: int
    last: int
    num_layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= self.num_layers:
            raise ValueError(f"a stage needs 0 <= first < last <= num_layers, got {self}")

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.last == self.num_layers

    @property
    def layers(self) -> range:
        return range(self.first, self.last)


@dataclass(frozen=True)
class Family:
    """Where a causal language model keeps its parts, as dotted paths in it.

    positions: learned positions, which the model adds to whatever it starts from. A scale of the embeddings lies in the
    embedding module, soft-capping of the logits behind the head: each runs with the part that it belongs to.
    """

    embeddings: str = "model.embed_tokens"
    positions: str | None = None
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def prefix(self) -> str:
        """Of the names inside the base model; some files leave it away."""
        return self.layers.split(".")[0] + "."

    @property
    def matrices(self) -> tuple[str, str]:
        """The embedding matrix and the head's; one of them may serve for both."""
        return f"{self.embeddings}.weight", f"{self.head}.weight"


_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "gemma", "gemma2", "gemma3_text")
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(_LLAMA_LIKE, Family()),
    "gpt2": Family("transformer.wte", "transformer.wpe", "transformer.h", "transformer.ln_f"),
}


def family_of(ref: CheckpointRef) -> Family:
    """The row of FAMILIES for a checkpoint.

    Raises:
        CheckpointError: there is none; the message names the known ones and the alternative.
    """
    name = str(read_config(ref).get("model_type"))
    if name not in FAMILIES:
        raise ref.error(
            f"{unknown_name('model family of the layer pipeline', name, FAMILIES)}; run whole models instead: raise "
            f"--memory-per-worker above {model_bytes(read_headers(ref)):,} bytes"
        )
    return FAMILIES[name]


def model_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Memory of the weights of a whole model."""
    return FLOAT32_BYTES * sum(math.prod(specs[name].shape) for name in float_tensors_of(specs))


def plan_stages(ref: CheckpointRef, memory_bytes: int, activation_bytes: int) -> list[LayerRange]:
    """The fewest stages of which each fits a worker, cut so that the largest is as small as it can be.

    Args:
        memory_bytes: of one worker. activation_bytes: what it needs beside the weights (see `activation_bytes`).

    Raises:
        CheckpointError: unreadable, or of a family that is not known.
        ConfigError: a stage of one layer does not fit; the message says how much would do.
    """
    sizes = StageSizes(ref)
    try:
        return cut_stages(sizes.elements, sizes.num_layers, memory_bytes, activation_bytes)
    except ConfigError as error:
        raise ConfigError(f"checkpoint {ref.id!r}: {error}") from None


def cut_stages(
    elements: Callable[[LayerRange], int], count: int, memory_bytes: int, activation_bytes: int
) -> list[LayerRange]:
    """`plan_stages` of a model with `count` layers, from the elements of its stages.

    Raises:
        ConfigError: a stage of one layer does not fit.
    """
    cost = {
        (first, last): activation_bytes + FLOAT32_BYTES * elements(LayerRange(first, last, count))
        for first in range(count)
        for last in range(first + 1, count + 1)
    }
    needed, layer = max((cost[layer, layer + 1], -layer) for layer in range(count))
    if needed > memory_bytes:
        raise ConfigError(
            f"the stage of layer {-layer} alone needs {needed:,} bytes, {activation_bytes:,} of them beside its "
            f"weights, a worker has {memory_bytes:,}; raise --memory-per-worker"
        )
    # best[last]: the smallest largest stage over all ways to cut layers [0, last) into the present number of stages.
    best = {last: cost[0, last] for last in range(1, count + 1)}
    cuts: list[dict[int, int]] = []
    while best[count] > memory_bytes:
        options = {
            last: min((max(best[cut], cost[cut, last]), cut) for cut in range(1, last) if cut in best)
            for last in range(len(cuts) + 2, count + 1)
        }
        cuts.append({last: cut for last, (_, cut) in options.items()})
        best = {last: largest for last, (largest, _) in options.items()}
    bounds = [count]
    for by_last in reversed(cuts):
        bounds.append(by_last[bounds[-1]])
    bounds = [0, *reversed(bounds)]
    return [LayerRange(first, last, count) for first, last in itertools.pairwise(bounds)]


def activation_bytes(config: Mapping[str, Any], batch_size: int, num_tokens: int, num_positions: int) -> int:
    """Upper estimate of what a worker needs beside the weights for one micro-batch, from its `config.json`.

    The larger of one layer's eager attention and its MLP, on top of masks, hidden states, logits and recorded outputs.
    A micro-batch has at most so many rows, tokens of a row with the continuation, and sampled positions.
    """
    shape = model_shape(config)
    tokens = batch_size * num_tokens
    positions = min(tokens, num_positions)
    scores = shape.heads * tokens * num_tokens
    # Scores, masked, probabilities; queries, keys, values, turned, copied.
    attention = 3 * scores + 10 * tokens * shape.heads * shape.head_size
    mlp = 4 * tokens * shape.intermediate_size  # gate, up, activation, product
    states = 8 * tokens * shape.hidden_size  # residual stream and norms; float32 copies of norms and of the boundary
    masks = 4 * tokens * num_tokens  # full and sliding, bool and float
    logits = 4 * positions * shape.vocab_size  # as computed, two steps of soft-capping, the copy that is kept
    kept = positions * ((shape.layers + 1) * shape.hidden_size + shape.layers * shape.heads * num_tokens)
    return FLOAT32_BYTES * (max(attention, mlp) + states + masks + logits + kept)


class StageSizes:
    """Elements of the stages of a checkpoint, by the names in its headers.

    Raises:
        CheckpointError: unreadable, or of a family that is not known.
    """

    def __init__(self, ref: CheckpointRef) -> None:
        family, specs = family_of(ref), read_headers(ref)
        self.num_layers = model_shape(read_config(ref)).layers
        self._layers = [0] * self.num_layers
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        for name in float_tensors_of(specs):
            full = name if name.startswith((family.prefix, f"{family.head}.")) else family.prefix + name
            elements = math.prod(specs[name].shape)
            if full.startswith(f"{family.layers}."):
                layer = full.removeprefix(f"{family.layers}.").split(".")[0]
                if not layer.isdecimal() or int(layer) >= self.num_layers:
                    raise ref.error(f"{name} is of no decoder layer; config.json has {self.num_layers}")
                self._layers[int(layer)] += elements
            elif full.startswith((f"{family.embeddings}.", f"{family.positions}.")):
                self._first[full] = elements
            elif full.startswith((f"{family.norm}.", f"{family.head}.")):
                self._last[full] = elements
        embedding, head = family.matrices
        if embedding not in self._first and head in self._last:
            self._first[head] = self._last[head]
        elif head not in self._last and embedding in self._first:
            self._last[embedding] = self._first[embedding]

    def elements(self, stage: LayerRange) -> int:
        ends = (self._first if stage.is_first else {}) | (self._last if stage.is_last else {})
        return sum(self._layers[stage.first : stage.last]) + sum(ends.values())
