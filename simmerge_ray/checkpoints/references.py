"""References to checkpoints on a disk, in a store or on the hub, and the small files beside their weights."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.base.storage import Place, RemotePath, as_place, local_directory, place_in, read_json_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
GRAMS = " (Gram matrices)"
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class CheckpointRef:
    """A reference to a checkpoint, never its weights. `base_id` names the common ancestor in the same catalogue.

    adapter: directory of a PEFT LoRA adapter that is added to the weights as they are read (see `adapters`).
    grams: directory of Gram matrices of the inputs of its linear layers, for `regmean`; no part of its identity.
    """

    id: str
    path: Place
    base_id: str | None = None
    adapter: Place | None = None
    grams: Place | None = None

    @property
    def gram_ref(self) -> CheckpointRef | None:
        """Its Gram matrices as something with tensors, under an id that no checkpoint has."""
        return CheckpointRef(f"{self.id}{GRAMS}", self.grams) if self.grams is not None else None

    def error(self, problem: str) -> CheckpointError:
        """The problem as an error that names the checkpoint."""
        return CheckpointError(f"checkpoint {self.id!r}: {problem}")


def gram_name(tensor: str, input_axis: int) -> str:
    """The name of the Gram matrix of a tensor's inputs, which its axis 0 or 1 stands for."""
    return f"{tensor} inputs {input_axis}"


def locate_checkpoint(
    model: str,
    revision: str | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    directory: Place = Path(),
) -> CheckpointRef:
    """A checkpoint by directory, URI or hub id, with a LoRA adapter or without; hub files are fetched to the cache.

    Relative paths start at `directory`. Raises CheckpointError: neither a directory nor a repository that can be had.
    """
    path = _locate(model, revision, directory)
    adapter_path = _locate(adapter, adapter_revision, directory) if adapter else None
    text = model + (f"@{revision}" if revision else "") + (f"+{adapter}" if adapter else "")
    return CheckpointRef(text + (f"@{adapter_revision}" if adapter_revision else ""), path, adapter=adapter_path)


def _locate(name: str, revision: str | None, directory: Place) -> Place:
    try:
        place = place_in(directory, as_place(name).expanduser())
    except RuntimeError:
        raise CheckpointError(f"{name!r} begins with a user that has no home directory here") from None
    if place.is_dir():
        if revision is not None:
            raise CheckpointError(f"{name!r} is a directory; the revision {revision!r} has no meaning for it")
        return place.resolve()
    if isinstance(as_place(name), RemotePath):
        raise CheckpointError(f"{place} is not a directory: there is nothing below that name")
    if name.endswith(".gguf"):
        raise CheckpointError(f"{name!r} is a quantised GGUF file; merge the checkpoint that it was made of")
    local = directory / name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{local} is not a directory (and {name!r} is no hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        small = ["*.json", "*.jinja", "*.txt", "*.model", "*.md"]
        found = Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", *small]))
        if not any(found.glob("*.safetensors")):  # an older repository: see `pickles`
            snapshot_download(
                name, revision=revision, allow_patterns=["pytorch_model*.bin", "adapter_model.bin", *small]
            )
        return found
    except Exception as error:  # the hub client raises errors of many libraries
        raise CheckpointError(f"{name!r} is no directory here, and {_hub_problem(name, revision, error)}") from None


def _hub_problem(name: str, revision: str | None, error: Exception) -> str:
    """Why the hub does not give a repository, and what to do. By names of classes: the client has moved some."""
    names = {one.__name__ for one in type(error).__mro__}
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if "GatedRepoError" in names:
        return f"on the hub it is gated: ask for access at {endpoint}/{name}, then `hf auth login` or set HF_TOKEN"
    if "RevisionNotFoundError" in names:
        return f"the repository on the hub has no revision {revision!r}"
    if "RepositoryNotFoundError" in names:
        return "the hub has no such repository (or it is private: `hf auth login`, or set HF_TOKEN)"
    if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            return "the hub's cache does not hold it: HF_HUB_OFFLINE is set; unset it, or name a directory"
        return f"the hub's cache does not hold it: {endpoint} cannot be reached; name a directory, or try again"
    reason = [line for line in str(error).splitlines() if line.strip()]
    return f"the hub does not give it: {type(error).__name__}: {reason[0] if reason else 'no reason'}"


def read_config(ref: CheckpointRef) -> dict[str, Any]:
    """`config.json` of a checkpoint. Raises CheckpointError: missing, or no JSON object."""
    return read_json_object(ref.path / "config.json", ref.error)


def context_limit(ref: CheckpointRef) -> int | None:
    """The longest sequence, in tokens, that the checkpoint's positions allow; None where `config.json` names none."""
    config = read_config(ref)
    limit = config.get("max_position_embeddings") or config.get("n_positions")  # the latter is GPT-2's name
    return limit if isinstance(limit, int) else None


def local_files(ref: CheckpointRef, weights: bool = False) -> AbstractContextManager[Path]:
    """A local directory with what other libraries read by name: `config.json`, the tokenizer, chat templates.

    It is the checkpoint's own directory where that is local; of one in a store the small files are in the node's cache
    while the block runs. `weights`: the weights, too, for an engine that loads them itself; all else reads ranges.

    Raises StorageError: the cache has no room for them, or the store does not answer.
    """
    suffixes = (*_SMALL_SUFFIXES, ".safetensors") if weights else _SMALL_SUFFIXES
    return local_directory(ref.path, lambda name: name.endswith(suffixes))
