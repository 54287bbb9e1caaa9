"""What a tensor is for, from its Hugging Face name."""

from __future__ import annotations

import re

TENSOR_KINDS = ("attention", "mlp", "embedding", "norm", "other")
_PATTERNS = (
    ("embedding", r"embed|wte|wpe|lm_head"),
    ("norm", r"norm|ln_|layernorm"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|feed_forward|ffn|fc"),
)


def tensor_kind(name: str) -> str:
    """attention, mlp, embedding, norm or other, from a Hugging Face tensor name."""
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name)), "other")
