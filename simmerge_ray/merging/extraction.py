"""The low-rank part of a fine-tune as a PEFT adapter, matrix by matrix.

Each change `D = W - W_base` is cut to its largest singular values by a randomised decomposition (Halko, Martinsson and
Tropp 2011, arXiv:0909.4061): `D ~ s B A` with `B = U sqrt(S) / s`, `A = sqrt(S) V^T`. Memory: a few float32 copies of
the largest matrix, and one tensor of the adapter.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmerge_ray.base.errors import CheckpointError, OutputError
from simmerge_ray.base.extraction import ExtractConfig
from simmerge_ray.base.markdown import table_lines
from simmerge_ray.base.storage import Output, Place, check_outputs, new_directory
from simmerge_ray.checkpoints.compatibility import config_problems, refuse_problems, unsupported_problems
from simmerge_ray.checkpoints.headers import TensorSpec
from simmerge_ray.checkpoints.kinds import TENSOR_KINDS, tensor_kind
from simmerge_ray.checkpoints.references import ADAPTER_CONFIG, ADAPTER_FILE, CheckpointRef, read_config
from simmerge_ray.merging.engine.seeds import seed_of
from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.merging.engine.whole import flat_tensor
from simmerge_ray.merging.graph import DTYPE_NAMES, FLOAT_DTYPES, OutputTensor, Read
from simmerge_ray.merging.write.layout import Layout, Placement, plan_layout, preallocate
from simmerge_ray.plans.operators.gradients import split_layer

_PREFIX = "base_model.model."
_EMBEDDINGS, _HEADS = ("embed_tokens", "wte", "word_embeddings"), ("lm_head", "embed_out")
_EMBEDDING_WEIGHTS = tuple(f"{name}.weight" for name in _EMBEDDINGS)
_HEAD = "lm_head.weight"
_TWIN = f"{_PREFIX}{_HEAD}"  # of a saved embedding that is tied to it
_ELEMENTS, _ROWS = 1 << 20, 1024  # of a block
_CONV1D_MODELS = ("gpt2", "openai-gpt")
_REPORT = "extraction.json"


@dataclass(frozen=True)
class Extraction:
    """What was written: the share of the change that each kind of tensor keeps, and what the adapter leaves out.

    kept: by kind, sqrt(1 - |D - D_adapter|^2 / |D|^2) over its tensors, 1 where nothing changed. left_out: changed
    tensors that have no place in the adapter. num_matrices: of low rank. num_bytes: of the adapter.
    """

    path: Place
    kept: Mapping[str, float]
    left_out: tuple[str, ...]
    num_matrices: int
    num_bytes: int

    def lines(self) -> list[str]:
        """What a person should know."""
        lines = [f"kept of the change, {kind}: {share:.1%} of its norm" for kind, share in self.kept.items()]
        return lines + [f"changed, and not in the adapter: {line}" for line in _left_out_lines(self.left_out)]


def _left_out_lines(names: Sequence[str]) -> Iterator[str]:
    """Changed tensors that an adapter lacks, and the option that keeps such."""
    biases = [name for name in names if name.endswith(".bias")]
    others = [name for name in names if not name.endswith(".bias")]
    for group, kind, option in ((biases, "biases", "--bias all"), (others, "tensors", "--save-module")):
        if group:
            shown = ", ".join(group[:5]) + (" ..." if len(group) > 5 else "")
            yield f"{len(group)} {kind}: {shown} ({option} keeps them)"


@dataclass(frozen=True)
class _Part:
    """What the adapter holds of one tensor of the model: the two matrices of a module, or the tensor itself.

    key: the name of the tensor itself in the adapter's file; "" for two matrices.
    """

    tensor: str
    module: str
    kind: str  # "linear", "transposed", "embedding", "saved", "bias"
    rank: int = 0
    key: str = ""


@dataclass
class _Norms:
    """Sums over tensors of one kind: of squared changes, and of what the adapter misses of them."""

    changed: float = 0.0
    missed: float = 0.0


@dataclass(frozen=True)
class _Plan:
    parts: tuple[_Part, ...]
    targets: tuple[str, ...]
    saved: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]
    is_tied: bool
    norms: dict[str, _Norms] = field(default_factory=lambda: defaultdict(_Norms))


def adapter_output(out: Place) -> Output:
    """The directory of an adapter, for `check_outputs`: an older one there may be replaced."""
    return Output(out, marks=(_REPORT,), kind="an adapter made by `simmerge extract-lora`")


def extract_lora(
    finetuned: CheckpointRef,
    base: CheckpointRef,
    config: ExtractConfig,
    out: Place,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write the adapter directory `out`, which appears under its name when it is whole.

    Raises:
        IncompatibleCheckpointsError, CheckpointError: the two do not fit each other, or cannot be read.
        OutputError: `out` exists and is no adapter made by this, or cannot be written (`check_outputs`).
    """
    check_outputs([adapter_output(out)], {"the fine-tune": finetuned.path, "the base": base.path})
    fine, original = TensorSource(finetuned), TensorSource(base)
    try:
        _check(finetuned, base, fine.specs, original.specs)
        plan = _plan(base, fine.specs, config)
        layout = plan_layout(plan.outputs, max_shard_bytes=1 << 62)
        with new_directory(out) as partial:
            preallocate(partial, layout)
            (partial / layout.shards[0].file).rename(partial / ADAPTER_FILE)
            left_out = _fill(partial / ADAPTER_FILE, layout, plan, fine, original, config, progress)
            kept = {kind: _share(plan.norms[kind]) for kind in TENSOR_KINDS if plan.norms[kind].changed}
            _write_beside(partial, finetuned, base, config, plan, kept, left_out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}") from None
    finally:
        fine.close()
        original.close()
    num_matrices = sum(not part.key for part in plan.parts)
    return Extraction(out, kept, tuple(left_out), num_matrices, layout.num_bytes)


