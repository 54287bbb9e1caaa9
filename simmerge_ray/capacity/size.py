"""What a model of a given shape takes in memory: the same formulas as `--dry-run`, without a checkpoint to read."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from simmerge_ray.base.config import FrozenConfig
from simmerge_ray.checkpoints.size import COMPUTE_BYTES
from simmerge_ray.search.estimate import engine_bytes_of
from simmerge_ray.signals.signature import GREEDY_SHARE, NUM_GREEDY_TOKENS, SignatureSpec
from simmerge_ray.signals.stages import LayerRange, activation_bytes

LIBRARIES_BYTES = 1_000_000_000  # of a signal worker, beside weights and activations


class ModelSize(FrozenConfig):
    """A causal language model by its shape.

    memory_per_worker_gb: of a signal worker that runs it in stages of layers.
    """

    name: str
    parameters: float = Field(gt=0)
    layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    heads: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    tied: bool = Field(False, description="one matrix embeds and predicts")
    dtype: str = Field("bfloat16", pattern="^(bfloat16|float32)$")
    tensor_parallel: int = Field(1, gt=0)
    memory_per_worker_gb: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _has_layers(self) -> ModelSize:
        if self.parameters <= self.ends:
            raise ValueError(
                f"{self.parameters:.3g} parameters; the embeddings of this shape alone have {self.ends:.3g}"
            )
        return self

    @property
    def embedding(self) -> int:
        """Elements of the matrix that embeds."""
        return self.vocab_size * self.hidden_size

    @property
    def ends(self) -> int:
        """Elements of the matrices that embed and predict."""
        return self.embedding * (1 if self.tied else 2)

    @property
    def layer(self) -> float:
        """Elements of a layer."""
        return (self.parameters - self.ends) / self.layers

    @property
    def num_bytes(self) -> int:
        """Of a checkpoint."""
        return int(self.parameters) * COMPUTE_BYTES[self.dtype]

    @property
    def engine_bytes(self) -> int:
        """Of an engine that evaluates it, all ranks together."""
        return engine_bytes_of(self.parameters, "vllm", self.dtype)

    @property
    def config(self) -> dict[str, Any]:
        """What its `config.json` says of the shape."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
        }

    @property
    def tensors(self) -> dict[str, int]:
        """Elements by name, as a Llama has them: attention in four equal matrices, norms left out."""
        layer = int(self.layer)
        mlp = min(self.hidden_size * self.intermediate_size, layer // 4)
        sizes = {"embed": self.embedding}
        for index in range(self.layers):
            sizes |= {f"{index}.{name}": (layer - 3 * mlp) // 4 for name in ("q", "k", "v", "o")}
            sizes |= {f"{index}.{name}": mlp for name in ("gate", "up", "down")}
        return sizes if self.tied else sizes | {"head": self.embedding}

    def elements(self, stage: LayerRange) -> int:
        """Of the layers of a stage, with the embeddings or the head where it has them."""
        ends = stage.is_first + stage.is_last - (self.tied and stage.is_first and stage.is_last)
        return int(self.layer) * len(stage.layers) + self.embedding * ends

    @property
    def working_bytes(self) -> int:
        """What a signal worker needs beside the weights, above the libraries (`signals.bounds.working_bytes`)."""
        spec = SignatureSpec()
        positions = spec.num_positions + -(-spec.num_positions // GREEDY_SHARE)
        return activation_bytes(self.config, spec.batch_size, spec.max_tokens + NUM_GREEDY_TOKENS, positions)

    @property
    def signal_worker_bytes(self) -> int:
        """Of a worker that computes its signals, in float32."""
        if self.memory_per_worker_gb is not None:
            return int(self.memory_per_worker_gb * 1e9)
        return int(4 * self.parameters) + self.working_bytes + LIBRARIES_BYTES


# Shapes of well-known models, for a number of parameters and nothing else.
SHAPES = (
    ModelSize(name="SmolLM2-135M", parameters=134.5e6, layers=30, hidden_size=576, heads=9, intermediate_size=1536,
              vocab_size=49152, tied=True),
    ModelSize(name="Llama-3.2-1B", parameters=1.236e9, layers=16, hidden_size=2048, heads=32, intermediate_size=8192,
              vocab_size=128256, tied=True),
    ModelSize(name="Qwen2.5-7B", parameters=7.616e9, layers=28, hidden_size=3584, heads=28, intermediate_size=18944,
              vocab_size=152064),
    ModelSize(name="Llama-3.1-70B", parameters=70.55e9, layers=80, hidden_size=8192, heads=64, intermediate_size=28672,
              vocab_size=128256),
    ModelSize(name="Command A", parameters=111.06e9, layers=64, hidden_size=12288, heads=96, intermediate_size=36864,
              vocab_size=256000, tied=True),
)  # fmt: skip


def size_of(parameters: float) -> ModelSize:
    """A model with so many parameters, with the shape of the known one that is nearest in size.

    Between known sizes the width is theirs and the number of layers is scaled. Raises ValueError: fewer parameters than
    the embeddings of the smallest known shape have."""
    near = min(SHAPES, key=lambda one: abs(math.log(one.parameters / parameters)))
    layers = max(1, round((parameters - near.ends) / near.layer))
    return ModelSize.model_validate(near.model_dump() | {"parameters": parameters, "layers": layers})
