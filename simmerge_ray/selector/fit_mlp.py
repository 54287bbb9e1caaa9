"""Fit ensembles of networks, as many as there are at once. Seeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from simmerge_ray.config import TrainConfig
from simmerge_ray.selector.predictors import MlpPredictor, Network
from simmerge_ray.selector.targets import TrainingSet

# The contrast chooses the arm and is small beside the level: with equal weight the level takes the network.
_CONTRAST_WEIGHT = 4.0
_MAX_ELEMENTS = 1 << 23  # of a batch of inputs, float32: 32 MB


def fit_mlps(sets: Sequence[TrainingSet], config: TrainConfig) -> list[MlpPredictor]:
    """One ensemble per training set, by full-batch AdamW on the squared errors of level and contrasts.

    Members differ by their initial weights and by a bootstrap of the pairs (all tasks and both orders of a pair stay
    together). The networks of all sets are trained side by side, in batches that bound the memory.
    """
    jobs = [(one, member) for one in sets for member in range(config.num_members)]
    networks: list[Network] = []
    for batch in _batches(jobs):
        networks += _fit_networks(batch, config)
    count = config.num_members
    return [MlpPredictor(tuple(networks[i * count : (i + 1) * count])) for i in range(len(sets))]


Job = tuple[TrainingSet, int]


def _batches(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    largest = max(one.inputs.size for one, _ in jobs)
    size = max(1, _MAX_ELEMENTS // max(largest, 1))
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _drawn_counts(one: TrainingSet, config: TrainConfig, member: int) -> np.ndarray:
    """(N,): how often each context counts for a member."""
    groups = one.rows_of_pairs()
    drawn = np.random.default_rng([config.seed, member]).integers(len(groups), size=len(groups))
    return np.bincount([row for choice in drawn for row in groups[choice]], minlength=len(one.level))


def _stacked(jobs: Sequence[Job], config: TrainConfig) -> tuple[torch.Tensor, ...]:
    """Inputs (J, R, D), levels (J, R, 1), contrasts (J, R, K), known (J, R, K) and weights (J, R, 1) of J networks.

    A row is a context in one order of its pair. Only what was drawn enters; shorter ones are filled with weight 0.
    """
    counts = [_drawn_counts(one, config, member) for one, member in jobs]
    length = 2 * max(int((count > 0).sum()) for count in counts)
    dim, num_arms = jobs[0][0].inputs.shape[-1], jobs[0][0].contrasts.shape[1]
    sizes = (dim, 1, num_arms, num_arms, 1)
    arrays = [np.zeros((len(jobs), length, size), dtype=np.float32) for size in sizes]
    for index, ((one, _), count) in enumerate(zip(jobs, counts, strict=True)):
        rows = np.flatnonzero(count)
        known = ~np.isnan(one.contrasts[rows])
        values = (
            one.inputs[rows].reshape(-1, dim),
            np.repeat(one.level[rows], 2)[:, None],
            np.repeat(np.where(known, one.contrasts[rows], 0.0), 2, axis=0),
            np.repeat(known, 2, axis=0),
            np.repeat(count[rows] / count.sum() / 2, 2)[:, None],
        )
        for array, value in zip(arrays, values, strict=True):
            array[index, : 2 * len(rows)] = value
    return tuple(torch.from_numpy(array) for array in arrays)


def _fit_networks(jobs: Sequence[Job], config: TrainConfig) -> list[Network]:
    x, level, contrasts, known, weights = _stacked(jobs, config)
    reference = list(jobs[0][0].reference)
    sizes = (x.shape[-1], *config.hidden_sizes)
    shapes = [*zip(sizes[:-1], sizes[1:], strict=True), (sizes[-1], 1), (sizes[-1], contrasts.shape[-1])]
    generator = torch.Generator().manual_seed(config.seed)
    members = [member for _, member in jobs]
    matrices, biases = [], []
    for fan_in, fan_out in shapes:
        # Drawn for one ensemble, so that a network does not depend on what it is trained beside.
        drawn = (2 * torch.rand(config.num_members, fan_in, fan_out, generator=generator) - 1) * fan_in**-0.5
        matrices.append(drawn[members].clone())
        biases.append(torch.zeros(len(jobs), 1, fan_out))
    biases[-2] += (weights * level).sum(1, keepdim=True)
    parameters = [p.requires_grad_() for p in (*matrices, *biases)]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_epochs)
    for _ in range(config.num_epochs):
        z = x
        for matrix, bias in zip(matrices[:-2], biases[:-2], strict=True):
            z = torch.relu(torch.baddbmm(bias, z, matrix))
        predicted = torch.baddbmm(biases[-1], z, matrices[-1])
        predicted = predicted - predicted[..., reference].mean(-1, keepdim=True)
        errors = (torch.baddbmm(biases[-2], z, matrices[-2]) - level).square()
        errors = errors + _CONTRAST_WEIGHT * (known * (predicted - contrasts).square()).mean(-1, keepdim=True)
        loss = (weights * errors).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    def layer(number: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        matrix, bias = matrices[number][index].detach(), biases[number][index, 0].detach()
        return matrix.double().numpy().copy(), bias.double().numpy().copy()

    def network(index: int) -> Network:
        *layers, level_head, (matrix, bias) = [layer(number, index) for number in range(len(shapes))]
        centred = matrix - matrix[:, reference].mean(1, keepdims=True), bias - bias[reference].mean()
        return Network(tuple(layers), level_head, centred)

    return [network(index) for index in range(len(jobs))]