def _fill(
    file: Path,
    layout: Layout,
    plan: _Plan,
    fine: TensorSource,
    original: TensorSource,
    config: ExtractConfig,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Make and write the adapter's tensors, one tensor of the model after the other; changed ones that it lacks."""
    parts = {part.tensor: part for part in plan.parts}
    placements = {placement.output.name: placement for placement in layout.placements}
    left_out = []
    descriptor = os.open(file, os.O_WRONLY)
    try:
        for number, name in enumerate(fine.specs, 1):
            tensors = _made(name, parts.get(name), fine, original, config, plan.norms[tensor_kind(name)])
            if tensors is None:
                left_out.append(name)
            for key, tensor in (tensors or {}).items():
                is_twin = plan.is_tied and _TWIN in placements and key.endswith(_EMBEDDING_WEIGHTS)
                for each in (key, _TWIN) if is_twin else (key,):
                    _write(descriptor, placements[each], tensor)
            if progress:
                progress(number, len(fine.specs))
    finally:
        os.close(descriptor)
    return left_out


def low_rank(change: Tensor, rank: int, oversampling: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """`up` (rows, rank), `down` (rank, columns) whose product is near the best approximation of that rank."""
    num = min(change.shape)
    if rank + oversampling >= num // 2:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        right = right.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, values, right = torch.svd_lowrank(change, q=rank + oversampling, niter=iterations)
    roots = values[:rank].clamp(min=0).sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:, :rank].T


def _check(
    finetuned: CheckpointRef, base: CheckpointRef, fine: Mapping[str, TensorSpec], original: Mapping[str, TensorSpec]
) -> None:
    configs = read_config(base), read_config(finetuned)
    problems = unsupported_problems(base, original, configs[0]) + unsupported_problems(finetuned, fine, configs[1])
    problems += config_problems((base.id, configs[0]), (finetuned.id, configs[1]))
    for title, names in (("lacks", original.keys() - fine.keys()), ("also has", fine.keys() - original.keys())):
        if names:
            problems.append(f"tensors: {finetuned.id!r} {title} {', '.join(sorted(names)[:3])}, compared with its base")
    for name in sorted(fine.keys() & original.keys()):
        if fine[name].shape != original[name].shape:
            problems.append(f"shape of {name}: {fine[name].shape}, in the base {original[name].shape}")
    refuse_problems(problems)


def _plan(base: CheckpointRef, specs: Mapping[str, TensorSpec], config: ExtractConfig) -> _Plan:
    """Which tensors the adapter holds, and how."""
    model = read_config(base)
    has_head = any(name.removesuffix(".weight").endswith(_HEADS) for name in specs)
    tied = bool(model.get("tie_word_embeddings", not has_head))
    saved = _saved_modules(base, specs, config, tied)
    parts = []
    for name, spec in specs.items():
        module, _, leaf = name.rpartition(".")
        last = module.rpartition(".")[2]
        if spec.dtype not in FLOAT_DTYPES:
            continue
        if _is_saved(module, saved):
            parts.append(_Part(name, module, "saved", key=f"{_PREFIX}{name}"))
            continue
        if leaf == "bias" and config.bias == "all":
            parts.append(_Part(name, module, "bias", key=f"{_PREFIX}{name}"))
            continue
        is_embedding, is_head = last.endswith(_EMBEDDINGS), last.endswith(_HEADS)
        wanted = config.embeddings if is_embedding or is_head else split_layer(name) is not None
        if config.target_modules:
            wanted = last in config.target_modules
        if leaf != "weight" or len(spec.shape) != 2 or not wanted:
            continue
        if tied and (is_embedding or is_head):
            raise base.error(
                f"{name} is tied to the other end of the model, and no adapter of low rank can change both alike; "
                f"keep it whole with --save-module {last}"
            )
        kind = "embedding" if is_embedding else "transposed" if model.get("model_type") in _CONV1D_MODELS else "linear"
        parts.append(_Part(name, module, kind, min(config.rank, *spec.shape)))
    for wanted_module in (*config.target_modules, *config.modules_to_save):
        if not any(_is_saved(part.module, (wanted_module,)) or (tied and wanted_module in _HEADS) for part in parts):
            raise CheckpointError(f"{base.id!r} has no weights in {wanted_module!r} that an adapter can hold")
    layers = {part.module for part in parts if not part.key}
    if not layers:
        raise CheckpointError(f"{base.id!r} has no matrices that an adapter can hold")
    # peft wraps the layers that it changes, and names their biases so.
    parts = [
        replace(part, key=f"{_PREFIX}{part.module}.base_layer.bias")
        if part.kind == "bias" and part.module in layers
        else part
        for part in parts
    ]
    return _Plan(tuple(parts), _targets(parts, specs), saved, tuple(_outputs(parts, specs, config, tied)), tied)


def _is_saved(module: str, saved: tuple[str, ...]) -> bool:
    """peft's rule for `modules_to_save`: a module, or one that it is in, whose name ends so."""
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1)) if saved else False


