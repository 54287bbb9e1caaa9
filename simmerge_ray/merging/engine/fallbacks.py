"""Which spherical steps of a plan are the linear average on every tensor, found without making the merge."""

from __future__ import annotations

from dataclasses import replace

from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine.compute import Computer
from simmerge_ray.merging.engine.global_trims import resolve_global_trims
from simmerge_ray.merging.engine.sources import open_sources
from simmerge_ray.merging.graph import FLOAT_DTYPES
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, ResolvedPlan

_LINEAR = make_arm("linear")


def all_linear(plan: MergePlan) -> MergePlan:
    """The plan with every spherical step written as `linear`: what it would be if all of them fell back."""
    return _as_linear(plan, _spherical(plan))


def _spherical(plan: MergePlan) -> set[int]:
    """Numbers of the spherical steps; a recipe is step 1."""
    return {number for number, arm in enumerate(plan.arms, 1) if arm.spec.is_spherical}


def _as_linear(plan: MergePlan, chosen: set[int]) -> MergePlan:
    if plan.recipe is not None:
        return replace(plan, recipe=replace(plan.recipe, arm=_LINEAR)) if chosen else plan
    steps = [replace(step, arm=_LINEAR) if n in chosen else step for n, step in enumerate(plan.steps, 1)]
    return replace(plan, steps=tuple(steps))


def linear_form(resolved: ResolvedPlan) -> MergePlan:
    """The plan with every SLERP or NuSLERP step that falls back on all tensors written as `linear`.

    Plans with one linear form are one merge, up to the last rounding. Only norms and dots are computed, the smallest
    tensors first, so that a plan whose steps have an arc is known as such at once. Steps that need whole tensors
    (`flatten=false`, float64) stay as they are.
    """
    plan = resolved.plan
    left = _spherical(plan)
    if not left:
        return plan
    graph = resolve_global_trims(compile_plan(resolved, check=False), num_threads=1)
    with open_sources(graph) as sources:
        computer = Computer(graph, sources)
        for output in sorted(graph.outputs, key=lambda output: (output.num_elements, output.name)):
            if output.dtype in FLOAT_DTYPES:
                left &= computer.fallbacks(output)
            if not left:
                break
    return _as_linear(plan, left)
