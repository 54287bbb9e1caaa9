"""Merge plans: which checkpoints, in which order, by which operators. No torch.

A plan is a sequence of two-way steps. A step takes two sources: ids of checkpoints, or `#1`, `#2`, ... for the result
of an earlier step; the last step's result is the merge. Or a plan is a recipe, one n-ary step, or one unmerged
checkpoint (the parents and the base are evaluated by such plans).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from simmerge_ray.base.errors import OperatorError, PlanError, shown_value, unknown_name
from simmerge_ray.base.storage import Place, digest_json, place_in, read_json_object, versions, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.plans.operators.gradients import gradient_value
from simmerge_ray.plans.operators.specs import (
    MAX_ANCHORS,
    OPERATOR_SPECS,
    Arm,
    Weight,
    check_weight,
    make_arm,
    parameter_text,
)
from simmerge_ray.plans.recipe import Recipe, by_ratio, recipe_from_json

INTERMEDIATE_DTYPES = ("float32", "out")
WEIGHTINGS = ("equal", "halving")


@dataclass(frozen=True)
class MergeStep:
    """`arm(base, left, right)` with weight `1 - weight` on left and `weight` on right.

    weight: a number, or anchors of a gradient over the depth of the model (see `operators.gradients`); equal anchors
    are the number, so that one merge has one id.
    """

    left: str
    right: str
    arm: Arm
    weight: Weight = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.weight, list | tuple):
            first, *others = self.weight or (None,)
            constant = 0 < len(others) < MAX_ANCHORS and all(anchor == first for anchor in others)
            object.__setattr__(self, "weight", first if constant else tuple(self.weight))

    @property
    def anchors(self) -> tuple[float, ...]:
        """The weight of right as anchors, a number as one."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight,)

    @property
    def source_anchors(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Anchors of the n-ary weights of left and of right, as a mergekit file has them."""
        left, right = zip(*(step_weights(self.arm.operator, anchor) for anchor in self.anchors), strict=True)
        return left, right

    def weight_at(self, position: float) -> float:
        """The weight of right at a position in [0, 1] of the layers."""
        return float(gradient_value(self.anchors, position))

    def source_weights(self, position: float) -> tuple[float, float]:
        """n-ary weights of left and right at a position, to the bit those of the step's mergekit file.

        There each source has a gradient of its own, and what they give adds up to 1 only before rounding; slerp has one
        number, the place on the arc.
        """
        if self.arm.spec.one_weight:
            return step_weights(self.arm.operator, self.weight_at(position))
        left, right = self.source_anchors
        return float(gradient_value(left, position)), float(gradient_value(right, position))

    def canonical(self) -> MergeStep:
        """The same step with commuting sources sorted."""
        if self.arm.spec.symmetric and self.weight == 0.5 and self.right < self.left:
            return MergeStep(self.right, self.left, self.arm, self.weight)
        return self


@dataclass(frozen=True)
class MergePlan:
    """Steps of a merge, its `recipe`, or `source` alone for an unmerged checkpoint.

    intermediate_dtype: `float32`, or `out` to round the result of every step to the output's dtype (what comes out of
    merging step by step on disk). seed: of random operators; a recipe has its own.
    """

    steps: tuple[MergeStep, ...] = ()
    source: str | None = None
    intermediate_dtype: str = "float32"
    seed: int = 0
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.intermediate_dtype not in INTERMEDIATE_DTYPES:
            raise PlanError(unknown_name("intermediate_dtype", self.intermediate_dtype, INTERMEDIATE_DTYPES))
        if bool(self.steps) + (self.source is not None) + (self.recipe is not None) != 1:
            raise PlanError("a plan has either steps, or a recipe, or one source checkpoint")
        if self.recipe is not None:
            object.__setattr__(self, "seed", self.recipe.seed)
        used: set[str] = set()
        for number, step in enumerate(self.steps, 1):
            spec = step.arm.spec
            if spec.max_sources is not None and spec.max_sources < 2:
                raise PlanError(f"step {number}: operator {spec.name!r} takes 1 source, a step has two")
            if step.left == step.right:
                raise PlanError(f"step {number}: left and right are both {step.left!r}; give two different sources")
            try:
                check_weight(step.weight)
            except OperatorError as error:
                raise PlanError(f"step {number}: {error}") from None
            for source in (step.left, step.right):
                if source.startswith("#") and spec.needs_grams:
                    raise PlanError(
                        f"step {number}: {spec.name!r} takes checkpoints, not the result of a step; "
                        "merge all of them by one recipe"
                    )
                if source.startswith("#") and not (source[1:].isdigit() and 1 <= int(source[1:]) < number):
                    raise PlanError(f"step {number}: source {source!r} is not an earlier step")
                used.add(source)
        if unused := [f"#{n}" for n in range(1, len(self.steps)) if f"#{n}" not in used]:
            raise PlanError(f"the result of step {', '.join(unused)} is not used by a later step")

    @property
    def members(self) -> tuple[str, ...]:
        """Ids of the checkpoints merged, in the order in which they enter."""
        if self.source is not None:
            return (self.source,)
        if self.recipe is not None:
            return self.recipe.members
        ordered = [s for step in self.steps for s in (step.left, step.right) if not s.startswith("#")]
        return tuple(dict.fromkeys(ordered))

    @property
    def is_merge(self) -> bool:
        """False for an unmerged checkpoint."""
        return self.source is None

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Of the steps, or of the recipe."""
        return (self.recipe.arm,) if self.recipe is not None else tuple(step.arm for step in self.steps)

    @property
    def pair_arm(self) -> Arm | None:
        """The arm that the plan is on a pair: one step with weight 0.5 and no seed, or the recipe of such a step."""
        if self.seed or self.source is not None:
            return None
        if self.recipe is not None:
            return _pair_arm(self.recipe.canonical())
        return self.steps[0].arm if [step.weight for step in self.steps] == [0.5] else None

    @property
    def needs_base(self) -> bool:
        return any(arm.spec.needs_base for arm in self.arms)

    @property
    def needs_grams(self) -> bool:
        """Whether an operator takes Gram matrices of its members' inputs."""
        return any(arm.spec.needs_grams for arm in self.arms)

    @property
    def uses_base(self) -> bool:
        """Whether an operator takes the base when there is one."""
        return any(arm.spec.uses_base for arm in self.arms)

    @cached_property
    def id(self) -> str:
        """Digest of the plan with commuting sources sorted: one merge, one id. A recipe that is an arm on a pair has
        the id of that arm's step."""
        if self.recipe is not None:
            recipe = self.recipe.canonical()
            arm = _pair_arm(recipe) if not self.seed else None
            if arm is None:
                return digest_json(recipe.to_json())[:16]
            left, right = recipe.members
            return pair_plan(left, right, arm).id
        return digest_json(replace(self, steps=tuple(s.canonical() for s in self.steps)).to_json())[:16]

    @property
    def label(self) -> str:
        """Short text, e.g. `ties(density=0.2): math-strong + code-weak`.

        Weights are shown where they change with depth only: existing files hold the labels of constant weights.
        """
        if self.source is not None:
            return self.source
        if self.recipe is not None:
            return self.recipe.label
        if len(self.steps) == 1:
            step = self.steps[0]
            return f"{step.arm.label}: {step.left} + {step.right}{_gradient_text(step)}"
        return "; ".join(
            f"#{n} = {s.arm.label}({s.left}, {s.right}{_gradient_text(s)})" for n, s in enumerate(self.steps, 1)
        )

    def to_json(self) -> dict[str, Any]:
        """JSON value that `plan_from_json` reads."""
        if self.source is not None:
            return {"source": self.source}
        if self.recipe is not None:
            return self.recipe.to_json()
        options = {"intermediate_dtype": self.intermediate_dtype, "seed": self.seed}
        given = {key: value for key, value in options.items() if value not in ("float32", 0)}
        return given | {
            "steps": [
                {
                    "left": step.left,
                    "right": step.right,
                    "operator": step.arm.operator,
                    # 0 and 0.0 are one anchor, so they have one id.
                    "weight": [float(a) for a in step.weight] if isinstance(step.weight, tuple) else step.weight,
                    "parameters": dict(step.arm.params),
                }
                for step in self.steps
            ]
        }


