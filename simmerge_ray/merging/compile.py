"""From a plan of two-way steps to a merge graph; every problem that headers show is found here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from simmerge_ray.base.errors import CheckpointError, PlanError
from simmerge_ray.checkpoints.compatibility import check_compatible
from simmerge_ray.checkpoints.headers import TensorSpec, read_headers
from simmerge_ray.checkpoints.references import GRAMS, CheckpointRef, gram_name, read_config
from simmerge_ray.merging.graph import DTYPE_BYTES, Apply, MergeGraph, Node, OutputTensor, Read, promoted, with_dtype
from simmerge_ray.merging.mergekit import write_mergekit
from simmerge_ray.plans.operators.gradients import tensor_positions
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS
from simmerge_ray.plans.plan import ResolvedPlan


def compile_plan(resolved: ResolvedPlan, check: bool = True) -> MergeGraph:
    """The graph of a plan.

    Args:
        check: refuse checkpoints that do not fit each other, and word the plan for mergekit; False in memory, where the
            caller has checked and nothing is written beside the weights.

    Raises:
        IncompatibleCheckpointsError, CheckpointError: with every problem found, before a weight is read.
    """
    if check:
        check_compatible(resolved.used_refs)
    plan, base = resolved.plan, resolved.base if resolved.plan.uses_base else None
    refs: dict[str, CheckpointRef] = {ref.id: ref for ref in resolved.used_refs}
    specs = {ref.id: read_headers(ref) for ref in refs.values()}
    grams = {ref.id: gram_ref for ref in resolved.checkpoints if (gram_ref := ref.gram_ref) and plan.needs_grams}
    gram_specs = {member: read_headers(ref) for member, ref in grams.items()}
    positions = tensor_positions(specs[plan.members[0]])
    outputs = []
    for name, first in specs[plan.members[0]].items():
        dtypes = [specs[member][name].dtype for member in plan.members]
        for member, dtype in zip(plan.members, dtypes, strict=True):
            if dtype not in DTYPE_BYTES:
                raise CheckpointError(
                    f"checkpoint {member!r}: tensor {name} has dtype {dtype}, which cannot be merged; "
                    "dequantise the checkpoint first"
                )
        dtype = promoted(dtypes)
        node = _node(resolved, name, positions[name], base, dtype if plan.intermediate_dtype == "out" else None)
        node = _with_grams(node, name, gram_specs)
        outputs.append(OutputTensor(name, first.shape, dtype, node))
    return MergeGraph(
        outputs=tuple(outputs),
        checkpoints=refs | {ref.id: ref for ref in grams.values()},
        config=with_dtype(read_config(refs[plan.members[0]]), outputs),
        tokenizer_from=plan.members[0],
        members=plan.members,
        title=plan.label if plan.source is None else f"keep {plan.source}",
        description=plan.to_json(),
        mergekit=_mergekit_text(resolved) if check else None,
        seed=plan.seed,
    )


def _with_grams(node: Node, name: str, specs: Mapping[str, Mapping[str, TensorSpec]]) -> Node:
    """The node with the Gram matrices of its sources; an average where the tensor is of no linear layer.

    Raises CheckpointError: some sources have one for this tensor, others do not, or of the other kind of layer.
    """
    if not isinstance(node, Apply) or not OPERATOR_SPECS[node.operator].needs_grams:
        return node
    members = [source.checkpoint for source in node.sources if isinstance(source, Read)]
    axes = [[axis for axis in (0, 1) if gram_name(name, axis) in specs[member]] for member in members]
    if not any(axes):
        return replace(node, operator="linear", params=(("normalize", True),))
    if any(one != axes[0] for one in axes):
        raise CheckpointError(f"tensor {name}: not all of {', '.join(members)} have its Gram matrix; make them again")
    reads = (Read(f"{member}{GRAMS}", gram_name(name, axes[0][0])) for member in members)
    return replace(node, params=(*node.params, ("input_axis", axes[0][0])), grams=tuple(reads))


def _mergekit_text(resolved: ResolvedPlan) -> str | None:
    if not resolved.plan.is_merge:
        return None
    try:
        return write_mergekit(resolved)
    except PlanError:
        return None  # mergekit has no words for it; our own plan file has


def _node(resolved: ResolvedPlan, name: str, position: float, base: CheckpointRef | None, round_to: str | None) -> Node:
    plan = resolved.plan
    if plan.source is not None:
        return Read(plan.source, name)
    if (recipe := plan.recipe) is not None:
        return Apply(
            operator=recipe.arm.operator,
            sources=tuple(Read(member, name) for member in recipe.members),
            weights=recipe.weights_at(name, position),
            params=tuple(sorted(recipe.arm.param_dict().items())),
            base=Read(base.id, name) if base is not None else None,
            step=1,
        )
    results: dict[str, Node] = {}

    def source(key: str) -> Node:
        return results[key] if key in results else Read(key, name)

    for number, step in enumerate(plan.steps, 1):
        spec = step.arm.spec
        results[f"#{number}"] = Apply(
            operator=step.arm.operator,
            sources=(source(step.left), source(step.right)),
            weights=step.source_weights(position),
            params=tuple(sorted(step.arm.param_dict().items())),
            base=Read(base.id, name) if base is not None and spec.uses_base else None,
            step=number,
            round_to=round_to if number < len(plan.steps) else None,
        )
    return results[f"#{len(plan.steps)}"]
