"""A plan of two-way steps -> text of a mergekit file that gives the same model."""

from __future__ import annotations

from simmerge_ray.base.errors import PlanError
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.graph import DTYPE_NAMES, FLOAT_DTYPES, promoted
from simmerge_ray.merging.mergekit.documents import (
    MergekitDocument,
    ModelName,
    Parameters,
    Rule,
    Source,
    documents_text,
)
from simmerge_ray.merging.mergekit.methods import METHODS, Method
from simmerge_ray.plans.operators.gradients import Scalar
from simmerge_ray.plans.operators.specs import Arm
from simmerge_ray.plans.plan import MergeStep, ResolvedPlan, weight_text
from simmerge_ray.plans.recipe import GroupWeights, MemberWeight, Recipe


def write_mergekit(plan: ResolvedPlan) -> str:
    """The plan as a mergekit file; a plan of several steps has a document for each (for `mergekit-multimerge`).

    Checkpoints stand by their absolute paths. mergekit computes in the dtype of its inputs; `dtype: float32` makes it
    compute as we do, and `out_dtype` is that of our output. The masks of random operators (DARE, DELLA) come from
    another generator there, so such a merge is equal in distribution only.

    Raises PlanError: mergekit cannot express the plan; with the reason.
    """
    return documents_text(_documents(plan))


def _documents(resolved: ResolvedPlan) -> tuple[MergekitDocument, ...]:
    plan = resolved.plan
    names = {ref.id: _name(ref) for ref in resolved.checkpoints}
    if plan.source is not None:
        return (MergekitDocument("passthrough", models=(Source(names[plan.source]),)),)
    if len(plan.steps) > 1:
        for ref in resolved.used_refs:
            if "+" in str(ref.path.resolve()) or "@" in str(ref.path.resolve()):
                raise PlanError(f"{ref.path}: mergekit reads '+' and '@' in paths of a file with several documents")
    compute_dtype, out_dtype = _dtypes(resolved)
    if plan.recipe is not None:
        models, base, parameters = _recipe(plan.recipe, names, resolved.base)
        document = MergekitDocument(
            plan.recipe.arm.operator,
            models=models,
            base_model=base,
            parameters=parameters,
            dtype=compute_dtype,
            out_dtype=out_dtype,
        )
        return (document,)
    names |= {f"#{number}": ModelName(f"step{number}") for number in range(1, len(plan.steps) + 1)}
    documents = []
    for number, step in enumerate(plan.steps, 1):
        is_last = number == len(plan.steps)
        models, base, parameters = _step(step, number, names, resolved.base)
        documents.append(
            MergekitDocument(
                step.arm.operator,
                models=models,
                base_model=base,
                parameters=parameters,
                dtype=compute_dtype,
                out_dtype=out_dtype if is_last or plan.intermediate_dtype == "out" else compute_dtype,
                name=None if is_last else f"step{number}",
            )
        )
    return tuple(documents)


def _name(ref: CheckpointRef) -> ModelName:
    return ModelName(str(ref.path.resolve()), adapter=str(ref.adapter.resolve()) if ref.adapter else None)


def _step(
    step: MergeStep, number: int, names: dict[str, ModelName], base: CheckpointRef | None
) -> tuple[tuple[Source, ...], ModelName | None, Parameters]:
    """Models, base and parameters of a step's document."""
    operator, method = step.arm.operator, METHODS.get(step.arm.operator)
    if method is None or method.max_sources == 1:
        raise PlanError(f"step {number}: mergekit has no two-way {operator!r}")
    left, right = names[step.left], names[step.right]
    if left == right:
        raise PlanError(f"step {number}: {step.left!r} and {step.right!r} lie in one directory, mergekit refuses that")
    parameters = _parameters(step.arm, method, number)
    if method.base == "first":
        return (Source(left), Source(right)), left, {"t": _setting(*step.anchors), **parameters}
    base_name = _name(base) if base is not None and step.arm.spec.uses_base else None
    if not method.base_is_apart:
        base_name = None  # mergekit would merge it with the others
    elif base_name in (left, right):
        raise PlanError(f"step {number}: the base is one of the two models, and mergekit's {operator} leaves it out")
    if "weight" not in method.parameters:
        if step.weight != 0.5:
            raise PlanError(
                f"step {number}: mergekit's {operator} has no weights; {weight_text(step.weight)} cannot be expressed"
            )
        return (Source(left), Source(right)), base_name, parameters
    models = tuple(
        Source(name, parameters={"weight": _setting(*anchors)})
        for name, anchors in zip((left, right), step.source_anchors, strict=True)
    )
    return models, base_name, parameters