def step_weights(operator: str, weight: float) -> tuple[float, float]:
    """n-ary weights of a two-way step: (1-w, w), doubled for sums of task vectors, so that 0.5 is the usual sum."""
    factor = 2.0 if OPERATOR_SPECS[operator].needs_base else 1.0
    return factor * (1.0 - weight), factor * weight


def _pair_arm(recipe: Recipe) -> Arm | None:
    """See `MergePlan.pair_arm`; of a canonical recipe."""
    arm, (weight, *others) = recipe.arm, recipe.weights
    if others != [weight] or not isinstance(weight, float):
        return None
    if not arm.spec.uses_weights or by_ratio(arm):
        return arm
    if arm.operator == "task_arithmetic":  # whose scale the weights have taken in
        scale = arm.spec.parameters["scale"]
        return make_arm(arm.operator, dict(arm.params) | {"scale": weight}) if not scale.problem(weight) else None
    return arm if weight == step_weights(arm.operator, 0.5)[0] else None


def weight_text(weight: Weight) -> str:
    """`0.3`, or `[0, 0.5, 1]`."""
    if isinstance(weight, tuple):
        return f"[{', '.join(parameter_text(float(anchor)) for anchor in weight)}]"
    return parameter_text(weight)


def _gradient_text(step: MergeStep) -> str:
    return f", weight={weight_text(step.weight)}" if isinstance(step.weight, tuple) else ""


