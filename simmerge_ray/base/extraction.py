"""Options of `simmerge extract-lora`."""

from __future__ import annotations

from typing import Literal

from simmerge_ray.base.config import FrozenConfig, option


class ExtractConfig(FrozenConfig):
    """The low-rank part of a fine-tune, as an adapter."""

    rank: int = option(16, "of every matrix; at most what its shape allows", ge=1)
    alpha: float | None = option(None, "lora_alpha of the adapter; default: the rank (the change is the same)", gt=0)
    target_modules: tuple[str, ...] = option(
        (),
        "last part of the names of matrices to take, e.g. q_proj; repeatable; default: all of the layers",
        flag="target",
    )
    modules_to_save: tuple[str, ...] = option(
        (), "modules that the adapter keeps whole, e.g. embed_tokens, lm_head, norm; repeatable", flag="save-module"
    )
    bias: Literal["none", "all"] = option("none", "all: the adapter keeps every bias whole, as peft's `bias` does")
    embeddings: bool = option(False, "take the low-rank part of the embedding and the output layer, too")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "in which the adapter is stored")
    iterations: int = option(4, "power iterations of the randomised decomposition", ge=0, le=20)
    oversampling: int = option(16, "directions beyond the rank that it looks at", ge=0)
    seed: int = option(0, "of its random directions")
