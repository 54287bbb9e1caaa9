"""Checkpoints of SmolLM2-135M's shape with random weights, a base and two members near it, and probes of random tokens.

This network has no hub; what tuning takes depends on the shape and the number of tokens alone.
"""

from __future__ import annotations

from pathlib import Path

import torch

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef

SMOLLM2_135M = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def make_checkpoints(directory: Path) -> Catalogue:
    """Write base, left and right in float32, if they are not there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = CheckpointRef("base", directory / "base")
    refs = tuple(CheckpointRef(name, directory / name, "base") for name in ("left", "right"))
    if not all((ref.path / "model.safetensors").exists() for ref in (base, *refs)):
        torch.manual_seed(0)
        config = LlamaConfig(**SMOLLM2_135M, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        model = LlamaForCausalLM(config)
        model.save_pretrained(base.path)
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for ref in refs:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(start[name] + 0.003 * torch.randn_like(parameter))
            model.save_pretrained(ref.path)
    return Catalogue(refs, {"left": "first", "right": "second"}, base)


def make_probes(num_probes: int, num_tokens: int, batch_size: int = 16) -> dict[str, list[TokenBatch]]:
    """Micro-batches of both tasks."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, list[TokenBatch]] = {}
    for task in ("first", "second"):
        ids = torch.randint(1, SMOLLM2_135M["vocab_size"], (num_probes, num_tokens), generator=generator)
        found[task] = [TokenBatch(part, torch.ones_like(part)) for part in ids.split(batch_size)]
    return found
