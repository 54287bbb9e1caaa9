"""Slow float64 versions of the formulas, one pair and one element at a time, written from the papers' equations."""

from __future__ import annotations

import math

import numpy as np


def kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """sum_v p(v) (log p(v) - log q(v)) of two (V,) log-probability vectors."""
    return float(sum(math.exp(a) * (a - b) for a, b in zip(log_p.tolist(), log_q.tolist(), strict=True)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def linear(base, left, right, weight=0.5):
    return (1 - weight) * left + weight * right


def slerp(base, left, right, weight=0.5, threshold=0.9995):
    norms = max(np.linalg.norm(left), 1e-8) * max(np.linalg.norm(right), 1e-8)
    c = min(1.0, max(-1.0, float(left.ravel() @ right.ravel()) / norms))
    if abs(c) > threshold or abs(c) == 1.0:
        return linear(base, left, right, weight)
    angle = math.acos(c)
    return (math.sin((1 - weight) * angle) * left + math.sin(weight * angle) * right) / math.sin(angle)


def nuslerp(base, left, right, weight=0.5):
    if base is None:
        return slerp(None, left, right, weight, threshold=1 - 5e-17)
    return base + slerp(None, left - base, right - base, weight, threshold=1 - 5e-17)


def task_arithmetic(base, left, right, weight=0.5, scale=1.0):
    return base + scale * 2 * ((1 - weight) * (left - base) + weight * (right - base))


def trimmed(vector: np.ndarray, density: float) -> np.ndarray:
    """Keep the max(1, int(density n)) largest magnitudes, earlier entries first among equals."""
    flat = vector.ravel()
    keep = min(flat.size, max(1, int(density * flat.size)))
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))[:keep]
    result = np.zeros_like(flat)
    for index in order:
        result[index] = flat[index]
    return result.reshape(vector.shape)


def ties(base, left, right, weight=0.5, density=0.5, scale=1.0):
    vectors = [trimmed(left - base, density).ravel(), trimmed(right - base, density).ravel()]
    weights = [1 - weight, weight]
    merged = np.zeros(base.size)
    for entry in range(base.size):
        values = [w * v[entry] for w, v in zip(weights, vectors, strict=True)]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [(w, v) for w, v in zip(weights, values, strict=True) if v * sign > 0]
        if agreeing:
            merged[entry] = sum(v for _, v in agreeing) / sum(w for w, _ in agreeing)
    return base + scale * merged.reshape(base.shape)


OPERATORS = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
}
