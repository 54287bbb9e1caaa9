"""Fit the selector's ensemble. Seeded; a few hundred contexts take seconds on one core."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from simmerge_ray.config import TrainConfig
from simmerge_ray.errors import LabelError
from simmerge_ray.selector.baselines import best_fixed_arm
from simmerge_ray.selector.dataset import SelectionDataset
from simmerge_ray.selector.model import Network, Selector
from simmerge_ray.storage import digest_bytes

MIN_CONTEXTS = 8
# The contrast chooses the arm and is small beside the level: with equal weight the level takes the network.
_CONTRAST_WEIGHT = 4.0


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
    draws = []
    for index in range(config.num_members):
        generator = np.random.default_rng([config.seed, index])
        drawn = generator.integers(len(pairs), size=len(pairs))
        draws.append(np.bincount([row for choice in drawn for row in rows_of[pairs[choice]]], minlength=num_contexts))
    members = _fit_members(inputs, dataset.utilities, np.array(draws, dtype=np.float64), config)
    provenance: dict[str, Any] = {
        "config": config.model_dump(),
        "num_contexts": num_contexts,
        "num_pairs": len(pairs),
        "tasks": sorted({context.task for context in dataset.contexts}),
        "checkpoints": sorted({name for pair in pairs for name in pair}),
        "pairs": [list(pair) for pair in pairs],
        "weights": dataset.weights,
        "data_digest": digest_bytes(dataset.features.tobytes(), dataset.utilities.tobytes()),
    }
    return Selector(dataset.arms, dataset.columns, centre, scale, tuple(members), best_fixed_arm(dataset), provenance)


def _fit_members(inputs: np.ndarray, utilities: np.ndarray, weights: np.ndarray, config: TrainConfig) -> list[Network]:
    """All networks of the ensemble at once, by full-batch AdamW on the squared errors of level and contrasts.

    Args:
        inputs: (N, 2, F) standardised. utilities: (N, K). weights: (E, N), how often each context counts for a member.
    """
    num_members, num_arms = weights.shape[0], utilities.shape[1]
    sizes = (inputs.shape[-1], *config.hidden_sizes)
    shapes = [*zip(sizes[:-1], sizes[1:], strict=True), (sizes[-1], 1), (sizes[-1], num_arms)]
    generator = torch.Generator().manual_seed(config.seed)
    matrices, biases = [], []
    for fan_in, fan_out in shapes:
        bound = fan_in**-0.5
        matrices.append((2 * torch.rand(num_members, fan_in, fan_out, generator=generator) - 1) * bound)
        biases.append(torch.zeros(num_members, 1, fan_out))
    x = torch.tensor(inputs.reshape(-1, inputs.shape[-1]), dtype=torch.float32)
    u = torch.tensor(np.repeat(utilities, 2, axis=0), dtype=torch.float32)
    w = torch.tensor(np.repeat(weights / weights.sum(1, keepdims=True), 2, axis=1) / 2, dtype=torch.float32)[..., None]
    mean = u.mean(1, keepdim=True)
    contrasts = u - mean
    biases[-2] += (w * mean).sum(1, keepdim=True)
    parameters = [p.requires_grad_() for p in (*matrices, *biases)]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_epochs)
    for _ in range(config.num_epochs):
        z = x.expand(num_members, -1, -1)
        for matrix, bias in zip(matrices[:-2], biases[:-2], strict=True):
            z = torch.relu(z @ matrix + bias)
        level = z @ matrices[-2] + biases[-2]
        c = z @ matrices[-1] + biases[-1]
        errors = (level - mean).square() + _CONTRAST_WEIGHT * (c - c.mean(-1, keepdim=True) - contrasts).square().mean(
            -1, keepdim=True
        )
        loss = (w * errors).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    def layer(number: int, member: int) -> tuple[np.ndarray, np.ndarray]:
        matrix, bias = matrices[number][member].detach(), biases[number][member, 0].detach()
        return matrix.double().numpy().copy(), bias.double().numpy().copy()

    return [
        Network(
            tuple(layer(number, member) for number in range(len(shapes) - 2)),
            layer(len(shapes) - 2, member),
            layer(len(shapes) - 1, member),
        )
        for member in range(num_members)
    ]
