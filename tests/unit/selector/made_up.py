"""Small data sets in which one feature decides the best arm, or nothing does."""

from __future__ import annotations

import numpy as np

from simmerge_ray.headroom import Context
from simmerge_ray.selector.dataset import SelectionDataset

ARMS = ("linear", "nuslerp", "ties")
COLUMNS = ("loss_left", "loss_right", "entropy_left", "entropy_right", "weight_cosine_global", "sign_conflict_global")


def planted(
    num_checkpoints: int = 8, learnable: bool = True, seed: int = 0, num_items: int = 100, num_features: int = 6
) -> SelectionDataset:
    """All pairs on two tasks; the sign of the last feature says whether `linear` or `ties` is the best arm."""
    generator = np.random.default_rng(seed)
    contexts, features, utilities = [], [], []
    names = [f"c{i}" for i in range(num_checkpoints)]
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            x = generator.normal(size=num_features)
            for task in ("s", "t"):
                noise = 0.1 * generator.normal(size=num_features)
                best = (0 if x[-1] > 0 else 2) if learnable else int(generator.integers(3))
                rates = [0.4, 0.5, 0.4]
                rates[best] = 0.75
                arms = {a: (generator.random(num_items) < r).astype(float) for a, r in zip(ARMS, rates, strict=True)}
                parents = [(generator.random(num_items) < rate).astype(float) for rate in (0.9, 0.1)]
                contexts.append(Context(left, right, task, arms, *parents))
                features.append([x + noise, x + noise])
                utilities.append([arms[arm].mean() for arm in ARMS])
    columns = COLUMNS[:num_features]
    return SelectionDataset(tuple(contexts), ARMS, columns, np.array(features), np.array(utilities))
