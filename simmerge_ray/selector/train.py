"""Fit the selector's ensemble. Seeded; a few hundred contexts take seconds on one core."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from simmerge_ray.config import TrainConfig
from simmerge_ray.errors import LabelError
from simmerge_ray.selector.baselines import best_fixed_arm
from simmerge_ray.selector.dataset import SelectionDataset
from simmerge_ray.selector.model import Network, Selector
from simmerge_ray.storage import digest_bytes

MIN_CONTEXTS = 8


def train_selector(dataset: SelectionDataset, config: TrainConfig) -> Selector:
    """Fit an ensemble on the contexts of a dataset.

    Every context enters with both orders of its pair, so nothing depends on which checkpoint is called left. Members
    differ by their initial weights and by a bootstrap of the pairs (both tasks and orders of a pair stay together).

    Raises:
        LabelError: fewer than `MIN_CONTEXTS` contexts, or fewer than two arms.
    """
    num_contexts, num_arms = dataset.utilities.shape
    if num_contexts < MIN_CONTEXTS or num_arms < 2:
        raise LabelError(
            f"{num_contexts} contexts with {num_arms} arms are too few to train on; at least {MIN_CONTEXTS} contexts "
            "and 2 arms are needed: search more pairs"
        )
    flat = dataset.features.reshape(-1, dataset.features.shape[-1])
    centre, scale = flat.mean(0), flat.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    inputs = (dataset.features - centre) / scale
    pairs = sorted({(c.left, c.right) for c in dataset.contexts})
    rows_of = {pair: [i for i, c in enumerate(dataset.contexts) if (c.left, c.right) == pair] for pair in pairs}
    members = []
    for index in range(config.num_members):
        generator = np.random.default_rng([config.seed, index])
        drawn = generator.integers(len(pairs), size=len(pairs))
        rows = [row for choice in drawn for row in rows_of[pairs[choice]]]
        members.append(_fit_member(inputs[rows], dataset.utilities[rows], config, seed=config.seed * 1000 + index))
    provenance: dict[str, Any] = {
        "config": config.model_dump(),
        "num_contexts": num_contexts,
        "num_pairs": len(pairs),
        "tasks": sorted({context.task for context in dataset.contexts}),
        "checkpoints": sorted({name for pair in pairs for name in pair}),
        "pairs": [list(pair) for pair in pairs],
        "data_digest": digest_bytes(dataset.features.tobytes(), dataset.utilities.tobytes()),
    }
    return Selector(dataset.arms, dataset.columns, centre, scale, tuple(members), best_fixed_arm(dataset), provenance)


def _fit_member(inputs: np.ndarray, utilities: np.ndarray, config: TrainConfig, seed: int) -> Network:
    """One network by full-batch AdamW on the squared errors of level and contrasts.

    Args:
        inputs: (N, 2, F) standardised. utilities: (N, K).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = (inputs.shape[-1], *config.hidden_sizes)
        layers = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        encoder = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))
        level, contrast = nn.Linear(sizes[-1], 1), nn.Linear(sizes[-1], utilities.shape[1])
    x = torch.tensor(inputs.reshape(-1, inputs.shape[-1]), dtype=torch.float32)
    u = torch.tensor(np.repeat(utilities, 2, axis=0), dtype=torch.float32)
    mean = u.mean(1, keepdim=True)
    with torch.no_grad():
        level.bias.fill_(float(mean.mean()))
    parameters = [p for module in (encoder, level, contrast) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_epochs)
    for _ in range(config.num_epochs):
        z = encoder(x)
        c = contrast(z)
        # The contrast chooses the arm and is small beside the level: without the factor the level takes the network.
        loss = (level(z) - mean).square().mean() + 4.0 * (c - c.mean(1, keepdim=True) - (u - mean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    def weights(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
        return layer.weight.detach().double().numpy().T.copy(), layer.bias.detach().double().numpy().copy()

    return Network(tuple(weights(layer) for layer in layers), weights(level), weights(contrast))
