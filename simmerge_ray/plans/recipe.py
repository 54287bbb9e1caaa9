"""Recipes: one n-ary step with a weight for every member. No torch.

A recipe is what a candidate merge is made by: operator, members, weights, parameters. It is a plan of its own kind
(`plan.MergePlan.recipe`), so it stands wherever a plan may stand. A weight is a number, anchors of a gradient over the
depth of the model, or one number for each group of tensors (a layer, a block of it, a tensor), as mergekit's filters
name them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simmerge_ray.base.errors import PlanError, unknown_name
from simmerge_ray.plans.operators.gradients import gradient_value
from simmerge_ray.plans.operators.specs import MAX_ANCHORS, Arm, make_arm, parameter_text

MAX_GROUPS = 100_000
_DIGITS = 12  # of weights in canonical form: sums that differ in their last bits are one merge
# Operators that only the ratio of the weights matters to, whatever their `normalize`.
_BY_RATIO = frozenset({"scale_matched_linear", "slerp", "nuslerp", "karcher", "regmean"})


@dataclass(frozen=True)
class GroupWeights:
    """A number for each group of tensors: of the first filter that the tensor's name contains, else `default`."""

    filters: tuple[tuple[str, float], ...]
    default: float = 0.0

    def of(self, tensor: str) -> float:
        return next((value for part, value in self.filters if part in tensor), self.default)


MemberWeight = float | tuple[float, ...] | GroupWeights


