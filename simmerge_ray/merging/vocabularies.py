"""Tokenizers of checkpoints with different vocabularies: one for the merge, and whose rows its tokens get.

The rules are mergekit's. A token that a model has keeps the model's own row; one that it lacks gets that of the base,
of the only model that has it, or the mean of those that have it, so that all models agree on it. Ids are given in the
order of the models and of their ids, so that the same files give the same tokenizer (mergekit's order is drawn anew by
every process).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.base.storage import read_json
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.checkpoints.tokenizers import same_tokenizer, tokenizer_files
from simmerge_ray.merging.opened_tokenizers import OpenedTokenizer, open_tokenizer
from simmerge_ray.merging.row_layouts import AVERAGE, ZERO, RowLayout


@dataclass(frozen=True)
class RowRule:
    """The row of one token: of a model (by number), there that of `token` (None: the same) or `token_id`; or zeros."""

    model: int | None
    is_zero: bool = False
    token: str | None = None
    token_id: int | None = None
    force: bool = False


class ModelTokens:
    """The tokens of one checkpoint that have a row: by text, their ids."""

    def __init__(self, ref: CheckpointRef, vocab_size: int | None) -> None:
        """Load its tokenizer. Raises CheckpointError: it cannot be loaded."""
        self.ref, self.tokenizer = ref, open_tokenizer(ref)
        ids = self.tokenizer.vocabulary()
        self.vocab_size = vocab_size or len(ids)
        self.every_id: dict[str, int] = dict(sorted(ids.items(), key=lambda item: (item[1], item[0])))
        self.ids = {token: number for token, number in self.every_id.items() if number < self.vocab_size}


def are_laid_out_alike(refs: Sequence[CheckpointRef], sizes: Sequence[int | None]) -> bool:
    """Whether all have one tokenizer, whose ids are those of the rows: then rows stay where they are. Files only."""
    if any(size != sizes[0] for size in sizes) or not all(same_tokenizer(refs[0], ref) for ref in refs[1:]):
        return False
    files = tokenizer_files(refs[0])
    if files[0].name != "tokenizer.json":
        return False
    try:
        content = read_json(files[0])
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        known = set(ids) | {one["id"] for one in content.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return known == set(range(sizes[0] or 0))


def base_tokenizer(model: ModelTokens) -> OpenedTokenizer:
    """A copy of a model's tokenizer without the tokens that have no row."""
    lost = model.every_id.keys() - model.ids.keys()
    if not lost:
        return model.tokenizer.copied()
    content = model.tokenizer.content()
    kind = content["model"]["type"]
    if kind != "BPE":
        raise model.ref.error(
            f"its tokenizer has {len(lost)} tokens beyond the {model.vocab_size} rows of its embedding, e.g. "
            f"{min(lost)!r}; they can be left out of a BPE tokenizer only, this one is {kind!r}"
        )
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in lost]
    bpe = content["model"]
    bpe["vocab"] = {token: number for token, number in bpe["vocab"].items() if token not in lost}
    parts = ((one, one.split(" ") if isinstance(one, str) else one) for one in bpe["merges"])
    bpe["merges"] = [one for one, pair in parts if lost.isdisjoint(pair) and "".join(pair) not in lost]
    return model.tokenizer.copied(content)


def union_tokenizer(models: Sequence[ModelTokens]) -> OpenedTokenizer:
    """The tokenizer of the first model with the tokens of the others added."""
    result = base_tokenizer(models[0])
    known = result.vocabulary()
    added: dict[str, Any] = {}
    plain: dict[str, None] = {}
    for model in models:
        decoder = model.tokenizer.added()
        own = {one.content for one in decoder.values()}
        plain.update(dict.fromkeys(token for token in model.ids if token not in own))
        for number, one in decoder.items():
            if number < model.vocab_size:
                added.setdefault(one.content, one)
    result.add([token for token in plain if token not in added and token not in known])
    result.add(list(added.values()))
    return result


