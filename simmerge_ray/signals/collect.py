"""One forward pass of one checkpoint over one probe micro-batch.

Shapes: T valid tokens of the micro-batch, V vocabulary, L layers, D hidden size, H heads, K key positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simmerge_ray.checkpoints import CheckpointRef
from simmerge_ray.errors import CheckpointError
from simmerge_ray.probes import TokenBatch


@dataclass(frozen=True)
class ProbeOutputs:
    """What one checkpoint does on one micro-batch, valid tokens only, in row-major order of (probe, position).

    log_probs: (T, V) float32, next-token log-probabilities.
    hidden: (L + 1, T, D) float32, the embedding's output first.
    attention: (L, H, T, K) float32, rows sum to 1 over the keys; padded keys are 0.
    has_past: (T,) bool, False at the first position of a probe, whose attention row is 1 for every checkpoint.
    next_token: (T,) int64, the probe's own next token, -1 at its last position.
    """

    log_probs: Tensor
    hidden: Tensor
    attention: Tensor
    has_past: Tensor
    next_token: Tensor


def load_model(ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as a transformers causal language model, eager attention, in evaluation mode.

    Raises:
        CheckpointError: transformers cannot load it, or a weight of it is not finite.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            ref.path, dtype=dtype, attn_implementation="eager", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {ref.id!r}: transformers cannot load it: {error}") from error
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"checkpoint {ref.id!r}: tensor {name} holds NaN or infinity")
    return model.eval()


@torch.no_grad()
def probe_outputs(model: Any, batch: TokenBatch) -> ProbeOutputs:
    """Run a model over a micro-batch; logits are upcast to float32 before the log-softmax."""
    result = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    valid = batch.attention_mask.bool()
    next_token = torch.full_like(batch.input_ids, -1)
    next_token[:, :-1] = torch.where(valid[:, 1:], batch.input_ids[:, 1:], -1)
    position = torch.cumsum(batch.attention_mask, 1) - 1
    keys = batch.attention_mask[:, None, None, :].float()
    # Each (probes, heads, queries, keys) -> (heads, T, keys).
    attention = [(layer.float() * keys).transpose(0, 1)[:, valid] for layer in result.attentions]
    return ProbeOutputs(
        log_probs=torch.log_softmax(result.logits[valid].float(), dim=-1),
        hidden=torch.stack([layer[valid].float() for layer in result.hidden_states]),
        attention=torch.stack(attention),
        has_past=position[valid] > 0,
        next_token=next_token[valid],
    )
