"""The tokenizer of a checkpoint, opened to be changed: by the library of tokenizers alone where its files say all, else
by transformers, whose import takes longer than a merge of 134 M parameters.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from simmerge_ray.base.errors import first_line
from simmerge_ray.base.storage import file_names, read_bytes, read_json_object
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.checkpoints.tokenizers import CHAT_TEMPLATE, TOKENIZER_CONFIG, check_ids, is_refusal, load_tokenizer

_TOKENIZER, _SPECIAL, _DECODER = "tokenizer.json", "special_tokens_map.json", "added_tokens_decoder"
# Classes that read `tokenizer.json` and no more, with the special tokens that they add where it lacks them.
_CLASSES = {
    "PreTrainedTokenizerFast": (),
    "TokenizersBackend": (),
    "GPT2Tokenizer": ("<|endoftext|>",),
    "Qwen2Tokenizer": ("<|endoftext|>",),
    "LlamaTokenizer": ("<unk>", "<s>", "</s>"),
}
_MODEL_TYPES = ("llama", "mistral", "mixtral", "gpt2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "granite", "olmo2")
_OF_TYPE = {"qwen2": "Qwen2Tokenizer"}  # transformers takes this, whatever the file says
_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


class OpenedTokenizer(Protocol):
    """A tokenizer that may be changed."""

    def vocabulary(self) -> dict[str, int]:
        """Every token's id."""

    def added(self) -> Mapping[int, Any]:
        """By id, the tokens beside its model's own (`tokenizers.AddedToken`)."""

    def add(self, tokens: Sequence[Any]) -> None:
        """Text, or `AddedToken`s; those that are there are left as they are."""

    def content(self) -> dict[str, Any]:
        """What `tokenizer.json` says, or would say; its model's type is "slow" where there can be none."""

    def copied(self, content: Mapping[str, Any] | None = None) -> Self:
        """A tokenizer of its own, with another content if one is given."""

    def files(self, template: str | None) -> dict[str, bytes]:
        """Its files by name, with another chat template if one is given."""


def open_tokenizer(ref: CheckpointRef) -> OpenedTokenizer:
    """Raises CheckpointError: it cannot be loaded; see also `check_ids`."""
    check_ids(ref)
    return _TokenizerFiles.read(ref) or _LoadedTokenizer(ref, load_tokenizer(ref, trust_remote_code=False))


class _TokenizerFiles:
    """One whose files say all: `tokenizer.json` by the library of tokenizers, other files as they are."""

    def __init__(self, backend: Any, others: Mapping[str, bytes]) -> None:
        self._backend, self._others = backend, others

    @classmethod
    def read(cls, ref: CheckpointRef) -> Self | None:
        """None where transformers adds tokens to the file's, takes a class of its own, or knows more."""
        from tokenizers import Tokenizer

        names = file_names(ref.path) or set()
        if not {_TOKENIZER, TOKENIZER_CONFIG} <= names or "added_tokens.json" in names:
            return None
        config = read_json_object(ref.path / TOKENIZER_CONFIG, ref.error)
        if not _is_plain(read_config(ref), config):
            return None
        try:
            backend = Tokenizer.from_str(read_bytes(ref.path / _TOKENIZER).decode())
        except BaseException as error:
            if not is_refusal(error):
                raise
            return None  # transformers says what is wrong
        others = {name: read_bytes(ref.path / name) for name in (_SPECIAL, CHAT_TEMPLATE) if name in names}
        special = read_json_object(ref.path / _SPECIAL, ref.error) if _SPECIAL in names else {}
        decoder = backend.get_added_tokens_decoder()
        added = {token.content for token in decoder.values()}
        if not added.issuperset(_special_tokens(config) | _special_tokens(special)):
            return None
        said = config.get(_DECODER) or {}
        if not isinstance(said, dict) or any(
            not key.isdecimal() or int(key) not in decoder or decoder[int(key)].content != _text(one)
            for key, one in said.items()
        ):
            return None
        return cls(backend, others | {TOKENIZER_CONFIG: json.dumps(config).encode()})

    def vocabulary(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    def added(self) -> Mapping[int, Any]:
        return self._backend.get_added_tokens_decoder()

    def add(self, tokens: Sequence[Any]) -> None:
        self._backend.add_tokens(list(tokens))

    def content(self) -> dict[str, Any]:
        return json.loads(self._backend.to_str())

    def copied(self, content: Mapping[str, Any] | None = None) -> Self:
        from tokenizers import Tokenizer

        text = self._backend.to_str() if content is None else json.dumps(content)
        return type(self)(Tokenizer.from_str(text), self._others)

    def files(self, template: str | None) -> dict[str, bytes]:
        config = json.loads(self._others[TOKENIZER_CONFIG])
        if _DECODER in config:
            config[_DECODER] = {number: _fields(token) for number, token in sorted(self.added().items())}
        made = {**self._others, _TOKENIZER: self._backend.to_str(pretty=True).encode()}
        if template is not None:
            config.pop("chat_template", None)
            made[CHAT_TEMPLATE] = template.encode()
        made[TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        return dict(sorted(made.items()))


def _is_plain(model: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether transformers makes of `tokenizer.json` what the library of tokenizers does."""
    kind, name = model.get("model_type"), _class_name(config)
    is_known = kind in _MODEL_TYPES and name in _CLASSES and _OF_TYPE.get(kind, name) == name
    return is_known and "auto_map" not in config and "auto_map" not in model


def _class_name(config: Mapping[str, Any]) -> str:
    name = str(config.get("tokenizer_class"))
    return name if name == "PreTrainedTokenizerFast" else name.removesuffix("Fast")


def _special_tokens(config: Mapping[str, Any]) -> set[str | None]:
    """The texts of all special tokens of a config, those of its class too; None for what is no token."""
    found: list[Any] = [*_CLASSES.get(_class_name(config), ())]
    found += (config[key] for key in _TOKEN_KEYS if config.get(key) is not None)
    for key in _LISTS:
        several = config.get(key) or []
        found += several.values() if isinstance(several, dict) else several if isinstance(several, list) else [0]
    return {_text(one) for one in found}


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _fields(token: Any) -> dict[str, Any]:
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {key: getattr(token, key) for key in keys}


class _LoadedTokenizer:
    """One of transformers."""

    def __init__(self, ref: CheckpointRef, tokenizer: Any) -> None:
        self._ref, self._tokenizer = ref, tokenizer

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def added(self) -> Mapping[int, Any]:
        return self._tokenizer.added_tokens_decoder

    def add(self, tokens: Sequence[Any]) -> None:
        self._tokenizer.add_tokens(list(tokens))

    def content(self) -> dict[str, Any]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}

    def copied(self, content: Mapping[str, Any] | None = None) -> Self:
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        with self._saved() as directory:
            made = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if content is not None:
            made._tokenizer = Tokenizer.from_str(json.dumps(content))
        return type(self)(self._ref, made)

    @contextmanager
    def _saved(self) -> Iterator[str]:
        """A directory with its files. Raises CheckpointError: transformers cannot write what it has read."""
        with tempfile.TemporaryDirectory() as directory:
            try:
                self._tokenizer.save_pretrained(directory)
            except BaseException as error:
                if not is_refusal(error):
                    raise
                raise self._ref.error(f"transformers cannot write its tokenizer: {first_line(error)}") from error
            yield directory

    def files(self, template: str | None) -> dict[str, bytes]:
        if template is not None:
            self._tokenizer.chat_template = template
        with self._saved() as directory:
            return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}