def _recipe(
    recipe: Recipe, names: dict[str, ModelName], base: CheckpointRef | None
) -> tuple[tuple[Source, ...], ModelName | None, Parameters]:
    """Models, base and parameters of a recipe's document: a rule with a filter for each group of tensors."""
    operator, method = recipe.arm.operator, METHODS.get(recipe.arm.operator)
    if method is None or method.base == "first" or method.max_sources == 1:
        raise PlanError(f"mergekit has no n-ary {operator!r} with a weight for each model")
    if len(set(names[member] for member in recipe.members)) < len(recipe.members):
        raise PlanError("two members lie in one directory, mergekit refuses that")
    base_name = _name(base) if base is not None and recipe.arm.spec.uses_base and method.base_is_apart else None
    if base_name in [names[member] for member in recipe.members]:
        raise PlanError(f"the base is one of the models, and mergekit's {operator} leaves it out")
    parameters = _parameters(recipe.arm, method, 1)
    if "weight" not in method.parameters:
        if len(set(recipe.weights)) > 1:
            raise PlanError(f"mergekit's {operator} has no weights; these differ: {recipe.label}")
        return tuple(Source(names[member]) for member in recipe.members), base_name, parameters
    models = tuple(
        Source(names[member], parameters={"weight": _weight_setting(weight)})
        for member, weight in zip(recipe.members, recipe.weights, strict=True)
    )
    return models, base_name, parameters


def _weight_setting(weight: MemberWeight) -> tuple[Rule, ...]:
    if isinstance(weight, GroupWeights):
        return (*(Rule((value,), part) for part, value in weight.filters), Rule((weight.default,)))
    return _setting(*weight) if isinstance(weight, tuple) else _setting(weight)


def _setting(*values: Scalar) -> tuple[Rule, ...]:
    return (Rule(values),)


def _parameters(arm: Arm, method: Method, number: int) -> Parameters:
    """The parameters of an arm under mergekit's names, defaults written out: mergekit's may be others."""
    theirs = {
        parameter.operator_name: name
        for name, parameter in method.parameters.items()
        if parameter.operator_name and not parameter.is_ours
    }
    parameters = {}
    for name, value in arm.param_dict().items():
        if name in theirs:
            parameters[theirs[name]] = _setting(value)
        elif value != arm.spec.parameters[name].default:
            raise PlanError(
                f"step {number}: mergekit's {arm.operator} has no {name!r}; "
                f"it can only be {arm.spec.parameters[name].default!r}, not {value!r}"
            )
    return parameters


def _dtypes(resolved: ResolvedPlan) -> tuple[str | None, str | None]:
    """dtype and out_dtype of the documents; none where tensors have several dtypes, which mergekit promotes itself."""
    headers = {ref.id: read_headers(ref) for ref in resolved.used_refs}
    outputs = {
        name: promoted([headers[member][name].dtype for member in resolved.plan.members if name in headers[member]])
        for name in headers[resolved.plan.members[0]]
    }
    found = set(outputs.values())
    stored = {spec.dtype for specs in headers.values() for spec in specs.values()}
    if len(found) == 1 and found <= set(FLOAT_DTYPES):
        return "float64" if "F64" in stored else "float32", DTYPE_NAMES[found.pop()]
    if len(resolved.plan.steps) > 1:
        kinds = ", ".join(sorted(found))
        raise PlanError(f"mergekit cannot keep tensors of several dtypes ({kinds}) apart in a merge of several steps")
    base = headers.get(resolved.base.id, {}) if resolved.base else {}
    if any(name in base and promoted([dtype, base[name].dtype]) != dtype for name, dtype in outputs.items()):
        raise PlanError(
            "mergekit promotes to the base's dtype, which is wider than that of the models for some tensors"
        )
    return None, None
