"""The recipes among which a search for the best merge looks, as named parameters that a sampler can propose.

Searched are the subset of checkpoints, the operator, the operator's parameters that its arm leaves open, and the weight
of every member, one number or several anchors over the depth of the model (layer groups). On the arc between two
checkpoints there is one number t instead of two weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.operators.specs import Arm, make_arm, parse_arms
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.plans.recipe import GroupWeights, MemberWeight, Recipe, by_ratio

MAX_SUBSETS = 1000
STEP = 0.01  # of every number: finer is lost in the noise of any evaluation
MAX_WEIGHT = 1.5  # of a member


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high` in steps of `STEP`, or one of `choices`."""

    low: float = 0.0
    high: float = 1.0
    choices: tuple[str, ...] = ()

    def nearest(self, value: Any) -> Any:
        """What can be proposed and is `value` to half a step; None if nothing is."""
        if self.choices:
            return value if value in self.choices else None
        if not self.low - STEP / 2 <= value <= self.high + STEP / 2:
            return None
        return min(_number(self.low + round((value - self.low) / STEP) * STEP), self.high)


Suggest = Callable[[str, Range], Any]  # gives the value of a named parameter
Parameters = Mapping[str, tuple[Any, Range]]  # values and where they come from, by name


@dataclass(frozen=True)
class SearchSpace:
    """subsets: of checkpoint ids. arms: operators, their given parameters fixed. num_anchors: of a member's weight.
    base: id of the base checkpoint, which is what members without any weight make."""

    subsets: tuple[tuple[str, ...], ...]
    arms: tuple[Arm, ...]
    num_anchors: int = 1
    base: str | None = None

    def plan(self, suggest: Suggest) -> MergePlan | None:
        """The plan that suggested values make; asks only for the parameters that the plan has.

        It is a recipe of the members that have a weight. What leaves a checkpoint as it is (an average of one member,
        task vectors without any weight) is the plan of that checkpoint. None: an average of nothing.
        """
        subset = self.subsets[0]
        if len(self.subsets) > 1:
            subset = tuple(str(suggest("members", Range(choices=tuple(map(_joined, self.subsets))))).split(" + "))
        arm = self.arms[0]
        if len(self.arms) > 1:
            label = suggest("arm", Range(choices=tuple(one.label for one in self.arms)))
            arm = next(one for one in self.arms if one.label == label)
        free = {name: _number(suggest(f"{arm.label}:{name}", where)) for name, where in free_parameters(arm).items()}
        full = make_arm(arm.operator, dict(arm.params) | free)
        return self._made(Recipe(full, subset, self._weights(arm, subset, suggest)))

    def _weights(self, arm: Arm, subset: Sequence[str], suggest: Suggest) -> tuple[MemberWeight, ...]:
        if not arm.spec.uses_weights:
            return (1.0,) * len(subset)

        def anchors(name: str, where: Range) -> tuple[float, ...]:
            return tuple(_number(suggest(f"{name}.{anchor}", where)) for anchor in range(self.num_anchors))

        if arm.spec.is_spherical:
            right = anchors(f"{_joined(subset)}:t", Range())
            return _weight(tuple(_number(1.0 - anchor) for anchor in right)), _weight(right)
        return tuple(_weight(anchors(f"weight:{member}", Range(high=MAX_WEIGHT))) for member in subset)

    def _made(self, recipe: Recipe) -> MergePlan | None:
        """The plan of a recipe, in the fewest words; see `plan`."""
        recipe, spec = recipe.without_zeros(), recipe.arm.spec
        numbers = [weight for weight in recipe.weights if isinstance(weight, float)]
        if spec.uses_weights and not spec.needs_base and _sums_to_zero(recipe.weights):
            return None
        if spec.uses_weights and not any(recipe.weights):
            return MergePlan(source=self.base) if self.base is not None else None
        given = [member for member, weight in zip(recipe.members, recipe.weights, strict=True) if weight != 0.0]
        if len(given) == 1 and len(numbers) == len(recipe.members) and _is_itself(recipe):
            return MergePlan(source=given[0])
        return MergePlan(recipe=recipe)

    def parameters(self, plan: MergePlan) -> Parameters | None:
        """Names, values and ranges that make `plan`, to half a `STEP` in every number; None if it is not in this
        space."""
        recipe = _recipe_of(plan)
        for form in (recipe, recipe.canonical()) if recipe is not None else ():
            if (found := self._parameters(self._values(form))) is not None:
                return found
        return None

    def _parameters(self, wanted: Mapping[str, Any]) -> Parameters | None:
        found: dict[str, tuple[Any, Range]] = {}

        def suggest(name: str, where: Range) -> Any:
            value = where.nearest(wanted[name])
            if value is None:
                raise KeyError(name)
            found[name] = (value, where)
            return value

        try:
            return found if wanted and self.plan(suggest) is not None else None
        except KeyError:
            return None

    def _values(self, recipe: Recipe) -> Mapping[str, Any]:
        """Values under every name that could stand for a part of a recipe; empty if it is not in this space."""
        members = set(recipe.members)
        full, subset = recipe.arm, next((one for one in self.subsets if set(one) == members), None)
        if subset is None and full.spec.uses_weights and not full.spec.is_spherical:
            subset = next((one for one in self.subsets if members < set(one)), None)  # where the others have no weight
        arms = [one for one in self.arms if one.operator == full.operator and set(one.params) <= set(full.params)]
        if subset is None or not arms or recipe.seed or any(isinstance(one, GroupWeights) for one in recipe.weights):
            return {}
        arm, params = max(arms, key=lambda one: len(one.params)), full.param_dict()
        if any(params[name] != value for name, value in _fixed_parameters(arm).items()):
            return {}
        values: dict[str, Any] = {"members": _joined(subset), "arm": arm.label}
        values |= {f"{arm.label}:{name}": params[name] for name in free_parameters(arm)}
        weights = dict(zip(recipe.members, recipe.weights, strict=True))
        for member in subset:
            for number, anchor in enumerate(self._anchors(weights.get(member, 0.0))):
                values[f"weight:{member}.{number}"] = anchor
        if arm.spec.is_spherical:
            left, right = (self._anchors(weights[member]) for member in subset)
            for number, (one, other) in enumerate(zip(left, right, strict=False)):
                values[f"{_joined(subset)}:t.{number}"] = other / (one + other) if one + other > 0 else -1.0
        return values

    def _anchors(self, weight: Any) -> Sequence[float]:
        anchors = weight if isinstance(weight, tuple) else (weight,) * self.num_anchors
        return anchors if len(anchors) == self.num_anchors else ()


