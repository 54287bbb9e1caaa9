"""Coefficients that tuning starts from: equal, norm-matched, or those of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.plans.operators.gradients import tensor_positions
from simmerge_ray.plans.operators.shares import cancel, normalized
from simmerge_ray.plans.recipe import Recipe


def norm_matched_weights(norms: Sequence[float]) -> list[float]:
    """`w_i = (1 / |tau_i|) / sum_j (1 / |tau_j|)`: each member's task vector ends with the same norm, shares sum to 1.

    NAN (arXiv:2505.16148) argues by least squares for coefficients by the inverse of the parameters' norm; here the
    norm is that of a member's whole task vector. `scale_matched_linear` has the same ratios, but tensor by tensor, and
    brings the sum to the arithmetic mean of the norms, where these shares bring it to the harmonic mean. A member that
    changes nothing has no norm to match and gets 0.
    """
    inverse = [1.0 / norm if norm > 0 else 0.0 for norm in norms]
    return [one / total for one in inverse] if (total := sum(inverse)) > 0 else [1.0 / len(norms)] * len(norms)


def recipe_start(
    recipe: Recipe, members: Sequence[str], groups: Mapping[str, str], group_names: Sequence[str]
) -> np.ndarray:
    """Coefficients (M, G) of a recipe: the mean over a group's tensors; members that it does not name start at 0.

    Args:
        groups: group by tensor, as the checkpoints name them.

    Raises:
        ConfigError: `check_start`.
    """
    check_start(recipe, members)
    scale = float(recipe.arm.param_dict().get("scale", 1.0))
    divided = bool(recipe.arm.param_dict()["normalize"])
    place = {name: number for number, name in enumerate(group_names)}
    positions = tensor_positions(groups)
    sums, counts = np.zeros((len(members), len(place))), np.zeros(len(place))
    for tensor, group in groups.items():
        weights: Sequence[float] = recipe.weights_at(tensor, positions[tensor])
        if divided and not cancel(weights):
            weights = normalized(recipe.arm.operator, weights)
        for member, weight in zip(recipe.members, weights, strict=True):
            sums[members.index(member), place[group]] += scale * weight
        counts[place[group]] += 1
    return sums / counts


def check_start(recipe: Recipe, members: Sequence[str]) -> None:
    """Refuse what is no start for these members.

    Raises:
        ConfigError: the recipe is no sum of task vectors, or names a checkpoint that is not tuned.
    """
    if recipe.arm.operator not in (known := ("linear", "task_arithmetic")):
        raise ConfigError(f"tuning starts from a recipe of {' or '.join(known)}, not of {recipe.arm.label}")
    if others := sorted(set(recipe.members) - set(members)):
        raise ConfigError(f"the recipe to start from names {', '.join(others)}; tuned are {', '.join(members)}")
