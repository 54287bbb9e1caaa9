"""Tokenizers of checkpoints, as files: whether two are the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from simmerge_ray.base.errors import first_line, shown_value
from simmerge_ray.base.extras import import_transformers
from simmerge_ray.base.storage import Place, digest_bytes, file_names, read_bytes, read_json_object
from simmerge_ray.checkpoints.references import CheckpointRef, local_files

_IDENTITY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Everything that belongs to the tokenizer of a checkpoint.
TOKENIZER_FILES = (*_IDENTITY_FILES, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)


_FILES_OF_IDS = ("tokenizer.json", "vocab.json", "added_tokens.json")
_MOST_TOKENS = 1 << 24  # sixty times the largest vocabularies
_LONG_NUMBER = re.compile(rb":\s*\d{8}")


def tokenizer_digest(ref: CheckpointRef) -> str:
    """Identity of a tokenizer: its vocabulary and merges, not its cosmetics; a CheckpointError where it is damaged."""
    files = tokenizer_files(ref)
    if files[0].name != "tokenizer.json":
        return digest_bytes(*_contents(ref))
    content = read_json_object(files[0], ref.error)
    kept = {key: content.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")}
    return digest_bytes(json.dumps(kept, sort_keys=True).encode())


def same_tokenizer(first: CheckpointRef, other: CheckpointRef) -> bool:
    """Whether two tokenizers have one digest. Equal files are not parsed, which takes 0.3 s each."""
    return _contents(first) == _contents(other) or tokenizer_digest(first) == tokenizer_digest(other)


def load_tokenizer(ref: CheckpointRef, **options: Any) -> Any:
    """The tokenizer as transformers loads it. Raises CheckpointError: it cannot; see also `check_ids`."""
    check_ids(ref)
    tokenizers = import_transformers().AutoTokenizer
    with local_files(ref) as directory:
        try:
            return tokenizers.from_pretrained(directory, local_files_only=True, **options)
        except BaseException as error:
            if not is_refusal(error):
                raise
            raise ref.error(f"transformers cannot load its tokenizer: {first_line(error)}") from error


def check_ids(ref: CheckpointRef) -> None:
    """Raises CheckpointError: a token has an id that no embedding has a row for. The library of tokenizers counts up to
    it, in seconds and gigabytes."""
    names = file_names(ref.path) or set()
    for file in (ref.path / name for name in _FILES_OF_IDS if name in names):
        if not _LONG_NUMBER.search(read_bytes(file)):  # most files are not parsed for this
            continue
        for token, number in _ids_in(read_json_object(file, ref.error)).items():
            if isinstance(number, int) and number >= _MOST_TOKENS:
                raise ref.error(
                    f"{file.name} gives token {shown_value(token)} the id {shown_value(number)}; ids are read below "
                    f"{_MOST_TOKENS}"
                )


def _ids_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """By token, what a file says of its id."""
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict):
        return dict(content)
    vocabulary = model.get("vocab")
    found = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    tokens = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    return found | {str(one.get("content")): one.get("id") for one in tokens}


def is_refusal(error: BaseException) -> bool:
    """Whether the library of tokenizers refuses a file so: it raises nothing more special, and panics besides."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _contents(ref: CheckpointRef) -> list[bytes]:
    try:
        return [read_bytes(file) for file in tokenizer_files(ref)]
    except OSError as error:
        raise ref.error(f"cannot read its tokenizer, {error.filename}: {error.strerror}") from None


def tokenizer_files(ref: CheckpointRef) -> list[Place]:
    """`tokenizer.json`, or else the older files. Raises CheckpointError: there is none."""
    names = file_names(ref.path) or ()
    found = [ref.path / name for name in _IDENTITY_FILES if name in names]
    if not found:
        raise ref.error(f"{ref.path} holds no tokenizer files")
    return found[:1] if found[0].name == "tokenizer.json" else found