def pair_plan(left: str, right: str, arm: Arm, weight: Weight = 0.5) -> MergePlan:
    """The plan of one two-way step, commuting sources sorted."""
    return MergePlan((MergeStep(left, right, arm, weight).canonical(),))


def pair_plans(pairs: Iterable[tuple[str, str]], arms: Sequence[Arm]) -> list[MergePlan]:
    """Every pair with every arm, pair by pair."""
    return [pair_plan(left, right, arm) for left, right in pairs for arm in arms]


def fold_plan(members: Sequence[str], arms: Sequence[Arm], weighting: str = "equal") -> MergePlan:
    """The left fold of two-way steps over checkpoints in the given order, with one arm for each step, or one for all.

    weighting: `equal` (right weight 1/(j+1) at step j: every member counts the same) or `halving` (0.5 each step: the
    last member gets half). Raises PlanError: fewer than two members, or another number of arms.
    """
    if weighting not in WEIGHTINGS:
        raise PlanError(unknown_name("weighting", weighting, WEIGHTINGS))
    num_steps = len(members) - 1
    if num_steps < 1 or len(arms) not in (1, num_steps):
        raise PlanError(f"{len(members)} checkpoints and {len(arms)} arms make no plan; one arm, or one for each step")
    steps = []
    for number in range(1, num_steps + 1):
        left = members[0] if number == 1 else f"#{number - 1}"
        weight = 1.0 / (number + 1) if weighting == "equal" else 0.5
        steps.append(MergeStep(left, members[number], arms[(number - 1) % len(arms)], weight))
    return MergePlan((steps[0].canonical(), *steps[1:]))


def fold_text(plan: MergePlan) -> str:
    """A fold in one line: `linear: a + b + c`, or `a + b (linear) + c (ties)` where the arms differ."""
    arms = [step.arm.label for step in plan.steps]
    members = [plan.steps[0].left, *(step.right for step in plan.steps)]
    if len(set(arms)) == 1:
        return f"{arms[0]}: {' + '.join(members)}"
    return members[0] + "".join(f" + {name} ({arm})" for name, arm in zip(members[1:], arms, strict=True))