class MergedVocabulary:
    """The vocabulary of a merge: its tokenizer, and how the rows of each model are laid out for it."""

    def __init__(
        self,
        tokenizer: OpenedTokenizer,
        models: Sequence[ModelTokens],
        rules: Mapping[str, RowRule],
        padding: int | None,
    ) -> None:
        """models: all that are merged. rules: by token; those that the tokenizer lacks are added to it.

        Raises CheckpointError: the ids of the tokenizer leave gaps.
        """
        known = tokenizer.vocabulary()
        tokenizer.add([token for token in rules if token not in known])
        self._tokenizer, self._models, self._rules = tokenizer, models, dict(rules)
        ids = sorted(tokenizer.vocabulary().items(), key=lambda item: item[1])
        self._tokens = [token for token, _ in ids]
        if [number for _, number in ids] != list(range(len(ids))):
            gap = next(place for place, (_, number) in enumerate(ids) if number != place)
            raise CheckpointError(
                f"the ids of the merge's tokenizer leave a gap at {gap}; choose another tokenizer_source"
            )
        self.num_rows = -(-len(ids) // (padding or 1)) * (padding or 1)
        places = {token: place for place, token in enumerate(self._tokens)}
        self._own = []
        for model in models:
            own = np.full(len(ids), -1, dtype=np.int64)
            for token, number in model.ids.items():
                if (place := places.get(token)) is not None:
                    own[place] = number
            self._own.append(own)
        self._places = places

    def files(self, template: str | None) -> dict[str, bytes]:
        """The tokenizer's files by name, with another chat template if one is given."""
        return self._tokenizer.files(template)

    def layouts(self, members: Sequence[int], base: int | None, num_rows: Sequence[int]) -> list[RowLayout]:
        """One for each of the models `members` whose tensor is laid out; sources are numbered as these.

        num_rows: of their tensors. Raises CheckpointError: a token's row does not exist.
        """
        own = [self._own[member] for member in members]
        for member, rows, limit in zip(members, own, num_rows, strict=True):
            if rows.max(initial=-1) >= limit:
                token = self._tokens[int(rows.argmax())]
                raise self._models[member].ref.error(f"token {token!r} has id {rows.max()}, the tensor {limit} rows")
        sources, rows, averages = self._shared(own, members.index(base) if base in members else None)
        forced: list[int] = []
        for token, rule in self._rules.items():
            place = self._places[token]
            is_needed = rule.force or any(one[place] < 0 for one in own)
            if is_needed:
                sources[place], rows[place] = self._row(token, rule, members, num_rows)
                averages.pop(place, None)
            if rule.force:
                forced.append(place)
        found = []
        for number, one in enumerate(own):
            keeps = one >= 0
            keeps[forced] = False
            found.append(
                RowLayout(
                    self.num_rows,
                    np.where(keeps, number, sources).astype(np.int32),
                    np.where(keeps, one, rows),
                    {place: parts for place, parts in averages.items() if not keeps[place]},
                )
            )
        return found

    def _shared(
        self, own: Sequence[np.ndarray], base: int | None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, tuple[tuple[int, int], ...]]]:
        """(source, row) of each token for the models that lack it, and the parts of averages."""
        has = np.stack([one >= 0 for one in own])
        count, first = has.sum(axis=0), has.argmax(axis=0)
        sources = np.where(count == 1, first, ZERO)
        averages: dict[int, tuple[tuple[int, int], ...]] = {}
        several = count > 1
        if base is not None:
            sources = np.where(several & has[base], base, sources)
            several = several & ~has[base]
        for place in np.flatnonzero(several & (count < len(own))).tolist():
            sources[place] = AVERAGE
            averages[place] = tuple((n, int(one[place])) for n, one in enumerate(own) if one[place] >= 0)
        rows = np.zeros(len(self._tokens), dtype=np.int64)
        for number, one in enumerate(own):
            rows = np.where(sources == number, one, rows)
        return sources, rows, averages

    def _row(self, token: str, rule: RowRule, members: Sequence[int], num_rows: Sequence[int]) -> tuple[int, int]:
        if rule.is_zero:
            return ZERO, 0
        if rule.model is None:
            raise CheckpointError(f"token {token!r} needs a source: not all models have it")
        model = self._models[rule.model]
        if rule.model not in members:
            raise model.ref.error(f"token {token!r} takes its row from it, which has no such tensor in the merge")
        number = rule.token_id
        if number is None:
            number = (model.ids if rule.token is None else model.every_id).get(rule.token or token)
        if number is None:
            raise model.ref.error(f"it has no token {rule.token or token!r}, whose row token {token!r} is to have")
        source = members.index(rule.model)
        if not 0 <= number < num_rows[source]:
            raise model.ref.error(f"token {token!r} takes row {number} of {num_rows[source]} rows")
        return source, number
