"""The plans among which a search for the best merge looks, as named parameters that a sampler can propose.

A plan is the left fold over a subset of checkpoints. Searched are the subset, the operator (one for all steps), the
operator's parameters that its arm leaves open, and the weight of every step, one number or several anchors over the
depth of the model (layer-group weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.operators.specs import Arm, make_arm, parse_arms
from simmerge_ray.plans.plan import MergePlan, MergeStep, resolve_plan

MAX_SUBSETS = 1000
STEP = 0.01  # of every number: finer is lost in the noise of any evaluation


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high` in steps of `STEP`, or one of `choices`."""

    low: float = 0.0
    high: float = 1.0
    choices: tuple[str, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether it can be proposed."""
        if self.choices:
            return value in self.choices
        return self.low <= value <= self.high and abs((value - self.low) / STEP % 1.0 - 0.5) > 0.5 - 1e-6


Suggest = Callable[[str, Range], Any]  # gives the value of a named parameter


@dataclass(frozen=True)
class SearchSpace:
    """subsets: of checkpoint ids. arms: operators, their given parameters fixed. num_anchors: of a step's weight."""

    subsets: tuple[tuple[str, ...], ...]
    arms: tuple[Arm, ...]
    num_anchors: int = 1

    def plan(self, suggest: Suggest) -> MergePlan:
        """The plan that suggested values make; asks only for the parameters that the plan has."""
        subset = self.subsets[0]
        if len(self.subsets) > 1:
            subset = tuple(str(suggest("members", Range(choices=tuple(map(_joined, self.subsets))))).split(" + "))
        arm = self.arms[0]
        if len(self.arms) > 1:
            label = suggest("arm", Range(choices=tuple(one.label for one in self.arms)))
            arm = next(one for one in self.arms if one.label == label)
        free = {name: _number(suggest(f"{arm.label}:{name}", where)) for name, where in free_parameters(arm).items()}
        full = make_arm(arm.operator, dict(arm.params) | free)
        steps = []
        for number, right in enumerate(subset[1:], 1):
            left = subset[0] if number == 1 else f"#{number - 1}"
            steps.append(MergeStep(left, right, full, self._weight(arm, number, len(subset), suggest)))
        return MergePlan(tuple(steps))

    def _weight(self, arm: Arm, number: int, size: int, suggest: Suggest) -> Any:
        if not arm.spec.uses_weights:
            return 1.0 / (number + 1)
        anchors = [
            _number(suggest(f"{size}-way:weight{number}.{anchor}", Range())) for anchor in range(self.num_anchors)
        ]
        return anchors[0] if len(set(anchors)) == 1 else tuple(anchors)

    def parameters(self, plan: MergePlan) -> dict[str, tuple[Any, Range]] | None:
        """Names, values and ranges that make `plan`, or None if it is not in this space."""
        suggested: dict[str, tuple[Any, Range]] = {}
        wanted = self._values(plan)

        def suggest(name: str, where: Range) -> Any:
            value = wanted[name]
            if not where.holds(value):
                raise KeyError(name)
            suggested[name] = (value, where)
            return value

        try:
            return suggested if self.plan(suggest).id == plan.id else None
        except KeyError:
            return None

    def _values(self, plan: MergePlan) -> dict[str, Any]:
        """Values under every name that could stand for a part of `plan`; empty if it is not in this space."""
        subset = next((one for one in self.subsets if set(one) == set(plan.members)), None)
        if subset is None or len(plan.steps) != len(subset) - 1:
            return {}
        full = plan.steps[0].arm
        arms = [one for one in self.arms if one.operator == full.operator and set(one.params) <= set(full.params)]
        if not arms:
            return {}
        arm, params = arms[0], full.param_dict()
        values: dict[str, Any] = {"members": _joined(subset), "arm": arm.label}
        values |= {f"{arm.label}:{name}": params[name] for name in free_parameters(arm)}
        for number, step in enumerate(plan.steps, 1):
            anchors = step.weight if isinstance(step.weight, tuple) else (step.weight,) * self.num_anchors
            # A canonical plan may have its commuting sources the other way round; their weights are equal then.
            values |= {f"{len(subset)}-way:weight{number}.{anchor}": one for anchor, one in enumerate(anchors)}
        return values


def _joined(subset: Sequence[str]) -> str:
    return " + ".join(subset)


def _number(value: Any) -> float:
    return round(float(value), 4)


def free_parameters(arm: Arm) -> dict[str, Range]:
    """The parameters of an arm that are searched: those that it leaves open and that have a searched range."""
    fixed = dict(arm.params)
    return {
        name: Range(*spec.searched)
        for name, spec in arm.spec.parameters.items()
        if spec.searched is not None and name not in fixed
    }


def make_space(catalogue: Catalogue, config: SearchConfig) -> SearchSpace:
    """The space that a config describes.

    Raises:
        ConfigError: too many subsets, or too few members. PlanError, OperatorError: unknown ones, or a base is needed.
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
    if config.sampler == "cmaes" and (low < high or len(config.arms) > 1):
        raise ConfigError(
            "sampler 'cmaes' learns only from numbers that every merge has, and would draw at random here: give one "
            f"arm and one number of checkpoints, not {len(config.arms)} arms and {low}-{high}; or take 'tpe'"
        )
    excluded = [set(pair) for pair in config.exclude]
    subsets = [one for size in range(low, high + 1) for one in combinations(members, size)]
    subsets = [one for one in subsets if not any(pair <= set(one) for pair in excluded)]
    if not 1 <= len(subsets) <= MAX_SUBSETS:
        raise ConfigError(
            f"there are {len(subsets)} subsets of {low} to {high} of {len(members)} checkpoints; "
            f"a search takes 1 to {MAX_SUBSETS}: name fewer members, or fewer ways"
        )
    space = SearchSpace(tuple(subsets), parse_arms(config.arms), config.layer_groups)
    for arm in space.arms:
        resolve_plan(MergePlan((MergeStep(subsets[0][0], subsets[0][1], arm),)), catalogue)
    return space