def plan_from_json(value: Any) -> MergePlan:
    """Parse the JSON form. Raises PlanError, OperatorError: what is wrong, with the step's number."""
    if not isinstance(value, Mapping):
        raise PlanError("a plan is an object with 'steps' or 'members' (lists), or 'source' (a checkpoint id)")
    if "members" in value and "steps" not in value:
        return MergePlan(recipe=recipe_from_json(value))
    for key in value:
        if key not in (keys := ("steps", "source", "intermediate_dtype", "seed")):
            raise PlanError(unknown_name("key", str(key), keys))
    seed = value.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise PlanError(f"'seed' must be an integer, got {seed!r}")
    if isinstance(value.get("source"), str) and "steps" not in value:
        return MergePlan(source=value["source"])
    if not isinstance(value.get("steps"), list) or not value["steps"]:
        raise PlanError("a plan needs a non-empty list under 'steps'")
    steps = []
    known = {"left", "right", "operator", "weight", "parameters"}
    for number, step in enumerate(value["steps"], 1):
        if not isinstance(step, Mapping):
            raise PlanError(f"step {number}: expected an object, got {type(step).__name__}")
        for key in step:
            if key not in known:
                raise PlanError(f"step {number}: {unknown_name('key', key, known)}")
        for key in ("left", "right", "operator"):
            if not isinstance(step.get(key), str):
                raise PlanError(f"step {number}: {key!r} must be a string, got {step.get(key)!r}")
        weight, parameters = step.get("weight", 0.5), step.get("parameters", {})
        if not isinstance(parameters, Mapping):
            raise PlanError(f"step {number}: 'parameters' must be an object, got {parameters!r}")
        steps.append(MergeStep(step["left"], step["right"], make_arm(step["operator"], parameters), weight))
    return MergePlan(tuple(steps), intermediate_dtype=str(value.get("intermediate_dtype", "float32")), seed=seed)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan with the checkpoints it names: everything that is needed to merge, small enough to send anywhere."""

    plan: MergePlan
    checkpoints: tuple[CheckpointRef, ...]
    base: CheckpointRef | None

    def __post_init__(self) -> None:
        known = {ref.id for ref in self.checkpoints}
        for member in self.plan.members:
            if member not in known:
                raise PlanError(unknown_name("checkpoint", member, known))
        if self.plan.needs_base and self.base is None:
            names = sorted({arm.operator for arm in self.plan.arms if arm.spec.needs_base})
            raise OperatorError(f"operator {', '.join(names)} needs a base checkpoint; the catalogue names none")
        without = [ref.id for ref in self.checkpoints if ref.grams is None]
        if self.plan.needs_grams and without:
            names = sorted({arm.operator for arm in self.plan.arms if arm.spec.needs_grams})
            raise OperatorError(
                f"operator {', '.join(names)} needs Gram matrices, and {', '.join(without)} has none; make them by "
                "`simmerge tune CATALOGUE --probes PROBES --method regmean --out DIR` and use DIR/catalogue.yaml"
            )

    @property
    def used_refs(self) -> tuple[CheckpointRef, ...]:
        """The checkpoints that are read: members, then the base if an operator takes it."""
        return (*self.checkpoints, *((self.base,) if self.base and self.plan.uses_base else ()))


def resolve_plan(plan: MergePlan, catalogue: Catalogue) -> ResolvedPlan:
    """Look up the checkpoints of a plan.

    Raises PlanError: the catalogue lacks one. OperatorError: an operator needs a base and there is none.
    """
    return ResolvedPlan(plan, tuple(catalogue.ref(member) for member in plan.members), catalogue.base)


def unmerged(ref: CheckpointRef) -> ResolvedPlan:
    """The plan of one unmerged checkpoint."""
    return ResolvedPlan(MergePlan(source=ref.id), (ref,), None)


def write_plan(path: Place, resolved: ResolvedPlan, predicted: Mapping[str, Any] | None = None) -> None:
    """Write a plan file: the steps, the paths of the checkpoints, and (for the reader) the predicted utilities."""
    write_json(
        path,
        {
            **resolved.plan.to_json(),
            "checkpoints": {ref.id: str(ref.path) for ref in resolved.checkpoints},
            "adapters": {ref.id: str(ref.adapter) for ref in resolved.checkpoints if ref.adapter},
            "grams": {ref.id: str(ref.grams) for ref in resolved.checkpoints if ref.grams},
            "base": {"id": resolved.base.id, "path": str(resolved.base.path)} if resolved.base else None,
            "predicted": dict(predicted) if predicted else None,
            "versions": versions(),
        },
    )


def read_plan(path: Place) -> tuple[ResolvedPlan, dict[str, Any] | None]:
    """Read a plan file (its paths are relative to it): the plan with its checkpoints, and predicted utilities, if any.

    Raises PlanError, OperatorError: unreadable, or not a plan.
    """
    wanted = "a plan is JSON that `simmerge plan --out` writes, or mergekit's YAML, named .yaml"
    value = read_json_object(path, lambda problem: PlanError(f"plan: {problem}; {wanted}"))
    if not isinstance(value.get("checkpoints"), dict):
        raise PlanError(
            f"plan {path}: needs 'steps' and 'checkpoints' ({{id: path}}); `simmerge plan` writes such files"
        )
    value.pop("versions", None)
    base, predicted = value.pop("base", None), value.pop("predicted", None)
    if base is not None and not (isinstance(base, dict) and isinstance(base.get("id"), str) and "path" in base):
        raise PlanError(f"plan {path}: 'base' is an object with 'id' and 'path', got {shown_value(base)}")
    if predicted is not None and not (isinstance(predicted, dict) and all(map(_is_prediction, predicted.values()))):
        raise PlanError(
            f"plan {path}: 'predicted' holds an object for each task or owner, of 'utility' and 'sd', 'measured' and "
            f"'se', or 'retention', all numbers or null; got {shown_value(predicted)}"
        )
    paths, adapters, grams = (_places_in(path, value.pop(key, None), key) for key in _PLACES)
    base_ref = CheckpointRef(base["id"], place_in(path.parent, base["path"])) if base else None
    base_id = base["id"] if base else None
    refs = tuple(CheckpointRef(i, where, base_id, adapters.get(i), grams.get(i)) for i, where in paths.items())
    plan = plan_from_json(value)
    return ResolvedPlan(plan, tuple(ref for ref in refs if ref.id in plan.members), base_ref), predicted


_PLACES = ("checkpoints", "adapters", "grams")
_PREDICTED = (("utility", "sd"), ("measured", "se"), ("retention",))  # each with those beside it, or none of them


def _is_prediction(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    given = [names for names in _PREDICTED if names[0] in value]
    return all(type(value.get(name, "")) in (int, float, type(None)) for names in given for name in names)


def _places_in(path: Place, value: Any, key: str) -> dict[str, Place]:
    """Directories by checkpoint, of a plan file. Raises PlanError: no object; InputError: not a path."""
    if not isinstance(value or {}, dict):
        raise PlanError(f"plan {path}: {key!r} is an object {{id: path}}, got {shown_value(value)}")
    return {name: place_in(path.parent, where) for name, where in (value or {}).items()}
