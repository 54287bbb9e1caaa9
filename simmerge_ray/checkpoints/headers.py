"""Headers of safetensors files: the place of every tensor of a checkpoint. They need no torch and read no weights.

Only safetensors are read. Of a store the headers are read as ranges; weights come block by block through the node's
cache (`storage.open_ranges`).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import lru_cache

from simmerge_ray.base.storage import Place, RemotePath, file_names, file_size, file_version, read_range
from simmerge_ray.checkpoints.formats import is_pickled, what_is_there
from simmerge_ray.checkpoints.pickles import converted
from simmerge_ray.checkpoints.references import ADAPTER_CONFIG, CheckpointRef

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
_FIRST_BYTES = 1 << 16  # most headers are shorter


@dataclass(frozen=True)
class TensorSpec:
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
    """The tensors of one safetensors file, for messages about `ref`. CheckpointError: missing, damaged or truncated."""
    try:
        is_remote = isinstance(file, RemotePath)
        specs, start, size = _remote_header(file, file_version(file)) if is_remote else _header(file)
    except OSError as error:
        raise ref.error(f"cannot read {file}: {error.strerror}") from None
    except _NoHeaderError:
        raise ref.error(f"{file} is not a safetensors file (bad header length)") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ref.error(f"{file} has a damaged safetensors header") from None
    needed = max((spec.end for spec in specs.values()), default=start)
    if size != needed:
        raise ref.error(f"{file} is truncated: {size} bytes, its header asks for {needed}")
    return dict(specs)


class _NoHeaderError(Exception):
    """The first bytes are not the length of a header."""


@lru_cache(maxsize=4096)
def _remote_header(file: Place, version: str) -> tuple[dict[str, TensorSpec], int, int]:
    """`_header`, cached until the object is written again: every stage asks for it many times."""
    return _header(file)


def _header(file: Place) -> tuple[dict[str, TensorSpec], int, int]:
    """Tensors of a file, where the first one starts, and the size of the file."""
    size = file_size(file)
    first = read_range(file, 0, min(_FIRST_BYTES, size))
    length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else 0
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise _NoHeaderError
    start = 8 + length
    if start > len(first):
        first += read_range(file, len(first), min(start, size))
    specs = {
        name: TensorSpec(
            file,
            str(spec["dtype"]),
            tuple(map(int, spec["shape"])),
            start + int(spec["data_offsets"][0]),
            start + int(spec["data_offsets"][1]),
        )
        for name, spec in json.loads(first[8:start]).items()
        if name != "__metadata__"
    }
    return specs, start, size


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
            "`path` and this directory as `adapter`"
        )
    if _INDEX_FILE in names:
        try:
            weight_map = json.loads((ref.path / _INDEX_FILE).read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ref.error(f"{ref.path / _INDEX_FILE} is damaged") from None
        for shard in shards:  # a checkpoint says nothing about files that are not its own
            if not isinstance(shard, str) or "/" in shard or "\\" in shard or shard in ("", ".", ".."):
                raise ref.error(f"the index names {shard!r}, which is no file beside it")
        files = [ref.path / shard for shard in shards]
    elif _SINGLE_FILE in names:
        weight_map, files = None, [ref.path / _SINGLE_FILE]
    elif is_pickled(names):
        return read_headers(CheckpointRef(ref.id, converted(ref)))
    else:
        hint = what_is_there(names)
        raise ref.error(f"{ref.path} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; only safetensors are read{hint}")
    specs = {name: spec for file in files for name, spec in read_header(ref, file).items()}
    if weight_map is not None and (missing := sorted(set(weight_map) - set(specs))):
        raise ref.error(f"tensors named in the index are in no shard: {', '.join(missing[:5])}")
    return dict(sorted(specs.items()))
