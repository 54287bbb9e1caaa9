"""The vocabulary that a document asks for: its tokenizer, and the tensors of the models laid out for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.base.storage import file_names, read_json_object
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.checkpoints.tokenizers import CHAT_TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_FILES
from simmerge_ray.merging.graph import Read, Rows, promoted
from simmerge_ray.merging.mergekit.chat_templates import commonest_template
from simmerge_ray.merging.mergekit.documents import MergekitDocument, ModelName, VocabularyRules
from simmerge_ray.merging.mergekit.models import LoadedModel, TensorValue
from simmerge_ray.merging.opened_tokenizers import open_tokenizer
from simmerge_ray.merging.row_layouts import RowLayout
from simmerge_ray.merging.vocabularies import (
    MergedVocabulary,
    ModelTokens,
    RowRule,
    are_laid_out_alike,
    base_tokenizer,
    union_tokenizer,
)
from simmerge_ray.plans.operators.gradients import split_layer

# Tensors whose first axis is the vocabulary.
_PER_TOKEN = re.compile(
    r"(^|\.)((embed_tokens|wte|word_embeddings|embed_in|embed_out|tok_embeddings|lm_head)\.(weight|bias)"
    r"|shared\.weight|output\.weight|cls\.predictions\.(bias|decoder\.(weight|bias)))$"
)
_SIZE = "vocab_size"


class DocumentVocabulary:
    """What a document whose models' rows do not stay where they are makes of them."""

    def __init__(self, document: MergekitDocument, models: Mapping[ModelName, LoadedModel], donor: LoadedModel) -> None:
        """models: all that are merged, the base first. donor: whose tokenizer is asked for, where one is named.

        Raises CheckpointError: a tokenizer cannot be loaded, or does not serve.
        """
        self._names = list(models)
        self.layouts: dict[str, RowLayout] = {}
        self._kept: dict[Any, list[RowLayout]] = {}
        tokens = [ModelTokens(_ref(model), vocabulary_size(model.config)) for model in models.values()]
        if document.tokenizer_source == "union":
            tokenizer = union_tokenizer(tokens)
        elif document.tokenizer_source == "base":
            tokenizer = base_tokenizer(tokens[0])
        else:
            tokenizer = open_tokenizer(_ref(donor))
        rules = {}
        for token, rule in document.vocabulary.tokens:
            if isinstance(rule.source, ModelName) and rule.source not in models:
                known = ", ".join(repr(name.id) for name in models)
                raise CheckpointError(f"tokenizer.tokens.{token}: {rule.source.id!r} is not merged; merged are {known}")
            number = self._names.index(rule.source) if isinstance(rule.source, ModelName) else None
            rules[token] = RowRule(number, rule.source == "zero", rule.token, rule.token_id, rule.force)
        self._merged = MergedVocabulary(tokenizer, tokens, rules, document.vocabulary.pad_to_multiple_of)

    def laid_out(
        self, name: str, members: Sequence[ModelName], base: ModelName | None, values: Sequence[TensorValue]
    ) -> list[TensorValue]:
        """The inputs of one tensor of the output with the rows of its vocabulary; others as they are.

        Raises CheckpointError: a token's row does not exist.
        """
        if split_layer(name) is not None or not _PER_TOKEN.search(name):
            return list(values)
        reads = tuple(value.node for value in values if isinstance(value.node, Read))
        assert len(reads) == len(values), "one document has checkpoints as inputs"
        numbers = [self._names.index(member) for member in members]
        sizes = tuple(value.shape[0] for value in values)
        key = tuple(numbers), base, sizes
        if key not in self._kept:
            place = self._names.index(base) if base in self._names else None
            self._kept[key] = self._merged.layouts(numbers, place, sizes)
            self.layouts |= {layout.digest: layout for layout in self._kept[key]}
        dtype = promoted([value.dtype for value in values])
        casts = frozenset[tuple[str, str | None]]().union(*(value.casts for value in values))
        return [
            replace(
                value,
                node=Rows(reads, layout.digest, layout.num_rows, dtype),
                shape=(layout.num_rows, *value.shape[1:]),
                dtype=dtype,
                casts=casts,
            )
            for value, layout in zip(values, self._kept[key], strict=True)
        ]

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config.json` with the size of the vocabulary."""
        changed = {**config}
        if isinstance(text := config.get("text_config"), Mapping) and _SIZE in text:
            changed["text_config"] = {**text, _SIZE: self._merged.num_rows}
        if _SIZE in config or "text_config" not in changed:
            changed[_SIZE] = self._merged.num_rows
        return changed

    def files(self, template: str | None) -> dict[str, bytes]:
        """The tokenizer's files, with another chat template if one is given."""
        return self._merged.files(template)


def make_vocabulary(
    document: MergekitDocument,
    models: Mapping[ModelName, LoadedModel | None],
    donor: LoadedModel | None,
    is_alone: bool,
    problems: list[str],
) -> DocumentVocabulary | None:
    """The vocabulary that a document asks for; None where all rows are there already, or with problems.

    models: all that are merged, the base first. donor: whose tokenizer is asked for, where one is named. is_alone: the
    document is the only one of its file.
    """
    found = {name: model for name, model in models.items() if model is not None}
    if document.tokenizer_source is None or len(found) < len(models):
        return None
    all_models = [*found.values(), *([donor] if donor is not None else [])]
    has_rules = document.vocabulary != VocabularyRules()
    try:
        if not is_alone and (has_rules or any(model.ref is None for model in all_models)):
            if has_rules:
                problems.append("tokenizer: rules of tokens are for files of one document")
            return None
        sizes = [vocabulary_size(model.config) for model in all_models]
        if not has_rules and are_laid_out_alike([_ref(model) for model in all_models], sizes):
            return None
        if not is_alone:
            problems.append("tokenizer_source: other vocabularies are for files of one document; merge in steps")
            return None
        return DocumentVocabulary(document, found, donor or all_models[0])
    except CheckpointError as error:
        problems.append(str(error))
        return None


def made_files(
    document: MergekitDocument,
    vocabulary: DocumentVocabulary | None,
    checkpoints: Mapping[str, CheckpointRef],
    tokenizer_from: str,
) -> dict[str, bytes] | None:
    """The tokenizer's files of a merge where they are not those of the checkpoint `tokenizer_from`.

    Raises CheckpointError: one is damaged.
    """
    template = document.chat_template
    if template == "auto":
        template = commonest_template(checkpoints.values())
    if vocabulary is not None:
        return vocabulary.files(template)
    return files_with_template(checkpoints[tokenizer_from], template) if template is not None else None


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding as `config.json` says."""
    text = config.get("text_config")
    size = text.get(_SIZE) if isinstance(text, Mapping) else None
    size = config.get(_SIZE) if size is None else size
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def files_with_template(ref: CheckpointRef, template: str) -> dict[str, bytes]:
    """The tokenizer's files of a checkpoint with another chat template. Raises CheckpointError: one is damaged."""
    names = file_names(ref.path) or set()
    files = {name: (ref.path / name).read_bytes() for name in sorted(names.intersection(TOKENIZER_FILES))}
    if TOKENIZER_CONFIG in files:
        config = read_json_object(ref.path / TOKENIZER_CONFIG, ref.error)
        config.pop("chat_template", None)
        files[TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files | {CHAT_TEMPLATE: template.encode()}


def _ref(model: LoadedModel) -> CheckpointRef:
    assert model.ref is not None, "one document has checkpoints as inputs"
    return model.ref
