"""The same signals as a user would write them: pair by pair, with transformers and torch, nothing shared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def run(model: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """Per micro-batch: log-probabilities (n, V), hidden states (L + 1, n, D), attention rows by layer (n, H, T)."""
    found = []
    for ids, mask in batches:
        result = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        valid = mask.bool()
        found.append(
            (
                torch.log_softmax(result.logits[valid], -1),
                torch.stack([layer[valid] for layer in result.hidden_states]),
                [layer.transpose(1, 2)[valid] for layer in result.attentions],
            )
        )
    return found


def summary(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "sd": float(values.std()), "min": float(values.min())}


@torch.no_grad()
def pair_signals(left: Path, right: Path, base: Path, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Load three models, run two of them over the probes, compare everything."""
    models = [load(path) for path in (left, right, base)]
    outputs = [run(model, batches) for model in models[:2]]
    cosine = torch.nn.functional.cosine_similarity
    kl, hidden, attention = [], [], []
    for (p, x, a), (q, y, b) in zip(*outputs, strict=True):
        kl.append(torch.stack(((p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1))))
        hidden.append(cosine(x, y, dim=-1))
        attention.append(torch.stack([cosine(u, v, dim=-1).mean(-1) for u, v in zip(a, b, strict=True)]))
    signals: dict[str, Any] = {
        "kl": summary(torch.cat(kl, 1)[0]),
        "kl_quantiles": torch.quantile(torch.cat(kl, 1), torch.tensor([0.1, 0.5, 0.9]), dim=1).tolist(),
        "activation_cosine": summary(torch.cat(hidden, 1)),
        "attention_cosine": summary(torch.cat(attention, 1)),
    }
    per_tensor: dict[str, list[float]] = {}
    for (_, w), (_, v), (_, c) in zip(*(model.named_parameters() for model in models), strict=True):
        a, b, c = w.flatten(), v.flatten(), c.flatten()
        x, y = a - c, b - c
        keep = max(1, int(0.2 * x.numel()))
        tops = [torch.zeros_like(t, dtype=torch.bool).index_fill_(0, t.abs().topk(keep).indices, True) for t in (x, y)]
        values = {
            "weight_cosine": cosine(a, b, dim=0),
            "weight_l2": (a - b).norm() / c.norm(),
            "task_vector_cosine": cosine(x, y, dim=0),
            "task_vector_norm_ratio": (x.norm() / y.norm()).log(),
            "sign_conflict": (x * y < 0).float().mean(),
            "trimmed_overlap": (tops[0] & tops[1]).sum() / keep,
        }
        for name, value in values.items():
            per_tensor.setdefault(name, []).append(float(value))
    return signals | {name: summary(torch.tensor(values)) for name, values in per_tensor.items()}