@dataclass(frozen=True)
class Recipe:
    """`arm(base, members, weights)`.

    weights: one for each member, as the n-ary operator takes them. seed: of random operators.

    Raises:
        PlanError: no member, one twice, a wrong number of members for the operator, a weight that is no finite number.
    """

    arm: Arm
    members: tuple[str, ...]
    weights: tuple[MemberWeight, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        spec, count = self.arm.spec, len(self.members)
        if len(set(self.members)) < count:
            twice = next(name for name in self.members if self.members.count(name) > 1)
            raise PlanError(f"recipe {self.arm.label!r}: member {twice!r} is given twice")
        if count < spec.min_sources or (spec.max_sources is not None and count > spec.max_sources):
            most = "any number of" if spec.max_sources is None else f"at most {spec.max_sources}"
            raise PlanError(
                f"recipe {self.arm.label!r}: operator {spec.name!r} takes at least {spec.min_sources} and {most} "
                f"members, got {count}"
            )
        if len(self.weights) != count:
            raise PlanError(f"recipe {self.arm.label!r}: {count} members need {count} weights, got {len(self.weights)}")
        object.__setattr__(
            self, "weights", tuple(_checked(self, *pair) for pair in zip(self.members, self.weights, strict=True))
        )

    def weights_at(self, tensor: str, position: float) -> tuple[float, ...]:
        """One number for each member, for one tensor. position: of its layer in [0, 1] (`operators.gradients`)."""
        return tuple(
            weight.of(tensor)
            if isinstance(weight, GroupWeights)
            else float(gradient_value(weight, position))
            if isinstance(weight, tuple)
            else weight
            for weight in self.weights
        )

    def canonical(self) -> Recipe:
        """The same merge in one form: members of weight 0 left out, members sorted where their order changes nothing,
        a scale taken into the weights of task arithmetic, weights that only count by their ratio divided by their sum,
        those that do not count 1."""
        recipe = self.without_zeros()
        if self.arm.operator == "task_arithmetic" and not dict(self.arm.params).get("normalize"):
            scale = float(self.arm.param_dict()["scale"])
            if scale != 1.0:
                kept = {name: value for name, value in self.arm.params if name != "scale"}
                weights = tuple(_scaled(weight, scale) for weight in recipe.weights)
                recipe = replace(recipe, arm=make_arm(self.arm.operator, kept), weights=weights)
        if not self.arm.spec.uses_weights:
            recipe = replace(recipe, weights=(1.0,) * len(recipe.members))
        elif by_ratio(self.arm) and _numbers(recipe.weights):
            total = math.fsum(weight for weight in recipe.weights if isinstance(weight, float))
            factor = 1.0 if abs(total - 1.0) < 1e-9 else 1.0 / total if total > 0 else 1.0
            weights = tuple(_rounded(_scaled(weight, factor)) for weight in recipe.weights)
            recipe = replace(recipe, weights=weights).without_zeros()
        if not self.arm.spec.random and self.arm.operator not in ("slerp", "nuslerp"):
            order = sorted(range(len(recipe.members)), key=recipe.members.__getitem__)
            recipe = replace(
                recipe,
                members=tuple(recipe.members[index] for index in order),
                weights=tuple(recipe.weights[index] for index in order),
            )
        return recipe

    def without_zeros(self) -> Recipe:
        """The recipe of the members that have a weight; itself where all are 0, or where the operator needs them."""
        kept = [pair for pair in zip(self.members, self.weights, strict=True) if pair[1] != 0.0]
        if not self.arm.spec.uses_weights or len(kept) < max(1, self.arm.spec.min_sources):
            return self
        members, weights = zip(*kept, strict=True)
        return replace(self, members=members, weights=weights)

    @property
    def label(self) -> str:
        """Short text, e.g. `task_arithmetic: 0.8 math-a + 0.6 code-b`; of weights by group their number alone."""
        sizes = {len(one.filters) if isinstance(one, GroupWeights) else 0 for one in self.weights}
        if len(sizes) == 1 and sizes != {0}:
            return f"{self.arm.label} in {sizes.pop()} groups: {' + '.join(self.members)}"
        parts = [f"{_weight_text(weight)} {name}" for name, weight in zip(self.members, self.weights, strict=True)]
        return f"{self.arm.label}: {' + '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """JSON value that `recipe_from_json` reads."""
        options = {"seed": self.seed} if self.seed else {}
        return options | {
            "operator": self.arm.operator,
            "parameters": dict(self.arm.params),
            "members": [
                {"checkpoint": name, "weight": _weight_json(weight)}
                for name, weight in zip(self.members, self.weights, strict=True)
            ],
        }


def recipe_of(arm: Arm, weights: Mapping[str, MemberWeight], seed: int = 0) -> Recipe:
    """A recipe from the weights by member."""
    return Recipe(arm, tuple(weights), tuple(weights.values()), seed)


def plain_average(members: Sequence[str]) -> Recipe:
    """Every member with the same share: what one would do without any signal."""
    return Recipe(make_arm("linear"), tuple(members), (1.0 / len(members),) * len(members))


def recipe_from_json(value: Mapping[str, Any]) -> Recipe:
    """Parse the JSON form.

    Raises:
        PlanError, OperatorError: what is wrong.
    """
    for key in value:
        if key not in (keys := ("operator", "parameters", "members", "seed")):
            raise PlanError(unknown_name("key", str(key), keys))
    operator, members, seed = value.get("operator"), value.get("members"), value.get("seed", 0)
    if not isinstance(operator, str):
        raise PlanError(f"a recipe needs an operator's name under 'operator', got {operator!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise PlanError(f"'seed' must be an integer, got {seed!r}")
    parameters = value.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise PlanError(f"'parameters' must be an object, got {parameters!r}")
    if not isinstance(members, list) or not all(isinstance(m, Mapping) for m in members):
        raise PlanError("a recipe needs a list under 'members', each {'checkpoint': id, 'weight': w}")
    names, weights = [], []
    for number, member in enumerate(members, 1):
        for key in member:
            if key not in ("checkpoint", "weight"):
                raise PlanError(f"member {number}: {unknown_name('key', str(key), ('checkpoint', 'weight'))}")
        if not isinstance(member.get("checkpoint"), str):
            raise PlanError(f"member {number}: 'checkpoint' must be a string, got {member.get('checkpoint')!r}")
        names.append(member["checkpoint"])
        weights.append(_weight_from_json(member.get("weight", 1.0), number))
    return Recipe(make_arm(operator, parameters), tuple(names), tuple(weights), seed)


def _checked(recipe: Recipe, member: str, weight: Any) -> MemberWeight:
    where = f"recipe {recipe.arm.label!r}: weight of {member!r}"
    if isinstance(weight, GroupWeights):
        if not 0 < len(weight.filters) <= MAX_GROUPS:
            raise PlanError(f"{where}: from 1 to {MAX_GROUPS} groups, got {len(weight.filters)}")
        values = (*weight.filters, ("default", weight.default))
        for part, value in values:
            if not part or not _is_number(value):
                raise PlanError(f"{where}: group {part!r} has {value!r}; a finite number is needed")
        filters = tuple((part, float(value)) for part, value in weight.filters)
        return GroupWeights(filters, float(weight.default))
    if isinstance(weight, list | tuple):
        if not 2 <= len(weight) <= MAX_ANCHORS or not all(map(_is_number, weight)):
            raise PlanError(f"{where}: a list needs 2 to {MAX_ANCHORS} finite numbers, got {weight!r}")
        anchors = tuple(map(float, weight))
        return anchors[0] if len(set(anchors)) == 1 else anchors
    if not _is_number(weight):
        raise PlanError(f"{where}: {weight!r} is not a finite number")
    return float(weight)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def by_ratio(arm: Arm) -> bool:
    """Whether only the ratio of the weights matters to an arm."""
    return arm.operator in _BY_RATIO or bool(arm.param_dict().get("normalize", False))


def _rounded(weight: MemberWeight) -> MemberWeight:
    return round(weight, _DIGITS) if isinstance(weight, float) else weight


def _numbers(weights: Sequence[MemberWeight]) -> bool:
    return all(isinstance(weight, float) for weight in weights)


def _scaled(weight: MemberWeight, factor: float) -> MemberWeight:
    if isinstance(weight, GroupWeights):
        filters = tuple((part, value * factor) for part, value in weight.filters)
        return GroupWeights(filters, weight.default * factor)
    return tuple(anchor * factor for anchor in weight) if isinstance(weight, tuple) else weight * factor


def _weight_text(weight: MemberWeight) -> str:
    if isinstance(weight, GroupWeights):
        return f"<{len(weight.filters)} groups>"
    if isinstance(weight, tuple):
        return f"[{', '.join(map(parameter_text, weight))}]"
    return parameter_text(round(weight, 6))


def _weight_json(weight: MemberWeight) -> Any:
    if isinstance(weight, GroupWeights):
        return {"groups": [list(pair) for pair in weight.filters], "default": weight.default}
    return list(weight) if isinstance(weight, tuple) else weight


def _weight_from_json(value: Any, number: int) -> Any:
    if not isinstance(value, Mapping):
        return value
    groups = value.get("groups")
    if not isinstance(groups, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in groups
    ):
        raise PlanError(f"member {number}: 'groups' must be a list of [part of a tensor's name, number]")
    return GroupWeights(tuple((part, weight) for part, weight in groups), value.get("default", 0.0))
