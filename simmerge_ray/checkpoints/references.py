"""Checkpoints on a disk or in a store: references, headers, identity, and whether they can be merged.

Only safetensors are read. Headers, digests and the compatibility check need no torch and read no weights (the digest
of a checkpoint reads its bytes). Of a store ranges are read: headers by themselves, weights block by block through the
node's cache (`storage.open_ranges`).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmerge_ray.base.errors import CheckpointError, IncompatibleCheckpointsError
from simmerge_ray.base.storage import (
    Place,
    RemotePath,
    as_place,
    digest_bytes,
    file_names,
    file_size,
    file_version,
    local_directory,
    open_ranges,
    place_in,
    read_range,
)

if TYPE_CHECKING:
    from torch import Tensor

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_MAX_HEADER_BYTES = 100_000_000
_FIRST_BYTES = 1 << 16  # most headers are shorter
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
# What must be equal for tensors of the same name to mean the same thing.
_ARCHITECTURE_KEYS = (
    "model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "tie_word_embeddings", "n_embd", "n_layer", "n_head",
)  # fmt: skip


_MERGEABLE_DTYPES = ("F64", "F32", "BF16", "F16", "I64", "I32", "I16", "BOOL")  # integers are copied
_VOCABULARY_REMEDY = "resize the embeddings or choose checkpoints with the same vocabulary"


@dataclass(frozen=True)
class CheckpointRef:
    """A reference to a checkpoint, never its weights. `base_id` names the common ancestor in the same catalogue.

    adapter: directory of a PEFT LoRA adapter that is added to the weights as they are read (see `adapters`).
    """

    id: str
    path: Place
    base_id: str | None = None
    adapter: Place | None = None


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies: file, dtype as safetensors names it (`F32`, `BF16`, ...), shape, bytes [begin, end)."""

    file: Place
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(ref: CheckpointRef, file: Place) -> dict[str, TensorSpec]:
    """The tensors of one safetensors file, for messages about `ref`.

    Raises:
        CheckpointError: missing, damaged or truncated.
    """
    try:
        specs, start, size = _remote_header(file, file_version(file)) if _is_remote(file) else _header(file)
    except OSError as error:
        raise CheckpointError(f"checkpoint {ref.id!r}: cannot read {file}: {error.strerror}") from None
    except _NoHeaderError:
        raise CheckpointError(f"checkpoint {ref.id!r}: {file} is not a safetensors file (bad header length)") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"checkpoint {ref.id!r}: {file} has a damaged safetensors header") from None
    needed = max((spec.end for spec in specs.values()), default=start)
    if size != needed:
        raise CheckpointError(f"checkpoint {ref.id!r}: {file} is truncated: {size} bytes, its header asks for {needed}")
    return dict(specs)


class _NoHeaderError(Exception):
    """The length of the header is none."""


@lru_cache(maxsize=4096)
def _remote_header(file: Place, version: str) -> tuple[dict[str, TensorSpec], int, int]:
    """`_header`, kept while the object is not written again: every stage asks for it many times."""
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


def _is_remote(file: Place) -> bool:
    return isinstance(file, RemotePath)


def locate_checkpoint(
    model: str,
    revision: str | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    directory: Place = Path(),
) -> CheckpointRef:
    """A checkpoint by directory, URI or hub id, with a LoRA adapter or without; hub files are fetched to the cache.

    Args:
        directory: where relative paths start.

    Raises:
        CheckpointError: neither a directory nor a repository that can be had.
    """
    path = _locate(model, revision, directory, "config.json")
    found = _locate(adapter, adapter_revision, directory, "adapter_config.json") if adapter else None
    text = model + (f"@{revision}" if revision else "") + (f"+{adapter}" if adapter else "")
    return CheckpointRef(text + (f"@{adapter_revision}" if adapter_revision else ""), path, adapter=found)