def _targets(parts: list[_Part], specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """`target_modules`: the last parts of the names, or whole names where others end alike."""
    lasts = {part.module: part.module.rpartition(".")[2] for part in parts if not part.key}
    others = {module.rpartition(".")[2] for name in specs if (module := name.rpartition(".")[0]) not in lasts}
    return tuple(sorted({module if last in others else last for module, last in lasts.items()}))


def _saved_modules(
    base: CheckpointRef, specs: Mapping[str, TensorSpec], config: ExtractConfig, tied: bool
) -> tuple[str, ...]:
    """`modules_to_save`; of a tied model the two ends belong together."""
    saved = dict.fromkeys(config.modules_to_save)
    if tied and any(one in (*_EMBEDDINGS, *_HEADS) for one in saved):
        modules = {name.removesuffix(".weight").rpartition(".")[2] for name in specs}
        saved |= dict.fromkeys(one for one in _EMBEDDINGS if one in modules)
        saved |= {"lm_head": None}
    return tuple(saved)


def _outputs(
    parts: list[_Part], specs: Mapping[str, TensorSpec], config: ExtractConfig, tied: bool
) -> Iterator[OutputTensor]:
    """The tensors of the adapter's file."""
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    dtype = dtypes[config.dtype]
    for part in parts:
        node, shape = Read("", part.tensor), specs[part.tensor].shape
        if part.key:
            yield OutputTensor(part.key, shape, specs[part.tensor].dtype, node)
            if tied and part.module.endswith(_EMBEDDINGS) and not any(_HEAD in name for name in specs):
                yield OutputTensor(_TWIN, shape, specs[part.tensor].dtype, node)
            continue
        num_out, num_in = shape if part.kind == "linear" else reversed(shape)
        yield OutputTensor(_names(part)[0], (part.rank, num_in), dtype, node)
        yield OutputTensor(_names(part)[1], (num_out, part.rank), dtype, node)


def _names(part: _Part) -> tuple[str, str]:
    """Of the adapter's `A` and `B`."""
    stem = f"{_PREFIX}{part.module}.lora_"
    ends = ("embedding_A", "embedding_B") if part.kind == "embedding" else ("A.weight", "B.weight")
    return f"{stem}{ends[0]}", f"{stem}{ends[1]}"


def _made(
    name: str,
    part: _Part | None,
    fine: TensorSource,
    original: TensorSource,
    config: ExtractConfig,
    norms: _Norms,
) -> dict[str, Tensor] | None:
    """The adapter's tensors of one tensor; None where it changed and has no place there."""
    spec = fine.specs[name]
    if spec.dtype not in FLOAT_DTYPES:
        return {} if np.array_equal(fine.read_whole(name), original.read_whole(name)) else None
    is_matrix = part is not None and not part.key
    change = torch.empty(spec.shape) if is_matrix else None
    squared = 0.0
    for start, block in _changes(name, fine, original):
        squared += float(block.square().sum(dtype=torch.float64))
        if change is not None:
            change.view(-1)[start : start + block.numel()] = block
    if not math.isfinite(squared):
        raise CheckpointError(f"tensor {name} holds NaN or infinity")
    norms.changed += squared
    if part is None:
        norms.missed += squared
        return {} if not squared else None
    if change is None:
        return {part.key: flat_tensor(fine.read_whole(name))}
    is_turned = part.kind != "linear"
    matrix = change.T if is_turned else change
    up, down = low_rank(matrix, part.rank, config.oversampling, config.iterations, seed_of(config.seed, 0, (), name))
    scale = (config.alpha or config.rank) / config.rank
    stored = getattr(torch, config.dtype)
    up, down = (up / scale).to(stored), down.to(stored)
    for rows in range(0, len(matrix), _ROWS):
        missed = matrix[rows : rows + _ROWS] - scale * (up[rows : rows + _ROWS].float() @ down.float())
        norms.missed += float(missed.square().sum(dtype=torch.float64))
    return dict(zip(_names(part), (down, up), strict=True))


def _changes(name: str, fine: TensorSource, original: TensorSource) -> Iterator[tuple[int, Tensor]]:
    """(offset, change) of a tensor, flat float32 blocks."""
    num = math.prod(fine.specs[name].shape)
    rooms = [np.empty(min(num, _ELEMENTS), dtype=np.float32) for _ in range(2)]
    raw = np.empty(8 * min(num, _ELEMENTS), dtype=np.uint8)
    for start in range(0, num, _ELEMENTS):
        stop = min(start + _ELEMENTS, num)
        sides = zip((fine, original), rooms, strict=True)
        new, old = (source.read_float32(name, start, stop, raw, room) for source, room in sides)
        yield start, torch.from_numpy(new - old)


def _share(norms: _Norms) -> float:
    return math.sqrt(max(0.0, 1.0 - norms.missed / norms.changed))


def _write(descriptor: int, placement: Placement, tensor: Tensor) -> None:
    """A tensor at its place in the file."""
    data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).cast("B")
    assert len(data) == placement.output.num_bytes
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], placement.offset + done)


