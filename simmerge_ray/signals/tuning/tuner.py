"""Coefficients `lambda[i, g]` of member i in group g of tensors, by gradient on the members' own answers.

The model's weights are `base + sum_i lambda[i, g] tau_i`. One backward pass a step:
`dL/dlambda[i, g] = sum over tensors W of g of <dL/dW, tau_i>`; the gradient of a tensor is taken by a hook as soon as
it is ready, multiplied with every member's task vector, and freed, so that only one tensor's gradient is in memory.
Objective `sum_i w_i L_i + pull |lambda - start|^2 / n` over the tuning probes, L_i a mean over tokens, by L-BFGS; the
coefficients that are best on probes held out are kept (few probes are overfitted by many coefficients). Known as
AdaMerging (arXiv:2310.02575), DAM (Differentiable Adaptive Merging, Arcee 2024), Expert Merging (arXiv:2509.25712) and
SAMerging (arXiv:2512.21288); the implementation is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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

_WORTH_WAITING_FOR = 0.01  # share by which the held-out objective has to fall for patience to begin anew


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
    """What a tuning goes on from: every point that was evaluated, in order.

    points, gradients: (M, G) float64 each; gradients of the objective without the pull. objectives: (on the tuning
    probes, on those held out) at each point; twice the first where none is held out.
    """

    points: list[np.ndarray] = field(default_factory=list)
    gradients: list[np.ndarray] = field(default_factory=list)
    objectives: list[tuple[float, float]] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return len(self.objectives)

    @property
    def best_step(self) -> int:
        """Where the held-out objective is lowest; of equal ones the first."""
        return int(np.argmin([held_out for _, held_out in self.objectives]))

    @property
    def best(self) -> np.ndarray:
        return self.points[self.best_step]

    def add(self, point: np.ndarray, gradient: np.ndarray, objectives: tuple[float, float]) -> None:
        self.points.append(point)
        self.gradients.append(gradient)
        self.objectives.append(objectives)

    def cut(self, num_steps: int) -> None:
        """Forget what came after."""
        for one in (self.points, self.gradients, self.objectives):
            del one[num_steps:]

    def is_over(self, num_steps: int, patience: int) -> bool:
        """Whether all steps were made, or the held-out objective has not fallen by a hundredth for `patience` steps."""
        lowest, since = math.inf, 0
        for _, held_out in self.objectives:
            since = 0 if held_out < lowest * (1 - _WORTH_WAITING_FOR) or math.isinf(lowest) else since + 1
            lowest = min(lowest, held_out)
        return self.num_steps >= num_steps or since >= patience

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, for a file."""
        return {
            "points": np.array(self.points),
            "gradients": np.array(self.gradients),
            "objectives": np.array(self.objectives, dtype=np.float64).reshape(-1, 2),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TuneState:
        objectives = [(float(a), float(b)) for a, b in arrays["objectives"]]
        return cls(list(arrays["points"]), list(arrays["gradients"]), objectives)


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


class _OverError(Exception):
    """No more steps: a way out of the minimiser."""


def tune_coefficients(
    model: CoefficientModel,
    batches: Sequence[TuningBatch],
    start: np.ndarray,
    config: TuneConfig,
    state: TuneState | None = None,
    keep: Callable[[TuneState], None] | None = None,
) -> TuneState:
    """L-BFGS-B (`scipy.optimize`) on the coefficients until it converges, `num_steps` gradients, or `patience`.

    There are few coefficients and the objective is smooth, so a quasi-Newton method needs a third of the steps of
    Adam. The minimiser asks for the same points whenever it gets the same answers: an interrupted tuning is made again
    from the state, up to the first point that is not there.

    Args:
        start: (M, G) float64; the pull's centre. state: to go on from. keep: called after every step, to write it down.
    """
    from scipy.optimize import minimize

    state = state or TuneState()
    any_held_out = any(bool(one.held_out.any()) for one in batches)
    done = TuneState()

    def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
        step, point = done.num_steps, flat.reshape(start.shape)
        if step < state.num_steps and np.array_equal(state.points[step], point):
            done.add(state.points[step], state.gradients[step], state.objectives[step])
        else:
            state.cut(step)  # of another version of the minimiser
            tuning, held_out, gradient = model.objective(point, batches, config.objective, gradient=True)
            done.add(point.copy(), gradient, (tuning, held_out if any_held_out else tuning))
            if keep is not None:
                keep(done)
        if done.is_over(config.num_steps, config.patience):
            raise _OverError
        distance = point - start
        value = done.objectives[-1][0] + config.pull * float(np.mean(distance**2))
        return value, (done.gradients[-1] + 2.0 * config.pull * distance / distance.size).ravel()

    with suppress(_OverError):
        minimize(evaluate, np.array(start, dtype=np.float64).ravel(), jac=True, method="L-BFGS-B")
    return done
