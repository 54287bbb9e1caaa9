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
    return _as_linear(plan, set(range(1, len(plan.steps) + 1)))


def _as_linear(plan: MergePlan, numbers: set[int]) -> MergePlan:
    chosen = {number for number in numbers if plan.steps[number - 1].arm.spec.is_spherical}
    steps = [replace(step, arm=_LINEAR) if n in chosen else step for n, step in enumerate(plan.steps, 1)]
    return replace(plan, steps=tuple(steps))


def linear_form(resolved: ResolvedPlan) -> MergePlan:
    """The plan with every SLERP or NuSLERP step that falls back on all tensors written as `linear`.

    Plans with one linear form are one merge, up to the last rounding. Only norms and dots are computed, the smallest
    tensors first, so that a plan whose steps have an arc is known as such at once. Steps that need whole tensors
    (`flatten=false`, float64) stay as they are.
    """
    plan = resolved.plan
    left = {number for number, step in enumerate(plan.steps, 1) if step.arm.spec.is_spherical}
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