def _write_beside(
    directory: Any,
    finetuned: CheckpointRef,
    base: CheckpointRef,
    config: ExtractConfig,
    plan: _Plan,
    kept: Mapping[str, float],
    left_out: list[str],
) -> None:
    """`adapter_config.json` as peft reads it, what was kept, and a page about it."""
    ranks = {part.module: part.rank for part in plan.parts if not part.key and part.rank != config.rank}
    alpha = config.alpha or config.rank
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": ranks,
        # The change is the same whatever the rank: alpha over rank stays.
        "alpha_pattern": {module: alpha * rank / config.rank for module, rank in ranks.items()},
        "target_modules": list(plan.targets),
        "modules_to_save": list(plan.saved) or None,
        "ensure_weight_tying": plan.is_tied and "lm_head" in plan.saved,
        "fan_in_fan_out": any(part.kind == "transposed" for part in plan.parts),
        "lora_dropout": 0.0,
        "bias": config.bias,
        "init_lora_weights": True,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2))
    report = {"base": str(base.path), "finetuned": str(finetuned.path), "options": config.model_dump(mode="json")}
    report |= {"kept": dict(kept), "left_out": left_out}
    (directory / _REPORT).write_text(json.dumps(report, indent=2))
    lines = [
        "---",
        "library_name: peft",
        "tags: [lora, simmerge_ray]",
        "---",
        "",
        f"# Low-rank part of {finetuned.id}",
        "",
    ]
    lines += [f"Rank {config.rank}, of its difference to {base.id}, by `simmerge extract-lora`.", ""]
    rows = [(kind, f"{share:.1%}") for kind, share in kept.items()]
    lines += table_lines(("kind of tensor", "norm of the change kept"), rows)
    if left_out:
        lines += ["", "Changed by the fine-tune, and not in this adapter:", ""]
        lines += [f"- {line}" for line in _left_out_lines(left_out)]
    (directory / "README.md").write_text("\n".join([*lines, ""]))