def _locate(name: str, revision: str | None, directory: Place, mark: str) -> Place:
    place = place_in(directory, as_place(name).expanduser())
    if place.is_dir():
        if revision is not None:
            raise CheckpointError(f"{name!r} is a directory; the revision {revision!r} has no meaning for it")
        return place.resolve()
    if isinstance(as_place(name), RemotePath):
        raise CheckpointError(f"{place} is not a directory: nothing lies below that name")
    local = directory / name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{local} is not a directory (and {name!r} is no hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md"],
            )
        )
    except Exception as error:  # the hub client raises errors of many libraries
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name!r} is neither a directory nor a hub repository that can be had: {type(error).__name__}: {reason}"
        ) from None


def read_headers(ref: CheckpointRef) -> dict[str, TensorSpec]:
    """All tensors of a checkpoint by name, in name order, from the headers alone.

    Raises:
        CheckpointError: no such directory, no safetensors in it, an adapter without its model, a shard missing or
            damaged.
    """
    names = file_names(ref.path)
    if names is None:
        raise CheckpointError(f"checkpoint {ref.id!r}: {ref.path} is not a directory")
    if _ADAPTER_CONFIG in names and "config.json" not in names:
        raise CheckpointError(
            f"checkpoint {ref.id!r}: {ref.path} holds an adapter without its model; give the model's directory as "
            "`path` and this directory as `adapter`"
        )
    if _INDEX_FILE in names:
        try:
            weight_map = json.loads((ref.path / _INDEX_FILE).read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"checkpoint {ref.id!r}: {ref.path / _INDEX_FILE} is damaged") from None
        for shard in shards:  # a checkpoint says nothing about files that are not its own
            if not isinstance(shard, str) or "/" in shard or "\\" in shard or shard in ("", ".", ".."):
                raise CheckpointError(f"checkpoint {ref.id!r}: the index names {shard!r}, which is no file beside it")
        files = [ref.path / shard for shard in shards]
    elif _SINGLE_FILE in names:
        weight_map, files = None, [ref.path / _SINGLE_FILE]
    else:
        hint = "; convert its .bin files first" if any(name.endswith(".bin") for name in names) else ""
        raise CheckpointError(
            f"checkpoint {ref.id!r}: {ref.path} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; "
            f"only safetensors are read{hint}"
        )
    specs = {name: spec for file in files for name, spec in read_header(ref, file).items()}
    if weight_map is not None and (missing := sorted(set(weight_map) - set(specs))):
        raise CheckpointError(
            f"checkpoint {ref.id!r}: tensors named in the index are in no shard: {', '.join(missing[:5])}"
        )
    return dict(sorted(specs.items()))


def read_config(ref: CheckpointRef) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
        CheckpointError: missing or not JSON.
    """
    try:
        return json.loads((ref.path / "config.json").read_text())
    except OSError:
        raise CheckpointError(f"checkpoint {ref.id!r}: {ref.path} holds no readable config.json") from None
    except ValueError:
        raise CheckpointError(f"checkpoint {ref.id!r}: {ref.path / 'config.json'} is not JSON") from None


def context_limit(ref: CheckpointRef) -> int | None:
    """The longest sequence, in tokens, that the checkpoint's positions allow; None where `config.json` names no limit.

    Raises:
        CheckpointError: see `read_config`.
    """
    config = read_config(ref)
    limit = config.get("max_position_embeddings") or config.get("n_positions")  # the latter is GPT-2's name
    return int(limit) if limit else None


def tokenizer_digest(ref: CheckpointRef) -> str:
    """Identity of a tokenizer: its vocabulary and merges, not its cosmetics.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    files = tokenizer_files(ref)
    if files[0].name != "tokenizer.json":
        return digest_bytes(*(file.read_bytes() for file in files))
    try:
        content = json.loads(files[0].read_bytes())
        kept = {
            key: content.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")
        }
    except (ValueError, AttributeError):
        raise CheckpointError(f"checkpoint {ref.id!r}: {files[0]} is damaged") from None
    return digest_bytes(json.dumps(kept, sort_keys=True).encode())


