"""What runs inside every worker of a vLLM engine: swap the weights of a merge in, and check that the model holds them.

The check after a swap compares a few columns of every matrix, other ones after every swap, and all other tensors as a
whole, bit by bit: what was streamed, cut to this rank's share, against what the model holds. On CPU matrices are packed
away: their columns are taken when they are packed, and one that was not packed again is noticed. The packed output
layer, and at the start of an engine every matrix, is asked by its own product with unit vectors, which gives columns
without rounding in any dtype; the product of all reads the whole model, a tenth of a swap.
vLLM reports nothing by itself when a tensor was not loaded, or when its pack still is the old one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.in_memory import FiniteStream
from simmerge_ray.plans.plan import ResolvedPlan, unmerged

_NUM_COLUMNS = 8


def _without_amx() -> None:
    """Make vLLM obey a limit that was set for oneDNN. Some virtual machines announce AMX and fault when bfloat16 uses
    it in torch, oneDNN and vLLM; ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 is the way out for the first two, but vLLM's
    kernels ask torch what the CPU has."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if "AMX" not in limit and limit not in ("ALL", "DEFAULT"):
        torch.cpu._is_amx_tile_supported = lambda: False


_without_amx()  # this module is imported by every rank before it builds its model


@dataclass(frozen=True)
class SwapReport:
    """How a swap ended on one rank; returned, since an executor with several processes makes exceptions text.

    not_finite: why the merge must not be measured; nothing was compared then. differences: not held by the model.
    """

    not_finite: str | None = None
    differences: tuple[str, ...] = ()


class MergeExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`): every rank streams and shards the merge for itself."""

    def simmerge_start(self, template: CheckpointRef) -> list[str]:
        """Learn what the check can compare, from an engine that vLLM itself has just loaded from `template`.

        What does not compare equal now has a layout that the check does not know (a model's own loader may transpose
        or permute), and is left out from then on. Returned is that, as `module.parameter (class)`.
        """
        # It warns at every swap of layers without weights and of a tied lm_head; what is missing is found here.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        self._simmerge_number = 0
        sample = self._sample()
        for _ in sample.taken(FiniteStream(unmerged(template))):
            pass
        self._simmerge_names = frozenset(sample.tensors)
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        unknown = {place for place, _ in differences(model, sample, (), by_product=True)}
        self._simmerge_unknown = frozenset(unknown)
        modules = dict(model.named_modules(remove_duplicate=False))
        return sorted(f"{place} ({type(modules[place.rpartition('.')[0]]).__name__})" for place in unknown)

    def simmerge_load(self, resolved: ResolvedPlan, num_threads: int = 1) -> SwapReport:
        """Replace the weights by the merge, computed on `num_threads`, and compare what the model then holds."""
        stream = FiniteStream(resolved, num_threads)
        sample = self._sample()
        with sample.of_packs():
            self.reload_weights(weights_iterator=sample.taken(stream))  # type: ignore[attr-defined]
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        repack_head(model)
        try:
            stream.check()
        except CheckpointError as error:
            return SwapReport(not_finite=str(error))
        problems = [f"{name} is missing in the merge" for name in sorted(self._simmerge_names - sample.tensors.keys())]
        problems += [
            f"{name} is not a tensor of the model" for name in sorted(sample.tensors.keys() - self._simmerge_names)
        ]
        problems += [f"{place}: {what}" for place, what in differences(model, sample, self._simmerge_unknown)]
        return SwapReport(differences=tuple(problems))

    def _sample(self) -> StreamSample:
        self._simmerge_number += 1
        dtype = self.model_runner.model_config.dtype  # type: ignore[attr-defined]
        return StreamSample(self._simmerge_number, dtype, self.parallel_config.tensor_parallel_size)  # type: ignore[attr-defined]


def repack_head(model: Any) -> None:
    """Pack the output layer again (CPU): a tied lm_head owns no tensor, so that a reload leaves its old pack in place,
    and the engine silently answers with the old output layer."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


class StreamSample:
    """What is kept of a stream of named tensors: a few columns of every matrix, other tensors as a whole.

    Args:
        number: of the swap; other columns each time, so that in the end all are seen. dtype: the engine's.
        num_ranks: every rank has a column in its share of a matrix that is sharded by columns.
    """

    def __init__(self, number: int, dtype: torch.dtype, num_ranks: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.packed: dict[nn.Module, Tensor] = {}
        self._number, self._dtype, self._count = number, dtype, max(_NUM_COLUMNS, num_ranks)

    def columns(self, width: int) -> range:
        """One column in each of equal strips of a matrix of that width."""
        count = min(self._count, width)
        strip = width // count
        return range((7 * self._number) % strip, strip * count, strip)

    def taken(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The stream, sampled on its way."""
        for name, tensor in stream:
            kept = tensor
            if tensor.dim() == 2:
                columns = self.columns(tensor.shape[1])
                kept = tensor[:, columns.start :: columns.step][:, : len(columns)]  # a view, several times faster
            self.tensors[name] = kept.to(self._dtype, copy=True)
            yield name, tensor

    @contextmanager
    def of_packs(self) -> Iterator[None]:
        """Take the columns of every matrix that vLLM packs meanwhile, just before it does (CPU)."""
        pack = utils.dispatch_cpu_unquantized_gemm

        def taking(layer: Any, remove_weight: bool) -> None:
            weight = layer.weight.detach()
            if weight.dim() == 2 and not weight.is_meta:
                self.packed[layer] = weight[:, local_columns(layer, self.columns(width_of(layer, weight)))[1]]
            pack(layer, remove_weight)

        utils.dispatch_cpu_unquantized_gemm = taking
        try:
            yield
        finally:
            utils.dispatch_cpu_unquantized_gemm = pack


def width_of(module: nn.Module, weight: Tensor) -> int:
    """Columns of the whole matrix, over all ranks; one that was packed has no shape any more."""
    return int(getattr(module, "input_size", None) or weight.shape[1])


def local_columns(module: nn.Module, columns: Sequence[int]) -> tuple[list[int], list[int]]:
    """Those of some columns of the whole matrix that this rank holds: places in `columns`, columns of its share."""
    if not isinstance(module, RowParallelLinear):
        return list(range(len(columns))), list(columns)
    first, width = module.tp_rank * module.input_size_per_partition, module.input_size_per_partition
    mine = [index for index, column in enumerate(columns) if first <= column < first + width]
    return mine, [columns[index] - first for index in mine]


def differences(
    model: Any, sample: StreamSample, skip: Collection[str], by_product: bool = False
) -> Iterator[tuple[str, str]]:
    """(`module.parameter`, what is wrong) of every parameter that is not this rank's share of what was streamed.
    by_product: ask every packed matrix by its product; else the output layer only."""
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    owners: dict[int, str] = {}  # a tied parameter has the name of the one that owns it
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            place = f"{path}.{name}"
            tied = owners.setdefault(id(parameter), place)
            if place in skip:
                continue
            parts = _parts(tied, packed, sample.tensors)
            if isinstance(parts, str):
                yield place, f"{parts} was not streamed"
            elif problem := _difference(module, name, parameter.detach(), torch.cat(parts), sample, by_product):
                yield place, problem


def _parts(place: str, packed: Mapping[str, list[str]], streamed: Mapping[str, Tensor]) -> list[Tensor] | str:
    """The sampled tensors that make up a parameter, or the name of one that is missing."""
    path, _, name = place.rpartition(".")
    parent, _, leaf = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    leaves = [leaf] if place in streamed else packed.get(leaf, [leaf])
    names = [f"{prefix}{one}.{name}" for one in leaves]
    missing = [one for one in names if one not in streamed]
    return missing[0] if missing else [streamed[one] for one in names]


def _difference(
    module: nn.Module, name: str, parameter: Tensor, whole: Tensor, sample: StreamSample, by_product: bool
) -> str | None:
    """What is wrong with a parameter of a module whose sampled checkpoint tensor is `whole`, or None."""
    matrix = name == "weight" and whole.dim() == 2
    columns: list[int] = []
    if matrix:
        mine, columns = local_columns(module, sample.columns(width_of(module, parameter)))
        whole = whole[:, mine]
    is_packed = matrix and hasattr(module, "cpu_linear")
    try:
        expected = whole if (rows := _rows(module)) is None else torch.cat([whole[start:end] for start, end in rows])
        found = []
        if parameter.numel():
            found.append(parameter[:, columns] if matrix else parameter)
        elif is_packed and not by_product:
            if module not in sample.packed:
                return "was not packed again"
            found.append(sample.packed[module])
        if is_packed and (isinstance(module, ParallelLMHead) or (by_product and not parameter.numel())):
            found.append(_columns_by_product(module, columns, expected.dtype))
    except (IndexError, RuntimeError) as error:
        return f"cannot be compared: {error}"
    for held in found:
        held = held[: len(expected)] if isinstance(module, VocabParallelEmbedding) else held  # padding rows follow
        if held.shape != expected.shape:
            return f"shape {tuple(held.shape)} instead of {tuple(expected.shape)}"
        if not torch.equal(held.to(expected), expected):  # a bias may be kept in float32
            worst = float((held.to(expected) - expected).abs().max())
            return f"values differ by up to {worst:.3g} from what was streamed"
    return None if found else "holds no data"


def _rows(module: nn.Module) -> list[tuple[int, int]] | None:
    """Which rows (start, end) of the checkpoint's tensors, one below the other, this rank holds; None is all."""
    if isinstance(module, VocabParallelEmbedding):
        return [(module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index)]
    if not isinstance(module, ColumnParallelLinear) or isinstance(module, ReplicatedLinear):
        return None
    if isinstance(module, QKVParallelLinear):
        heads = (module.total_num_heads, module.total_num_kv_heads, module.total_num_kv_heads)
        held = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
        sizes = (module.head_size, module.head_size, module.v_head_size)
        # With fewer key-value heads than ranks several ranks hold the same one.
        ranks = (module.tp_rank, *(2 * [module.tp_rank // module.num_kv_head_replicas]))
        lengths = [count * size for count, size in zip(heads, sizes, strict=True)]
        mine = [count * size for count, size in zip(held, sizes, strict=True)]
    else:
        lengths = list(getattr(module, "output_sizes", [module.output_size]))
        mine = [length // module.tp_size for length in lengths]
        ranks = (module.tp_rank,) * len(lengths)
    rows, offset = [], 0
    for length, count, rank in zip(lengths, mine, ranks, strict=True):
        rows.append((offset + rank * count, offset + (rank + 1) * count))
        offset += length
    return rows


def _columns_by_product(module: Any, columns: list[int], dtype: torch.dtype) -> Tensor:
    """Columns of a matrix by its own product with unit vectors: every sum has one term that is not zero."""
    width = getattr(module, "input_size_per_partition", module.input_size)
    units = torch.zeros(len(columns), width, dtype=dtype)
    units[range(len(columns)), columns] = 1.0
    with torch.inference_mode():
        return module.quant_method.apply(module, units, None).T
