"""`simmerge push`: a merge to the hub, with the card that stands beside its weights."""

from __future__ import annotations

import os
import re
from pathlib import Path

from simmerge_ray.base.errors import CheckpointError, ConfigError, OutputError
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.merging.write.output import MANIFEST_FILE

_REPOSITORY = re.compile(r"[\w.\-]{1,96}/[\w.\-]{1,96}")
_CARD = "README.md"


def check_push(merged: Path, repository: str) -> None:
    """What can be checked before anything is sent.

    Raises:
        ConfigError: no name of a repository. CheckpointError: no whole checkpoint; not one that was merged here.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{repository!r} is no repository of the hub; its name is OWNER/NAME")
    if not merged.is_dir():
        raise CheckpointError(f"{merged} is not a directory; `simmerge auto` and `simmerge merge` write merges")
    if not (merged / MANIFEST_FILE).exists() or not (merged / _CARD).exists():
        raise CheckpointError(
            f"{merged} is not a merge made by simmerge: it lacks {MANIFEST_FILE} or its card, {_CARD}"
        )
    ref = CheckpointRef("merged", merged)
    read_config(ref)
    read_headers(ref)


def push_merge(merged: Path, repository: str, private: bool = False) -> str:
    """Send the files of a merge to a repository of the hub, which is made if it is not there, as one commit; its URL.
    Where they go is HF_ENDPOINT, and who sends them HF_TOKEN or `hf auth login`.

    Raises as `check_push`; OutputError: the hub does not take them, and why.
    """
    check_push(merged, repository)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=merged, commit_message="Merge made by simmerge_ray", ignore_patterns=[".*"]
        )
    except Exception as error:  # the hub client raises errors of many libraries
        raise OutputError(f"{repository}: {_reason(error, str(api.endpoint))}") from None
    return str(made)


def _reason(error: Exception, endpoint: str) -> str:
    """Why the hub does not take a merge, and what to do. By names of classes: the client has moved some."""
    kind, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
    if kind == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set; unset it to push"
    if kind == "LocalTokenNotFoundError" or status == 401:
        return f"{endpoint} does not know who you are: `hf auth login`, or set HF_TOKEN to a token that may write"
    if status == 403:
        return f"your token may not write there; {endpoint}/settings/tokens has those that may"
    if status is None:
        return f"{endpoint} cannot be reached ({kind}); run the same command again"
    first = (str(error).strip().splitlines() or [kind])[0]
    return f"{endpoint} does not take it ({status}): {first[:300]}"
