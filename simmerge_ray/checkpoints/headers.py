"""Headers of safetensors files: the place of every tensor of a checkpoint. They need no torch and read no weights.

Only safetensors are read. Of a store the headers are read as ranges; weights come block by block through the node's
cache (`storage.open_ranges`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from simmerge_ray.base.arrays import MAX_EMPTY
from simmerge_ray.base.errors import problem_list, shown_value
from simmerge_ray.base.json_text import JsonError, parse_json
from simmerge_ray.base.storage import (
    Place,
    RemotePath,
    file_names,
    file_size,
    file_version,
    open_file,
    read_json_object,
    read_range,
)
from simmerge_ray.checkpoints.formats import is_pickled, what_is_there
from simmerge_ray.checkpoints.pickles import converted
from simmerge_ray.checkpoints.references import ADAPTER_CONFIG, CheckpointRef

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")
_MAX_HEADER_BYTES, _MAX_TENSORS = 1 << 25, 250_000  # of one file; the largest models have a thousandth in each
_MAX_DIMENSIONS = 64
_FIRST_BYTES = 1 << 16  # most headers are shorter
_KEYS = ("dtype", "shape", "data_offsets")
_NUM_BITS = {
    "F64": 64, "F32": 32, "BF16": 16, "F16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class TensorSpec(NamedTuple):
    """The place of a tensor: file, dtype as safetensors names it (`F32`, `BF16`, ...), shape, bytes [begin, end)."""

    file: Place
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def read_header(ref: CheckpointRef, file: Place) -> dict[str, TensorSpec]:
    """The tensors of one safetensors file, for messages about `ref`. CheckpointError: missing, or not what the format
    allows: see `_checked_specs`.
    """
    try:
        if isinstance(file, RemotePath):
            return dict(_remote_header(file, file_version(file)))
        return _local_header(file)
    except OSError as error:
        raise ref.error(f"cannot read {file}: {error.strerror}") from None
    except _HeaderError as error:
        raise ref.error(f"{file} is no sound safetensors file: {error}") from None


class _HeaderError(Exception):
    """What is wrong with a header."""


@lru_cache(maxsize=4096)
def _remote_header(file: RemotePath, version: str) -> dict[str, TensorSpec]:
    """The tensors of an object, cached until it is written again: every stage asks for them many times."""
    size = file_size(file)
    first = read_range(file, 0, min(_FIRST_BYTES, size))
    start = _header_end(first, size)
    if start > len(first):
        first += read_range(file, len(first), start)
    return _checked_specs(file, first[8:start], start, size)


def _local_header(file: Path) -> dict[str, TensorSpec]:
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        start = _header_end(first := stream.read(8), size)
        return _checked_specs(file, stream.read(start - len(first)), start, size)


def _header_end(first: bytes, size: int) -> int:
    """Where the tensors of a file of `size` bytes start, by its first bytes."""
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or not 2 <= length <= size - 8:
        raise _HeaderError(f"its first 8 bytes are not the length of a header; it has {size} bytes")
    if length > _MAX_HEADER_BYTES:
        raise _HeaderError(f"it asks for a header of {length} bytes; at most {_MAX_HEADER_BYTES} are read")
    return 8 + length


def _checked_specs(file: Place, header: bytes, start: int, size: int) -> dict[str, TensorSpec]:
    """The tensors that a header describes, with all the rules of the format, which the library of the format checks as
    well: each has a known dtype, a shape and two offsets in whole numbers; it takes as many bytes as its shape and its
    dtype say; together they fill the file without a gap, an overlap, or a byte after the last.
    """
    if header[:1] != b"{":
        raise _HeaderError("its header is no JSON object")
    try:
        content = parse_json(header, checks_values=False)
    except JsonError as error:
        raise _HeaderError(f"its header is {error}") from None
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _HeaderError("its __metadata__ is no object of texts")
    if len(content) > _MAX_TENSORS:
        raise _HeaderError(f"it holds {len(content)} tensors; at most {_MAX_TENSORS} are read")
    try:
        dtypes, shapes, offsets = ([about[key] for about in content.values()] for key in _KEYS)
        if {*map(type, shapes), *map(type, offsets)} - {list} or max(map(len, shapes), default=0) > _MAX_DIMENSIONS:
            raise ValueError
        if {type(number) for number in chain(chain.from_iterable(shapes), chain.from_iterable(offsets))} - {int}:
            raise ValueError  # before any product: a number times a list, or a text, is a long one
        num_bits = [_NUM_BITS[dtype] * math.prod(shape) for dtype, shape in zip(dtypes, shapes, strict=True)]
        begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
        sizes = [8 * (end - begin) for begin, end in offsets]
        is_sound = (
            not any(map(_is_endless, shapes)) and min(chain(begins, *shapes), default=0) >= 0 and num_bits == sizes
        )
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise _HeaderError(_first_problem(content))
    specs = {
        name: TensorSpec(file, dtype, tuple(shape), start + begin, start + end)
        for (name, dtype, shape, begin, end) in zip(content, dtypes, shapes, begins, ends, strict=True)
    }
    last = ends[-1] if ends else 0
    if begins[:1] not in ([], [0]) or begins[1:] != ends[:-1]:  # as most files are written
        last = _check_filled(zip(begins, ends, content, strict=True))
    if start + last != size:
        problem = "is truncated" if size < start + last else "has bytes that belong to no tensor"
        raise _HeaderError(f"it {problem}: {size} bytes, its header asks for {start + last}")
    return specs


def _is_endless(shape: Sequence[int]) -> bool:
    """Whether a shape without elements, which takes no byte, has a side that nobody could go along."""
    return 0 in shape and max(shape) > MAX_EMPTY


def _check_filled(spans: Iterable[tuple[int, int, str]]) -> int:
    """Where the last tensor ends; spans: begin, end and name of each. Raises _HeaderError: a gap, or an overlap."""
    last = 0
    for begin, end, name in sorted(spans):
        if begin != last:
            problem = "overlaps the one before it" if begin < last else "leaves a gap before it"
            raise _HeaderError(f"tensor {shown_value(name)} {problem}: its bytes start at {begin}, not at {last}")
        last = end
    return last


def _first_problem(content: Mapping[str, Any]) -> str:
    """What is wrong with the first tensor that does not agree with itself."""
    for name, about in content.items():
        try:
            dtype, shape, (begin, end) = (about[key] for key in _KEYS)
            is_sound = type(shape) is list and len(shape) <= _MAX_DIMENSIONS and type(about[_KEYS[-1]]) is list
            is_sound = is_sound and {type(one) for one in (begin, end, *shape)} == {int} and min((begin, *shape)) >= 0
            num_bits = _NUM_BITS[dtype] * math.prod(shape) if is_sound else 0
            is_sound = is_sound and not _is_endless(shape)
        except (KeyError, TypeError, ValueError):
            is_sound = False
        if not is_sound:
            return (
                f"tensor {shown_value(name)} is described by {shown_value(about)}; needed are a 'dtype' of "
                f"{', '.join(_NUM_BITS)}, a 'shape' and two 'data_offsets', all of integers from 0 on, at most "
                f"{_MAX_DIMENSIONS} of them"
            )
        if num_bits != 8 * (end - begin):
            takes = f"{num_bits / 8:g}" if num_bits < 2**64 else "more than 2^61"
            return (
                f"tensor {shown_value(name)}, {dtype} of shape {shown_value(shape)}, takes {takes} bytes, its "
                f"data_offsets {shown_value([begin, end])} give it {shown_value(end - begin)}"
            )
    raise AssertionError("every tensor is sound by itself")


def read_headers(ref: CheckpointRef) -> dict[str, TensorSpec]:
    """All tensors of a checkpoint by name, in name order, from the headers alone.

    Raises CheckpointError: no safetensors there, an adapter without its model, a shard missing or damaged.
    """
    names = file_names(ref.path)
    if names is None:
        raise ref.error(f"{ref.path} is not a directory")
    if ADAPTER_CONFIG in names and "config.json" not in names:
        raise ref.error(
            f"{ref.path} holds an adapter without its model; give the model's directory as "
            "`path` and this directory as `adapter` (in mergekit's YAML `model: MODEL+ADAPTER`)"
        )
    if _INDEX_FILE in names:
        weight_map, shards = _read_index(ref)
        if missing := [shard for shard in shards if shard not in names]:
            raise ref.error(
                f"{ref.path / _INDEX_FILE} names {len(missing)} files that are not beside it, e.g. {missing[0]}; "
                "fetch them, too"
            )
        files = [ref.path / shard for shard in shards]
    elif _SINGLE_FILE in names:
        weight_map, files = None, [ref.path / _SINGLE_FILE]
    elif is_pickled(names):
        return read_headers(CheckpointRef(ref.id, converted(ref)))
    else:
        hint = what_is_there(names)
        raise ref.error(f"{ref.path} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; only safetensors are read{hint}")
    specs: dict[str, TensorSpec] = {}
    for file in files:
        found = read_header(ref, file)
        named = file.name
        if weight_map is not None and (wrong := sorted(name for name in found if weight_map.get(name) != named)):
            said = weight_map.get(wrong[0])
            where = f"the index says {said}" if said else "the index does not name it"
            raise ref.error(f"{file} holds the tensor {shown_value(wrong[0])}, and {where}")
        specs |= found
    if weight_map is not None and (missing := sorted(set(weight_map) - set(specs))):
        raise ref.error(problem_list("tensors named in the index are in no shard:", map(shown_value, missing)))
    if not specs:
        raise ref.error(f"{ref.path} holds no tensors: the header of {files[0]} is empty" if files else "no file")
    return dict(sorted(specs.items()))


def _read_index(ref: CheckpointRef) -> tuple[dict[str, str], list[str]]:
    """The shard of every tensor, and all shards, by name."""
    file = ref.path / _INDEX_FILE
    weight_map = read_json_object(file, ref.error).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ref.error(f"{file} has no 'weight_map', the shard of every tensor")
    # A checkpoint says nothing about files that are not its own.
    shards = sorted({shard if isinstance(shard, str) else repr(shard) for shard in weight_map.values()})
    for shard in shards:
        if not _SHARD.fullmatch(shard):
            raise ref.error(f"{file} names {shown_value(shard)}, which is no safetensors file beside it")
    return weight_map, shards