def same_tokenizer(first: CheckpointRef, other: CheckpointRef) -> bool:
    """Whether two tokenizers have one digest. Equal files are not parsed, which takes 0.3 s each.

    Raises:
        CheckpointError: see `tokenizer_digest`.
    """
    files = [[file.read_bytes() for file in tokenizer_files(ref)] for ref in (first, other)]
    return files[0] == files[1] or tokenizer_digest(first) == tokenizer_digest(other)


def tokenizer_files(ref: CheckpointRef) -> list[Place]:
    """`tokenizer.json`, or else the older files.

    Raises:
        CheckpointError: there is none.
    """
    names = file_names(ref.path) or ()
    found = [ref.path / name for name in _TOKENIZER_FILES if name in names]
    if not found:
        raise CheckpointError(f"checkpoint {ref.id!r}: {ref.path} holds no tokenizer files")
    return found[:1] if found[0].name == "tokenizer.json" else found


def checkpoint_digest(ref: CheckpointRef) -> str:
    """Identity of a checkpoint: names, dtypes, shapes and bytes of its tensors, whatever the sharding.

    With an adapter its tensors and its `adapter_config.json` count, too. A new upload under an old name has another
    digest. Reads every byte once.

    Raises:
        CheckpointError: the checkpoint or its adapter is missing or unreadable.
    """
    state = hashlib.blake2b(digest_size=16)
    _add_tensors(state, read_headers(ref))
    if ref.adapter is not None:
        try:
            config = (ref.adapter / _ADAPTER_CONFIG).read_bytes()
        except OSError:
            raise CheckpointError(f"checkpoint {ref.id!r}: {ref.adapter} holds no {_ADAPTER_CONFIG}") from None
        state.update(b"\0adapter\0" + len(config).to_bytes(8, "little") + config)
        _add_tensors(state, dict(sorted(read_header(ref, ref.adapter / _ADAPTER_FILE).items())))
    return state.hexdigest()


def _add_tensors(state: hashlib.blake2b, specs: Mapping[str, TensorSpec]) -> None:
    readers = {file: open_ranges(file) for file in sorted({spec.file for spec in specs.values()}, key=str)}
    room = memoryview(bytearray(1 << 24))
    try:
        for name, spec in specs.items():
            state.update(f"{name}\0{spec.dtype}\0{spec.shape}\0".encode())
            for start in range(spec.begin, spec.end, len(room)):
                part = room[: min(len(room), spec.end - start)]
                state.update(part[: readers[spec.file].read_into(start, part, spec.end)])
    finally:
        for reader in readers.values():
            reader.close()


def checkpoint_fingerprint(ref: CheckpointRef) -> str:
    """Identity of the files as they lie: headers, sizes and times of change. Reads no weights.

    Says whether a merge that was interrupted may go on; `checkpoint_digest` is the identity of the weights.
    """
    state = hashlib.blake2b(digest_size=16)
    for name, spec in read_headers(ref).items():
        state.update(f"{name}\0{spec.dtype}\0{spec.shape}\0{spec.file.name}\0{spec.begin}\0".encode())
    files = {spec.file for spec in read_headers(ref).values()}
    if ref.adapter is not None:
        files |= set(ref.adapter.glob("adapter_*"))
    for file in sorted(files, key=str):
        state.update(f"{file.name}\0{file_version(file)}\0".encode())
    return state.hexdigest()


