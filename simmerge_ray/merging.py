"""Run a plan tensor by tensor: as an iterator into a live engine, or into a new checkpoint directory.

A fold is computed per tensor in float32, so no intermediate checkpoint exists anywhere; memory is bounded by the
inputs of one tensor plus one output shard.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmerge_ray.checkpoints import TensorReader, TensorSpec, check_compatible, checkpoint_digest
from simmerge_ray.errors import CheckpointError
from simmerge_ray.operators.table import OPERATORS
from simmerge_ray.plans import MergePlan, ResolvedPlan, write_plan
from simmerge_ray.storage import Manifest, new_directory

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def merge_tensor(plan: MergePlan, sources: Mapping[str, Tensor], base: Tensor | None) -> Tensor:
    """One tensor of the merge.

    Args:
        sources: the tensor of every member, by id. base: the base's, or None.

    Returns:
        the merged tensor in the dtype of the first member; a tensor that is not floating point is copied.

    Raises:
        CheckpointError: a tensor that is not floating point differs between the members.
    """
    first = sources[plan.members[0]]
    if plan.source is not None:
        return first
    if not first.is_floating_point():
        for member in plan.members[1:]:
            if not torch.equal(sources[member], first):
                raise CheckpointError(f"an integer tensor differs between {plan.members[0]!r} and {member!r}")
        return first
    values: dict[str, Tensor] = dict(sources)
    for number, step in enumerate(plan.steps, 1):
        operator = OPERATORS[step.arm.operator]
        base_tensor = base if step.arm.spec.uses_base else None
        values[f"#{number}"] = operator(
            base_tensor, values[step.left], values[step.right], weight=step.weight, **step.arm.param_dict()
        )
    return values[f"#{len(plan.steps)}"].to(first.dtype)


def merged_tensors(resolved: ResolvedPlan) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of the merge, one at a time, in name order. Inputs are taken as checked (`check_compatible`)."""
    readers = {ref.id: TensorReader(ref) for ref in resolved.checkpoints}
    base_reader = TensorReader(resolved.base) if resolved.base and resolved.plan.uses_base else None
    for name in readers[resolved.plan.members[0]].specs:
        sources = {checkpoint_id: reader.read(name) for checkpoint_id, reader in readers.items()}
        yield name, merge_tensor(resolved.plan, sources, base_reader.read(name) if base_reader else None)


class FiniteStream:
    """`merged_tensors` for an evaluation engine, where a merge that is not finite must not be measured.

    The stream itself never stops at such a tensor: an engine whose loading breaks off in the middle is unusable.
    Call `check` when it has been consumed.
    """

    def __init__(self, resolved: ResolvedPlan) -> None:
        self._resolved = resolved
        self._not_finite: str | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in merged_tensors(self._resolved):
            if self._not_finite is None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                self._not_finite = name
            yield name, tensor

    def check(self) -> None:
        """Refuse what was streamed.

        Raises:
            CheckpointError: a tensor of the merge holds NaN or infinity.
        """
        if self._not_finite is not None:
            label = self._resolved.plan.label
            raise CheckpointError(f"merge {label!r}: tensor {self._not_finite} holds NaN or infinity")


def write_merge(
    resolved: ResolvedPlan,
    out: Path,
    predicted: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the merge as a Hugging Face checkpoint directory, which appears under its name only when complete.

    Args:
        predicted: utilities for the model card. progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the target exists and is no merge of ours, or an input is unreadable or unlike the others.
    """
    if out.exists() and not (out / "simmerge_plan.json").exists():
        raise CheckpointError(
            f"{out} exists and is not a merge made by simmerge; choose another directory or remove it"
        )
    started = time.monotonic()
    check_compatible(resolved.used_refs)
    first = resolved.checkpoints[0]
    shards = _plan_shards(TensorReader(first).specs, max_shard_bytes)
    num_bytes = sum(_num_bytes(spec) for spec in TensorReader(first).specs.values())
    with new_directory(out) as target:
        _write_shards(resolved, target, shards, num_bytes, progress)
        for name in _COPIED_FILES:
            if (first.path / name).exists():
                shutil.copyfile(first.path / name, target / name)
        (target / "README.md").write_text(_model_card(resolved, predicted))
        write_plan(target / "simmerge_plan.json", resolved, predicted)
        digests = {f"checkpoint {ref.id}": checkpoint_digest(ref) for ref in resolved.used_refs}
        manifest = Manifest("merge", resolved.plan.to_json() | {"max_shard_bytes": max_shard_bytes}, digests)
        manifest.write(target / "simmerge_manifest.json", time.monotonic() - started, {"num_bytes": num_bytes})
    return out


def _num_bytes(spec: TensorSpec) -> int:
    if spec.dtype not in _DTYPE_BYTES:
        raise CheckpointError(f"{spec.file}: dtype {spec.dtype} is not supported; dequantise the checkpoint first")
    count = 1
    for size in spec.shape:
        count *= size
    return count * _DTYPE_BYTES[spec.dtype]


def _plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Tensor names per output file, in name order, none over the limit unless a single tensor is."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = _num_bytes(spec)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shards(
    resolved: ResolvedPlan,
    target: Path,
    shards: list[list[str]],
    num_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    from safetensors.torch import save_file

    stream = merged_tensors(resolved)
    weight_map: dict[str, str] = {}
    done = 0
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard: dict[str, Tensor] = {}
        for _ in names:
            name, tensor = next(stream)
            shard[name] = tensor.contiguous()
            weight_map[name] = file
            done += tensor.numel() * tensor.element_size()
            if progress:
                progress(done, num_bytes)
        save_file(shard, str(target / file), metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _model_card(resolved: ResolvedPlan, predicted: Mapping[str, Any] | None) -> str:
    members = [ref.id for ref in resolved.checkpoints]
    base_models = [ref.id for ref in resolved.used_refs]
    lines = ["---", "library_name: transformers", "tags:", "- merge", "- simmerge_ray", "base_model:"]
    lines += [f"- {name}" for name in base_models]
    lines += [
        "---",
        "",
        f"# Merge of {' and '.join(members)}",
        "",
        "Made by simmerge_ray from this plan:",
        "",
        "```json",
    ]
    lines += [json.dumps(resolved.plan.to_json(), indent=2), "```", ""]
    if predicted:
        lines += ["| task | predicted utility | sd |", "|---|---|---|"]
        lines += [f"| {task} | {value['utility']:.3f} | {value['sd']:.3f} |" for task, value in predicted.items()]
        lines += [""]
    return "\n".join(lines)
