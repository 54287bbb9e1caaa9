"""Checkpoints of `.bin` files (pickles), converted once to safetensors in a cache; a merge then reads those.

A pickle can run code and lie about sizes. It is read by `torch.load(weights_only=True)` in a process of its own with
a limit on memory, and no tensor may be larger than its file. `SIMMERGE_CONVERTED_DIR`: the cache's directory, which
needs as much room as the `.bin` files (default `~/.cache/simmerge_ray/checkpoints/converted`).
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import CheckpointError, first_line, shown_value
from simmerge_ray.base.storage import Place, digest_bytes, file_names, file_version, read_json_object
from simmerge_ray.checkpoints.references import ADAPTER_FILE, CheckpointRef

DIRECTORY_VARIABLE = "SIMMERGE_CONVERTED_DIR"
_DEFAULT_DIRECTORY = "~/.cache/simmerge_ray/checkpoints/converted"
_INDEX, _SINGLE, _ADAPTER = "pytorch_model.bin.index.json", "pytorch_model.bin", "adapter_model.bin"
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "cls.predictions.decoder.weight")
_FREE_BYTES = 16 << 30  # of address space beside the file: libraries
_CHUNK = 1 << 24
_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip

_log = logging.getLogger(__name__)


def converted(ref: CheckpointRef) -> Path:
    """Directory of safetensors with the tensors of a checkpoint of `.bin` files, made when it is not there.

    Raises CheckpointError: a file is damaged or refused, lies in a store, or the cache has no room.
    """
    return _converted(ref, ref.path, _files(ref))


def adapter_file(ref: CheckpointRef) -> Place:
    """The safetensors file of a checkpoint's adapter, converted from its `.bin` file where it has only that.

    Raises CheckpointError: it has neither, or see `converted`.
    """
    assert ref.adapter is not None
    names = file_names(ref.adapter) or set()
    if ADAPTER_FILE in names:
        return ref.adapter / ADAPTER_FILE
    if _ADAPTER in names:
        return _converted(ref, ref.adapter, [ref.adapter / _ADAPTER]) / "model-00001-of-00001.safetensors"
    raise ref.error(f"{ref.adapter} holds no {ADAPTER_FILE}")


def _converted(ref: CheckpointRef, path: Place, places: Sequence[Place]) -> Path:
    files = [place for place in places if isinstance(place, Path)]
    if not files:
        raise ref.error(f"{path} holds .bin files; they are converted on a disk: copy the directory to one")
    try:
        parts = [f"{file.resolve()}\0{file_version(file)}" for file in files]
        root = Path(os.environ.get(DIRECTORY_VARIABLE) or _DEFAULT_DIRECTORY).expanduser()
        target = root / digest_bytes("\n".join(parts).encode())
        if target.exists():
            return target
        _log.warning("converting %s to safetensors, once; that is slower than reading safetensors", path)
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    except (OSError, RuntimeError) as error:
        raise ref.error(f"its .bin files cannot be converted: {error}") from None
    try:
        needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(root).free
        if free < needed:
            raise ref.error(
                f"converting its .bin files takes {needed / 1e9:.2f} GB, {root} has {free / 1e9:.2f} GB free; "
                f"set {DIRECTORY_VARIABLE}"
            )
        _run(ref, files, partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _files(ref: CheckpointRef) -> list[Place]:
    there = file_names(ref.path) or set()
    if _INDEX not in there:
        return [ref.path / _SINGLE]
    weight_map = read_json_object(ref.path / _INDEX, ref.error).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ref.error(f"{ref.path / _INDEX} has no 'weight_map', the shard of every tensor")
    for name in weight_map.values():
        if not isinstance(name, str) or name not in there:  # a name with a slash is no file of this directory
            raise ref.error(f"{ref.path / _INDEX} names {shown_value(name)}, which is no file beside it")
    return [ref.path / name for name in sorted(set(weight_map.values()))]


def _run(ref: CheckpointRef, files: Sequence[Path], target: Path) -> None:
    command = [sys.executable, "-m", "simmerge_ray.checkpoints.pickles", *map(str, files), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"the converting process ended with {done.returncode}"
        raise ref.error(f"its .bin files are refused: {reason[:300]}")


def convert(files: Sequence[Path], target: Path) -> None:
    """What the process does: each file to one of safetensors, and an index.

    Raises CheckpointError: a file is no pickle of tensors, or holds what is refused.
    """
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        size = file.stat().st_size
        _limit_memory(4 * size + _FREE_BYTES)
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = _tensors(file, size)
        _write(target / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _limit_memory(num_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _tensors(file: Path, size: int) -> dict[str, Any]:
    """The tensors of one file; of two that share their memory, an output layer is left out, as in safetensors."""
    import torch

    with open(file, "rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever a pickle can raise
        raise CheckpointError(f"{file.name} is no pickle of tensors alone: {first_line(error)}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file.name} holds a {type(content).__name__}, not tensors by name")
    found: dict[str, Any] = {}
    places: dict[tuple[Any, ...], str] = {}
    total = 0
    for name, tensor in content.items():
        if not isinstance(name, str) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{file.name} holds {str(name)[:60]!r}, which is no tensor; save the weights alone")
        if str(tensor.dtype) not in _DTYPES or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{file.name}: tensor {name[:60]!r} is {tensor.dtype}, {tensor.layout}")
        tensor = tensor.detach()
        total += tensor.numel() * tensor.element_size()
        if total > 2 * size:
            raise CheckpointError(f"{file.name}: its tensors are larger than the file at {name[:60]!r}")
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype))
        if tensor.numel() and place in places and name.endswith(_HEADS):
            continue
        if tensor.numel() and place in places and places[place].endswith(_HEADS):
            del found[places[place]]
        places[place] = name
        found[name] = tensor
    return dict(sorted(found.items()))


def _write(file: Path, tensors: Mapping[str, Any]) -> None:
    """A safetensors file, tensor after tensor, so that none is held twice."""
    import torch

    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            if tensor.numel():
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                for start in range(0, len(data), _CHUNK):
                    stream.write(data[start : start + _CHUNK])


if __name__ == "__main__":
    try:
        convert([Path(name) for name in sys.argv[1:-1]], Path(sys.argv[-1]))
    except (CheckpointError, MemoryError, OSError) as error:
        raise SystemExit(str(error) or f"{type(error).__name__}: more memory than 4 times the file") from None