class TensorReader:
    """Reads named tensors of one checkpoint; keeps its files open, holds no tensor."""

    def __init__(self, ref: CheckpointRef) -> None:
        self.specs: Mapping[str, TensorSpec] = read_headers(ref)
        self._handles: dict[Place, Any] = {}

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype."""
        from safetensors import safe_open

        file = self.specs[name].file
        if file not in self._handles:
            self._handles[file] = safe_open(str(file), framework="pt")
        return self._handles[file].get_tensor(name)


def local_files(ref: CheckpointRef, weights: bool = False) -> AbstractContextManager[Path]:
    """A local directory with what other libraries read by name: `config.json`, the tokenizer, chat templates.

    It is the checkpoint's own directory where that is local; of one in a store the small files are in the node's cache
    while the block runs.

    Args:
        weights: the weights, too: for an engine that loads them itself. All else reads them by ranges.

    Raises:
        StorageError: the cache has no room for them, or the store does not answer.
    """
    suffixes = (*_SMALL_SUFFIXES, ".safetensors") if weights else _SMALL_SUFFIXES
    return local_directory(ref.path, lambda name: name.endswith(suffixes))


def unsupported_problems(ref: CheckpointRef, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> list[str]:
    """What keeps a checkpoint from being merged at all, with the remedy: quantised weights, mixtures of experts."""
    problems = []
    quantised = sorted({spec.dtype for spec in specs.values()} - set(_MERGEABLE_DTYPES))
    if quantised or config.get("quantization_config"):
        found = f"tensors of dtype {', '.join(quantised)}" if quantised else "quantization_config"
        problems.append(f"checkpoint {ref.id!r} is quantised ({found}); dequantise it first")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(config.get(key), int) and config[key] > 1:
            problems.append(
                f"checkpoint {ref.id!r} is a mixture of experts ({key}: {config[key]}), which is not supported: "
                "experts of one number need not have one role; merge dense checkpoints"
            )
    return problems


def compatibility_problems(refs: Sequence[CheckpointRef]) -> list[str]:
    """Everything that keeps the checkpoints from being merged, each line with the checkpoint, the value and the rule.

    Reads headers, `config.json` and the tokenizer only. Unreadable checkpoints are problems too.
    """
    problems: list[str] = []
    readable: list[tuple[CheckpointRef, dict[str, TensorSpec], dict[str, Any]]] = []
    for ref in refs:
        try:
            found = ref, read_headers(ref), read_config(ref)
            tokenizer_files(ref)
            readable.append(found)
        except CheckpointError as error:
            problems.append(str(error))
    if not readable:
        return problems
    for ref, specs, config in readable:
        problems += unsupported_problems(ref, specs, config)
    first, first_specs, first_config = readable[0]
    for ref, specs, config in readable[1:]:
        for key in _ARCHITECTURE_KEYS:
            if config.get(key) != first_config.get(key):
                problems.append(
                    f"{key}: {ref.id!r} has {config.get(key)!r}, {first.id!r} has {first_config.get(key)!r}"
                )
        for title, names in (
            ("lacks", first_specs.keys() - specs.keys()),
            ("also has", specs.keys() - first_specs.keys()),
        ):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                problems.append(f"tensors: {ref.id!r} {title} {shown}, compared with {first.id!r}")
        for name in sorted(first_specs.keys() & specs.keys()):
            if specs[name].shape != first_specs[name].shape:
                problems.append(
                    f"shape of {name}: {ref.id!r} has {specs[name].shape}, {first.id!r} has {first_specs[name].shape}"
                )
        problems += tokenizer_problems(first, ref)
    return problems


def tokenizer_problems(first: CheckpointRef, other: CheckpointRef) -> list[str]:
    """One line where two tokenizers differ or cannot be read."""
    try:
        if same_tokenizer(first, other):
            return []
    except CheckpointError as error:
        return [str(error)]
    return [f"tokenizer: {other.id!r} and {first.id!r} have different vocabularies; {_VOCABULARY_REMEDY}"]


def check_compatible(refs: Sequence[CheckpointRef]) -> None:
    """Refuse checkpoints that cannot be merged.

    Raises:
        IncompatibleCheckpointsError: with every problem found, one a line.
    """
    refuse_problems(compatibility_problems(refs))


def refuse_problems(problems: Sequence[str]) -> None:
    """Raise `IncompatibleCheckpointsError` with the problems, one a line, where there are any."""
    if problems:
        shown = [*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])]
        raise IncompatibleCheckpointsError("\n  ".join(["these checkpoints cannot be merged:", *shown]))