def _recipe_of(plan: MergePlan) -> Recipe | None:
    """The recipe that a plan is: its own, or that of its only step."""
    if plan.recipe is not None or len(plan.steps) != 1:
        return plan.recipe
    (step,) = plan.steps
    return Recipe(step.arm, (step.left, step.right), tuple(map(_weight, step.source_anchors)), plan.seed)


def _weight(anchors: tuple[float, ...]) -> MemberWeight:
    return anchors[0] if len(set(anchors)) == 1 else anchors


def _sums_to_zero(weights: Sequence[MemberWeight]) -> bool:
    """Whether members have no weight at some anchor, where there is nothing to average."""
    rows = [weight for weight in weights if isinstance(weight, tuple)]
    numbers = sum(weight for weight in weights if isinstance(weight, float))
    return any(numbers + sum(anchors) <= 0.0 for anchors in zip(*rows, strict=True)) if rows else numbers <= 0.0


def _is_itself(recipe: Recipe) -> bool:
    """Whether a recipe of which one member has a weight is that member: an average, or its task vector as it is."""
    if recipe.arm.operator == "task_arithmetic":
        canonical = recipe.canonical()
        return canonical.weights == (1.0,) and canonical.arm.param_dict()["scale"] == 1.0
    return by_ratio(recipe.arm) and not {"density", "scale"} & recipe.arm.spec.parameters.keys()


