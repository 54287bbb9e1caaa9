"""Tokenizers of checkpoints, as files: whether two are the same."""

from __future__ import annotations

import json

from simmerge_ray.base.storage import Place, digest_bytes, file_names
from simmerge_ray.checkpoints.references import CheckpointRef

_IDENTITY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Everything that belongs to the tokenizer of a checkpoint.
TOKENIZER_FILES = (*_IDENTITY_FILES, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)


def tokenizer_digest(ref: CheckpointRef) -> str:
    """Identity of a tokenizer: its vocabulary and merges, not its cosmetics; a CheckpointError where it is damaged."""
    files = tokenizer_files(ref)
    if files[0].name != "tokenizer.json":
        return digest_bytes(*(file.read_bytes() for file in files))
    try:
        content = json.loads(files[0].read_bytes())
        kept = {
            key: content.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")
        }
    except (ValueError, AttributeError):
        raise ref.error(f"{files[0]} is damaged") from None
    return digest_bytes(json.dumps(kept, sort_keys=True).encode())


def same_tokenizer(first: CheckpointRef, other: CheckpointRef) -> bool:
    """Whether two tokenizers have one digest. Equal files are not parsed, which takes 0.3 s each."""
    files = [[file.read_bytes() for file in tokenizer_files(ref)] for ref in (first, other)]
    return files[0] == files[1] or tokenizer_digest(first) == tokenizer_digest(other)


def tokenizer_files(ref: CheckpointRef) -> list[Place]:
    """`tokenizer.json`, or else the older files. Raises CheckpointError: there is none."""
    names = file_names(ref.path) or ()
    found = [ref.path / name for name in _IDENTITY_FILES if name in names]
    if not found:
        raise ref.error(f"{ref.path} holds no tokenizer files")
    return found[:1] if found[0].name == "tokenizer.json" else found
