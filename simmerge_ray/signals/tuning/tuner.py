"""Coefficients `lambda[i, g]` of member i in group g of tensors, by gradient on the members' own answers.

The model's weights are `base + sum_i lambda[i, g] tau_i`. One backward pass a step:
`dL/dlambda[i, g] = sum over tensors W of g of <dL/dW, tau_i>`; the gradient of a tensor is taken by a hook as soon as
it is ready, multiplied with every member's task vector, and freed, so that only one tensor's gradient is in memory.
Objective `sum_i w_i L_i + pull |lambda - start|^2 / n` over the tuning probes, L_i a mean over tokens; the coefficients
that are best on probes held out are kept (few probes are overfitted by many coefficients). Known as AdaMerging
(arXiv:2310.02575), DAM (Differentiable Adaptive Merging, Arcee 2024), Expert Merging (arXiv:2509.25712) and SAMerging
(arXiv:2512.21288); the implementation is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.signals.candidates.answers import AnswerBatch, answer_logits
from simmerge_ray.signals.tuning.memory import LOSS_POSITIONS
from simmerge_ray.signals.tuning.objective import Objective, answer_loss
from simmerge_ray.signals.tuning.vectors import TaskVector


@dataclass(frozen=True)
class TuningBatch:
    """One micro-batch of one member's answers with what the member itself said there.

    kept: (S, K) int64. own: (S, K), own_rest: (S,) log-probabilities of the member. weight: (S,) of each position in
    the objective that it counts for. held_out: (S,) bool, positions that only decide when to stop.
    """

    batch: AnswerBatch
    kept: Tensor
    own: Tensor
    own_rest: Tensor
    weight: Tensor
    held_out: Tensor


@dataclass
class TuneState:
    """What a tuning goes on from: (M, G) float64 arrays, and what each step's objectives were.

    coefficients: those of now. best: those with the lowest held-out objective so far.
    """

    coefficients: np.ndarray
    first_moment: np.ndarray
    second_moment: np.ndarray
    best: np.ndarray
    best_objective: float = math.inf
    best_step: int = 0
    num_steps: int = 0
    objectives: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def start(cls, coefficients: np.ndarray) -> TuneState:
        given = np.array(coefficients, dtype=np.float64)
        return cls(given, np.zeros_like(given), np.zeros_like(given), given.copy())

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, for a file."""
        return {
            "coefficients": self.coefficients,
            "first_moment": self.first_moment,
            "second_moment": self.second_moment,
            "best": self.best,
            "numbers": np.array([self.best_objective, self.best_step, self.num_steps], dtype=np.float64),
            "objectives": np.array(self.objectives, dtype=np.float64).reshape(-1, 2),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TuneState:
        objective, step, num_steps = arrays["numbers"].tolist()
        objectives = [(float(a), float(b)) for a, b in arrays["objectives"]]
        return cls(
            np.array(arrays["coefficients"]),
            np.array(arrays["first_moment"]),
            np.array(arrays["second_moment"]),
            np.array(arrays["best"]),
            float(objective),
            int(step),
            int(num_steps),
            objectives,
        )


class CoefficientModel:
    """A transformers model whose weights are `base + sum_i lambda[i, g] tau_i`, and gradients for lambda.

    Args:
        model: its parameters are overwritten. base: by parameter name. vectors: of each member, by parameter name; a
            tensor that a member does not change is absent. groups: by parameter name.
    """

    def __init__(
        self,
        model: Any,
        base: Mapping[str, Tensor],
        vectors: Sequence[Mapping[str, TaskVector]],
        groups: Mapping[str, str],
    ) -> None:
        self._model, self.base, self.vectors = model, base, vectors
        names = dict.fromkeys(groups[name] for name, _ in model.named_parameters())
        self.group_names = tuple(names)
        self._place = {name: self.group_names.index(groups[name]) for name, _ in model.named_parameters()}
        self._gradient = np.zeros((len(vectors), len(self.group_names)))
        self._coefficients: np.ndarray | None = None
        for name, parameter in model.named_parameters():
            changed = any(name in of_member for of_member in vectors)
            parameter.requires_grad_(changed)
            if changed:
                parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        place = self._place[name]

        def take(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            for member, of_member in enumerate(self.vectors):
                if (vector := of_member.get(name)) is not None:
                    self._gradient[member, place] += vector.dot(gradient)
            parameter.grad = None

        return take

    @torch.no_grad()
    def set(self, coefficients: np.ndarray) -> None:
        """Put the weights of (M, G) coefficients into the model."""
        if self._coefficients is not None and np.array_equal(coefficients, self._coefficients):
            return
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad or self._coefficients is None:
                parameter.copy_(self.base[name])
                for member, of_member in enumerate(self.vectors):
                    if (vector := of_member.get(name)) is not None:
                        vector.add_to(parameter, float(coefficients[member, self._place[name]]))
        self._coefficients = np.array(coefficients)

    def objective(
        self, coefficients: np.ndarray, batches: Sequence[TuningBatch], objective: Objective, gradient: bool
    ) -> tuple[float, float, np.ndarray]:
        """(on the tuning probes, on those held out, gradient (M, G) of the first; zeros where it is not asked for)."""
        self.set(coefficients)
        self._gradient[:] = 0.0
        tuning, held_out = 0.0, 0.0
        for one in batches:
            with torch.set_grad_enabled(gradient and not bool(one.held_out.all())):
                weighted = one.weight * _losses(answer_logits(self._model, one.batch), one, objective)
                of_tuning = weighted[~one.held_out].sum()
            if of_tuning.requires_grad:
                of_tuning.backward()
            tuning += float(of_tuning.detach())
            held_out += float(weighted.detach()[one.held_out].sum())
        return tuning, held_out, self._gradient.copy()


def _losses(logits: Tensor, one: TuningBatch, objective: Objective) -> Tensor:
    """The objective at every position, (S,); of a few positions at a time, so that only the logits are kept for the
    backward pass."""
    if len(logits) <= LOSS_POSITIONS or not torch.is_grad_enabled():
        return answer_loss(logits, one.kept, one.own, one.own_rest, objective)
    parts = (part.split(LOSS_POSITIONS) for part in (logits, one.kept, one.own, one.own_rest))
    chunks = zip(*parts, strict=True)
    return torch.cat([checkpoint(answer_loss, *chunk, objective, use_reentrant=False) for chunk in chunks])


def tune_coefficients(
    model: CoefficientModel,
    batches: Sequence[TuningBatch],
    start: np.ndarray,
    config: TuneConfig,
    state: TuneState | None = None,
    keep: Callable[[TuneState], None] | None = None,
) -> TuneState:
    """Adam on the coefficients until `num_steps`, or until the held-out objective has not improved for `patience`.

    Args:
        start: (M, G) float64; the pull's centre. state: to go on from. keep: called after every step, to write it down.
    """
    state = state or TuneState.start(start)
    any_held_out = any(bool(one.held_out.any()) for one in batches)
    while state.num_steps < config.num_steps and state.num_steps - state.best_step < config.patience:
        tuning, held_out, gradient = model.objective(state.coefficients, batches, config.objective, gradient=True)
        distance = state.coefficients - start
        gradient = gradient + 2.0 * config.pull * distance / distance.size
        watched = held_out if any_held_out else tuning
        if watched < state.best_objective:
            state.best, state.best_objective, state.best_step = state.coefficients.copy(), watched, state.num_steps
        state.objectives.append((tuning, held_out))
        state.num_steps += 1
        state.first_moment = 0.9 * state.first_moment + 0.1 * gradient
        state.second_moment = 0.999 * state.second_moment + 0.001 * gradient**2
        first = state.first_moment / (1 - 0.9**state.num_steps)
        second = state.second_moment / (1 - 0.999**state.num_steps)
        state.coefficients = state.coefficients - config.learning_rate * first / (np.sqrt(second) + 1e-8)
        if keep is not None:
            keep(state)
    return state