def _joined(subset: Sequence[str]) -> str:
    return " + ".join(subset)


def _number(value: Any) -> float:
    return round(float(value), 4)


def _fixed_parameters(arm: Arm) -> dict[str, Any]:
    """All parameters of an arm that are not searched."""
    return {name: value for name, value in arm.param_dict().items() if name not in free_parameters(arm)}


def free_parameters(arm: Arm) -> dict[str, Range]:
    """The parameters of an arm that are searched: those that it leaves open and that have a searched range; a scale
    only where the weights cannot hold it."""
    given = {name for name, _ in arm.params} | (set() if by_ratio(arm) or not arm.spec.uses_weights else {"scale"})
    return {
        name: Range(*spec.searched)
        for name, spec in arm.spec.parameters.items()
        if spec.searched is not None and name not in given
    }


def make_space(catalogue: Catalogue, config: SearchConfig) -> SearchSpace:
    """The space that a config describes.

    Raises:
        ConfigError: too many subsets, too few members, or more than an operator takes. PlanError, OperatorError:
            unknown ones, or a base is needed.
    """
    members = config.members or catalogue.ids
    for member in members:
        catalogue.ref(member)
    if len(set(members)) < len(members):
        raise ConfigError(f"members must differ from each other, got {', '.join(members)}")
    low, high = config.ways
    if not 2 <= low <= high <= len(members):
        raise ConfigError(
            f"ways {low}-{high}: a merge takes from 2 to {len(members)} checkpoints of {', '.join(members)}"
        )
    excluded = [set(pair) for pair in config.exclude]
    subsets = [one for size in range(low, high + 1) for one in combinations(members, size)]
    subsets = [one for one in subsets if not any(pair <= set(one) for pair in excluded)]
    if not 1 <= len(subsets) <= MAX_SUBSETS:
        raise ConfigError(
            f"there are {len(subsets)} subsets of {low} to {high} of {len(members)} checkpoints; "
            f"a search takes 1 to {MAX_SUBSETS}: name fewer members, or fewer ways"
        )
    arms = parse_arms(config.arms)
    _check_sizes(arms, (low, high))
    _check_sampler(config, arms, subsets)
    base = catalogue.base.id if catalogue.base is not None else None
    space = SearchSpace(tuple(subsets), arms, config.layer_groups, base)
    for arm in arms:
        resolve_plan(MergePlan(recipe=Recipe(arm, subsets[0], (1.0,) * len(subsets[0]))), catalogue)
    return space


def _check_sizes(arms: Sequence[Arm], ways: tuple[int, int]) -> None:
    """Refuse arms that cannot take every number of checkpoints."""
    able = [arm for arm in arms if arm.spec.max_sources is None or arm.spec.max_sources >= ways[1]]
    if unable := [arm for arm in arms if arm not in able]:
        others = " ".join(f"--arm '{arm.label}'" for arm in able)
        remedy = f"; leave them out: {others}" if able else "; name others with --arm"
        limits = ", ".join(f"{arm.label!r} at most {arm.spec.max_sources}" for arm in unable)
        raise ConfigError(f"ways {ways[0]}-{ways[1]}: of the arms, some merge fewer checkpoints: {limits}{remedy}")


def _check_sampler(config: SearchConfig, arms: Sequence[Arm], subsets: Sequence[Sequence[str]]) -> None:
    if config.sampler != "cmaes":
        return
    if len(subsets) > 1 or len(arms) > 1:
        raise ConfigError(
            "sampler 'cmaes' learns only from numbers that every merge has, and would draw at random here: give one "
            f"arm and one set of checkpoints, not {len(arms)} arms and {len(subsets)} sets (--member, --ways; a weight "
            "of 0 leaves a member out); or take 'tpe'"
        )
    if len(config.objectives) > 1:
        raise ConfigError(f"sampler 'cmaes' takes one objective, not {', '.join(config.objectives)}; or take 'tpe'")
