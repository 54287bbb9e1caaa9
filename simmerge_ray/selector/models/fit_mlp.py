"""Fit ensembles of networks, as many as there are at once. Seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.selector.data.splits import rows_by_pair
from simmerge_ray.selector.data.targets import TrainingSet
from simmerge_ray.selector.models.predictors import MlpPredictor, Network

Job = tuple[TrainingSet, int]  # and which member of its ensemble
# The contrast chooses the arm and is small beside the level: with equal weight the level takes the network.
_CONTRAST_WEIGHT = 4.0
_MAX_ELEMENTS = 1 << 23  # of a batch of inputs, float32: 32 MB


def fit_mlps(sets: Sequence[TrainingSet], config: TrainConfig) -> list[MlpPredictor]:
    """One ensemble per training set, by full-batch AdamW on the squared errors of level and contrasts.

    Members differ by their initial weights and by a bootstrap of the pairs (all tasks and both orders of a pair stay
    together). The networks of all sets are trained side by side, in batches that bound the memory.

    A reward of a single arm is one observation, a context one for each of its H heads: beside the contexts, the squared
    error of its utility counts 1/H of one.
    """
    count = config.num_members
    jobs = [(one, member) for one in sets for member in range(count)]
    largest = max(one.inputs.size + (one.rewards.inputs.size if one.rewards else 0) for one in sets)
    size = max(1, _MAX_ELEMENTS // max(largest, 1))
    networks: list[Network] = []
    for start in range(0, len(jobs), size):
        networks += _fit_networks(jobs[start : start + size], config)
    return [MlpPredictor(tuple(networks[i : i + count])) for i in range(0, len(jobs), count)]


def _drawn_counts(one: TrainingSet, config: TrainConfig, member: int) -> np.ndarray:
    """(N,): how often each context counts for a member."""
    groups = [rows for _, rows in sorted(rows_by_pair(one.pairs).items())]
    drawn = np.random.default_rng([config.seed, member]).integers(len(groups), size=len(groups))
    return np.bincount([row for choice in drawn for row in groups[choice]], minlength=len(one.level))


def _drawn_rewards(one: TrainingSet, config: TrainConfig, member: int) -> np.ndarray:
    """(G,): how often each reward counts for a member."""
    if one.rewards is None:
        return np.zeros(0, dtype=np.int64)
    return one.rewards.drawn_counts(np.random.default_rng([config.seed, member, 1]))


@dataclass(frozen=True)
class _Rewards:
    """Rewards of J networks: inputs (J, 2 G T, D), orders first; shares (J, 1, G, T), chosen (J, 1, G, 1, H), one-hot;
    utility and weights (J, 1, G)."""

    inputs: torch.Tensor
    shares: torch.Tensor
    chosen: torch.Tensor
    utility: torch.Tensor
    weights: torch.Tensor

    def loss(self, utilities: torch.Tensor) -> torch.Tensor:
        """Of (J, 2 G T, H) predicted utilities."""
        num_jobs, _, num_rewards, num_tasks = self.shares.shape
        of_task = utilities.view(num_jobs, 2, num_rewards, num_tasks, -1)
        predicted = ((of_task * self.chosen).sum(-1) * self.shares).sum(-1)
        return (self.weights * (predicted - self.utility).square()).sum()


def _stacked_rewards(jobs: Sequence[Job], config: TrainConfig) -> _Rewards | None:
    """None where no network has any; those that have fewer than others are filled with weight 0."""
    sizes = [one.rewards.inputs.shape for one, _ in jobs if one.rewards is not None]
    if not sizes:
        return None
    num, tasks, dim = max(size[0] for size in sizes), max(size[2] for size in sizes), sizes[0][3]
    num_heads = jobs[0][0].num_heads
    shapes = ((2, num, tasks, dim), (1, num, tasks), (1, num, 1, num_heads), (1, num), (1, num))
    arrays = [np.zeros((len(jobs), *shape), dtype=np.float32) for shape in shapes]
    inputs, shares, chosen, utility, weights = arrays
    for index, (one, member) in enumerate(jobs):
        if one.rewards is not None:
            count = _drawn_rewards(one, config, member)
            total = _drawn_counts(one, config, member).sum() + count.sum() / num_heads
            rewards, held, of = one.rewards, len(count), one.rewards.inputs.shape[2]
            inputs[index, :, :held, :of] = rewards.inputs.transpose(1, 0, 2, 3)
            shares[index, 0, :held, :of] = rewards.shares
            chosen[index, 0, np.arange(held), 0, rewards.heads] = 1.0
            utility[index, 0, :held] = rewards.utility
            weights[index, 0, :held] = count / num_heads / total / 2
    tensors = [torch.from_numpy(array) for array in arrays]
    return _Rewards(tensors[0].reshape(len(jobs), -1, dim), *tensors[1:])


def _stacked(jobs: Sequence[Job], config: TrainConfig) -> tuple[torch.Tensor, ...]:
    """Inputs (J, R, D), levels (J, R, 1), contrasts (J, R, H), known (J, R, H) and weights (J, R, 1) of J networks.

    A row is a context in one order of its pair. Only what was drawn enters; shorter ones are filled with weight 0.
    """
    counts = [_drawn_counts(one, config, member) for one, member in jobs]
    orders = jobs[0][0].inputs.shape[1]
    length = orders * max(int((count > 0).sum()) for count in counts)
    dim, num_heads = jobs[0][0].inputs.shape[-1], jobs[0][0].num_heads
    sizes = (dim, 1, num_heads, num_heads, 1)
    arrays = [np.zeros((len(jobs), length, size), dtype=np.float32) for size in sizes]
    for index, ((one, member), count) in enumerate(zip(jobs, counts, strict=True)):
        rows = np.flatnonzero(count)
        total = count.sum() + _drawn_rewards(one, config, member).sum() / num_heads
        contrasts = one.contrasts[rows].reshape(-1, num_heads)
        known = ~np.isnan(contrasts)
        values = (
            one.inputs[rows].reshape(-1, dim),
            np.repeat(one.level[rows], orders)[:, None],
            np.where(known, contrasts, 0.0),
            known,
            np.repeat(count[rows] / total / orders, orders)[:, None],
        )
        for array, value in zip(arrays, values, strict=True):
            array[index, : orders * len(rows)] = value
    return tuple(torch.from_numpy(array) for array in arrays)


def _fit_networks(jobs: Sequence[Job], config: TrainConfig) -> list[Network]:
    x, level, contrasts, known, weights = _stacked(jobs, config)
    rewards = _stacked_rewards(jobs, config)
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
    mean = (weights * level).sum(1, keepdim=True)
    biases[-2] += mean if rewards is None else mean / weights.sum(1, keepdim=True)
    parameters = [p.requires_grad_() for p in (*matrices, *biases)]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_epochs)

    def predict(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = inputs
        for matrix, bias in zip(matrices[:-2], biases[:-2], strict=True):
            z = torch.relu(torch.baddbmm(bias, z, matrix))
        predicted = torch.baddbmm(biases[-1], z, matrices[-1])
        centred = predicted - predicted[..., reference].mean(-1, keepdim=True)
        return torch.baddbmm(biases[-2], z, matrices[-2]), centred

    for _ in range(config.num_epochs):
        predicted_level, predicted = predict(x)
        errors = (predicted_level - level).square()
        errors = errors + _CONTRAST_WEIGHT * (known * (predicted - contrasts).square()).mean(-1, keepdim=True)
        loss = (weights * errors).sum()
        if rewards is not None:
            rewarded_level, rewarded = predict(rewards.inputs)
            loss = loss + rewards.loss(rewarded_level + rewarded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    weight_arrays, bias_arrays = ([one.detach().double().numpy() for one in part] for part in (matrices, biases))
    fitted = []
    for index in range(len(jobs)):
        layers = [(matrix[index], bias[index, 0]) for matrix, bias in zip(weight_arrays, bias_arrays, strict=True)]
        *encoder, level_head, (matrix, bias) = layers
        centred = matrix - matrix[:, reference].mean(1, keepdims=True), bias - bias[reference].mean()
        fitted.append(Network(tuple(encoder), level_head, centred))
    return fitted
