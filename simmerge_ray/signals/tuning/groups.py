"""Groups of tensors that share a coefficient, named as mergekit's filters name them: a part of the tensors' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from simmerge_ray.base.errors import ConfigError, unknown_name
from simmerge_ray.plans.operators.gradients import split_layer
from simmerge_ray.plans.recipe import GroupWeights, MemberWeight

Granularity = Literal["global", "layer", "block", "tensor"]
OUTSIDE = ""  # the group of what lies in no layer
_ATTENTION = ("self_attn.", "attn.", "attention.", "self_attention.")


def group_of(tensor: str, granularity: Granularity) -> str:
    """The group of one tensor, a part of its name that no tensor of another group holds; `OUTSIDE` for the rest."""
    if granularity == "tensor":
        return tensor
    parts = split_layer(tensor) if granularity != "global" else None
    if parts is None:
        return OUTSIDE
    layer = f"{parts[0]}{parts[1]}."
    if granularity == "layer":
        return layer
    name = parts[2].removeprefix(".")
    attention = next((part for part in _ATTENTION if name.startswith(part)), None)
    if attention is not None:
        return f"{layer}{attention}"
    return f"{layer}{name.split('.')[0]}." if name.startswith(("mlp.", "feed_forward.", "ffn.")) else layer


def groups_of(tensors: Iterable[str], granularity: Granularity) -> dict[str, str]:
    """Group by tensor.

    Raises:
        ConfigError: an unknown granularity.
    """
    if granularity not in (known := get_args(Granularity)):
        raise ConfigError(unknown_name("granularity", granularity, known))
    return {tensor: group_of(tensor, granularity) for tensor in tensors}


def member_weight(coefficients: Mapping[str, float]) -> MemberWeight:
    """The weight of a recipe from one member's coefficients by group: a number where there is one group only.

    Longer filters stand first, so that a block is found before its layer.
    """
    filters = sorted(((part, value) for part, value in coefficients.items() if part), key=lambda p: (-len(p[0]), p[0]))
    default = coefficients.get(OUTSIDE, 0.0)
    return GroupWeights(tuple(filters), default) if filters else default
