"""`python -m simmerge_ray.merging.compile_loops`: compile what merges call, so that no merge waits for the compiler.

Set-up runs it. It merges made-up checkpoints of a few kilobytes by every operator that works block by block, from and
to each dtype, so nothing has to be listed here when a loop is added.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from simmerge_ray.merging.request import read_request
from simmerge_ray.merging.write.output import WriteOptions

_DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
_MODELS = ("left", "right", "third")
_BY_BASE = {"base_model": "base", "parameters": {"normalize": True}}
_RECIPES: tuple[tuple[str, int, dict[str, Any], dict[str, Any]], ...] = (  # operator, models, of each model, whole
    ("linear", 2, {"weight": 0.5}, {}),
    ("linear", 3, {"weight": 0.3}, {}),
    ("task_arithmetic", 2, {"weight": 0.5}, {"base_model": "base"}),
    ("slerp", 2, {}, {"base_model": "left", "parameters": {"t": 0.5}}),
    ("nuslerp", 2, {"weight": 0.5}, {"base_model": "base"}),
    ("ties", 2, {"weight": 0.5, "density": 0.4}, _BY_BASE),
    ("ties", 3, {"weight": 0.5, "density": 0.4}, _BY_BASE),
)


def _write_checkpoint(directory: Path, dtype: str, seed: int) -> None:
    name, size = _DTYPES[dtype]
    shape = (65, 33)
    values = np.random.default_rng(seed).normal(0.0, 0.02, shape).astype(np.float16 if dtype == "F16" else np.float32)
    data = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes() if dtype == "BF16" else values.tobytes()
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size * values.size]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": name}
    (directory / "config.json").write_text(json.dumps(config))


def compile_loops() -> None:
    """Merge made-up checkpoints in a directory that is removed."""
    with TemporaryDirectory() as name:
        for dtype, (word, _) in _DTYPES.items():
            root = Path(name) / dtype
            for seed, model in enumerate(("base", *_MODELS)):
                _write_checkpoint(root / model, dtype, seed)
            for number, (operator, num_models, of_each, whole) in enumerate(_RECIPES):
                models = [{"model": model, "parameters": of_each} for model in _MODELS[:num_models]]
                recipe = root / f"{number}.yml"
                recipe.write_text(json.dumps({"merge_method": operator, "models": models, "dtype": word, **whole}))
                read_request(recipe, root / f"merged-{number}").write(WriteOptions(num_threads=1))


if __name__ == "__main__":
    compile_loops()
