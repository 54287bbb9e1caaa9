"""Merges in memory, and what they do on the probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine.compute import Computer
from simmerge_ray.merging.engine.sources import open_sources
from simmerge_ray.merging.engine.whole import flat_tensor
from simmerge_ray.merging.graph import FLOAT_DTYPES, Apply, Node
from simmerge_ray.merging.model import built_model, check_finite, put_tensors
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.signals.collect import check_logits, model_outputs
from simmerge_ray.signals.compute import join_outputs
from simmerge_ray.signals.signature import TaskOutputs
from simmerge_ray.signals.tokens import ProbeTokens
from simmerge_ray.signals.worker import as_arrays

Tensors = Mapping[str, torch.Tensor]


def merged_steps(plan: MergePlan, catalogue: Catalogue, dtype: str = "F32") -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of the result of every step, in order, by the merge engine, each made when it is asked for.

    dtype: to which results are rounded before they are given as float32, as safetensors names it. (The engine's own
    output has the dtype of its inputs.) Raises what `compile_plan` does.
    """
    graph = compile_plan(resolve_plan(plan, catalogue))
    with open_sources(graph) as sources:
        computer = Computer(graph, sources)
        for number in range(1, len(plan.steps) + 1):
            tensors = {}
            for whole in graph.outputs:
                kept = dtype if whole.dtype in FLOAT_DTYPES else whole.dtype
                node = _step(whole.node, number)
                assert node is not None  # every step is used by the last one
                output = replace(whole, dtype=kept, node=node)
                tensor = flat_tensor(computer.array(output)[0]).reshape(output.shape)
                tensors[output.name] = tensor.float() if output.dtype in FLOAT_DTYPES else tensor
            yield tensors


def _step(node: Node, number: int) -> Node | None:
    """The node of that step, somewhere under `node`."""
    if not isinstance(node, Apply) or node.step < number:
        return None
    if node.step == number:
        return node
    return next((found for source in node.sources if (found := _step(source, number)) is not None), None)


def model_of(tensors: Tensors, like: CheckpointRef, name: str) -> Any:
    """A transformers model with these tensors and the configuration of `like`, in float32, as `model.load_model`.

    Raises:
        CheckpointError: the tensors are not those of the model, or one holds NaN or infinity.
    """
    model, ref = built_model(like), replace(like, id=name)
    if not put_tensors(model, tensors.items()):
        raise ref.error("its tensors are not those of the model")
    check_finite(model, ref)
    return model.eval()


def run_probes(model: Any, like: CheckpointRef, tokens: ProbeTokens) -> TaskOutputs:
    """Outputs of a model on one task. Raises CheckpointError: its logits are not finite."""
    parts = [model_outputs(model, batch) for batch in tokens.batches]
    for part in parts:
        check_logits(like, part.logits)
    return join_outputs([as_arrays(part) for part in parts], tokens)
