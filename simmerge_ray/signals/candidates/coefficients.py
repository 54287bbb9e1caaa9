"""How much of each checkpoint's task vector a merge holds: one number a checkpoint, without making the merge.

Sums of task vectors and averages have theirs in the weights. Every other operator is run on the coordinate sample of
the signatures, tensor by tensor, and its result is projected on the members' task vectors (least squares), as
`propagation` does it. Tensors are averaged with weights `|task vector|^2 / |base|^2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from simmerge_ray.base.errors import PlanError
from simmerge_ray.plans.operators.gradients import tensor_positions
from simmerge_ray.plans.operators.specs import Arm, make_arm
from simmerge_ray.plans.operators.table import OPERATORS
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe
from simmerge_ray.signals.signature import Weights

_TINY = 1e-30
_COORDINATES = 2_000  # of a tensor that operators are run on: the average over tensors needs no more
_CACHED = 4096  # projections of operators, 8 bytes a member each


class PlanCoefficients:
    """Coefficients of plans over the task vectors of M checkpoints.

    Args:
        ids: of the checkpoints, in order. base: id of the base. weights: samples by id, those of the base too.
    """

    def __init__(self, ids: Sequence[str], base: str, weights: Mapping[str, Weights]) -> None:
        # The base may be a member, too: its task vector is 0, and stands behind the others.
        self._index = {name: place for place, name in enumerate([*ids, base])}
        self._count, self._base = len(ids), base
        self._positions = tensor_positions(weights[base])
        self._centre: dict[str, np.ndarray] = {}
        self._vectors: dict[str, np.ndarray] = {}
        self._energy: dict[str, np.ndarray] = {}  # (M + 1,) by tensor
        for name, of_base in weights[base].items():
            total = float(of_base.sums[0])
            chosen = slice(None, None, max(1, len(of_base.values) // _COORDINATES))
            centre = of_base.values[chosen].astype(np.float64)
            self._centre[name] = centre
            self._vectors[name] = np.stack([weights[one][name].values[chosen] - centre for one in [*ids, base]])
            moved = np.array([weights[one][name].sums[2] for one in ids] + [0.0])
            # Beside a tensor of zeros (a bias that was never trained) nothing has a size: it does not count.
            self._energy[name] = (moved / total if total > 0 else 0.0 * moved) + _TINY
        self._unscaled = lru_cache(_CACHED)(self._projected)
        self._of_members = lru_cache(_CACHED)(self._pseudo_inverses)

    def of(self, plan: MergePlan) -> np.ndarray:
        """(M,) float64.

        Raises:
            PlanError: a plan of several steps; a member that has no signature.
        """
        found = np.zeros(self._count + 1)
        for member in plan.members:
            if member not in self._index:
                raise PlanError(f"checkpoint {member!r} has no signature; add it to the catalogue of the signals")
        if plan.source is not None:
            found[self._index[plan.source]] = 1.0
        else:
            recipe = plan.recipe or one_step(plan)
            found[[self._index[member] for member in recipe.members]] = self._of_recipe(recipe)
        return found[: self._count]

    def _of_recipe(self, recipe: Recipe) -> np.ndarray:
        arm, params = recipe.arm, recipe.arm.param_dict()
        numbers = [weight for weight in recipe.weights if isinstance(weight, float)]
        if arm.spec.shares in ("average", "sum") and arm.operator in _CLOSED and len(numbers) == len(recipe.weights):
            return _closed(arm, np.array(numbers))
        scale = float(params["scale"]) if arm.operator in _SCALED else 1.0
        return scale * np.array(self._unscaled(_without_scale(recipe)))

    def _projected(self, recipe: Recipe) -> tuple[float, ...]:
        inverses, energy = self._of_members(tuple(self._index[member] for member in recipe.members))
        found = np.empty_like(energy)
        for place, (name, centre) in enumerate(self._centre.items()):
            weights = recipe.weights_at(name, self._positions[name])
            if recipe.arm.operator in _CLOSED:
                found[place] = _closed(recipe.arm, np.array(weights))
            else:
                vectors = self._vectors[name][[self._index[member] for member in recipe.members]]
                found[place] = inverses[place] @ (vectors @ _change_on_sample(recipe, centre, vectors, weights))
        return tuple(((energy * found).sum(0) / energy.sum(0)).tolist())

    def _pseudo_inverses(self, places: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """By tensor, the pseudo-inverse of the task vectors' Gram matrix, (T, m, m), and their energies, (T, m)."""
        chosen = list(places)
        grams = np.stack([vectors[chosen] @ vectors[chosen].T for vectors in self._vectors.values()])
        return np.linalg.pinv(grams, rcond=1e-12, hermitian=True), np.stack(list(self._energy.values()))[:, chosen]


_CLOSED = ("linear", "task_arithmetic")
_SCALED = ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")


def _closed(arm: Arm, weights: np.ndarray) -> np.ndarray:
    params = arm.param_dict()
    if params.get("normalize"):
        weights = weights / weights.sum()
    return weights * float(params.get("scale", 1.0))


def _change_on_sample(recipe: Recipe, centre: np.ndarray, vectors: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """(n,): what the real operator adds to the base at the sampled coordinates of one tensor."""
    arm = recipe.arm
    params: dict[str, Any] = arm.param_dict()
    if arm.spec.random:
        params["seeds"] = [recipe.seed + place for place in range(len(vectors))]
    params.pop("trim_scope", None)
    base = torch.from_numpy(centre)
    tensors = [base + torch.from_numpy(vector) for vector in vectors]
    merged = OPERATORS[arm.operator](base if arm.spec.uses_base else None, tensors, list(weights), **params)
    return np.asarray(merged.double().numpy() - centre)


def _without_scale(recipe: Recipe) -> Recipe:
    """The recipe at scale 1, which its result is linear in."""
    if recipe.arm.operator not in _SCALED:
        return recipe
    kept = {name: value for name, value in recipe.arm.params if name != "scale"}
    return Recipe(make_arm(recipe.arm.operator, kept), recipe.members, recipe.weights, recipe.seed)


def one_step(plan: MergePlan) -> Recipe:
    """The recipe of a plan of one two-way step. Raises PlanError: it has more steps."""
    if len(plan.steps) != 1:
        raise PlanError(f"candidate signals are of recipes; {plan.label} has {len(plan.steps)} steps")
    step = plan.steps[0]
    if isinstance(step.weight, tuple):
        return Recipe(step.arm, (step.left, step.right), step.source_anchors, plan.seed)
    return Recipe(step.arm, (step.left, step.right), step.source_weights(0.0), plan.seed)
