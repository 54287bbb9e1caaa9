"""A tokenizer by its files alone is what transformers loads, and is left to transformers where it may not be."""

from __future__ import annotations

import json
import shutil

import pytest

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging import opened_tokenizers
from simmerge_ray.merging.opened_tokenizers import open_tokenizer
from simmerge_ray.merging.vocabularies import MergedVocabulary, ModelTokens, RowRule, union_tokenizer
from tests.unit.merging.test_vocabularies import TEXTS, write_bpe

SPECIAL = {
    "TokenizersBackend": [],
    "PreTrainedTokenizerFast": [],
    "GPT2Tokenizer": ["<|endoftext|>"],
    "Qwen2TokenizerFast": ["<|endoftext|>"],
    "LlamaTokenizerFast": ["<unk>", "<s>", "</s>"],
}


def change(path, name: str, **entries) -> None:
    file = path / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | entries))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """By class of the tokenizer, and `other`: checkpoints' directories without weights."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, special in SPECIAL.items():
        write_bpe(root / name, TEXTS["base"], 60, [*special, "<tool>", "two words"])
        change(root / name, "tokenizer_config.json", tokenizer_class=name)
    write_bpe(root / "other", TEXTS["code"], 70, ["<code>"])
    for path in root.iterdir():
        change(path, "config.json", model_type="llama")
    return root


def merged(first: CheckpointRef, other: CheckpointRef) -> MergedVocabulary:
    models = [ModelTokens(one, None) for one in (first, other)]
    return MergedVocabulary(union_tokenizer(models), models, {"<new>": RowRule(None, is_zero=True)}, None)


@pytest.mark.parametrize("name", SPECIAL)
def test_a_union_by_files_alone_is_that_of_transformers(roots, tmp_path, monkeypatch, name):
    from transformers import AutoTokenizer

    refs = [CheckpointRef(one, roots / one) for one in (name, "other")]
    by_files = open_tokenizer(refs[0])
    assert isinstance(by_files, opened_tokenizers._TokenizerFiles)
    found = [merged(*refs)]
    monkeypatch.setattr(opened_tokenizers._TokenizerFiles, "read", classmethod(lambda cls, ref: None))
    loaded = open_tokenizer(refs[0])
    assert by_files.vocabulary() == loaded.vocabulary()
    assert {n: repr(t) for n, t in by_files.added().items()} == {n: repr(t) for n, t in loaded.added().items()}
    found.append(merged(*refs))
    tokenizers = []
    for number, vocabulary in enumerate(found):
        path = tmp_path / str(number)
        path.mkdir()
        for file, content in vocabulary.files("{{ messages }}").items():
            (path / file).write_bytes(content)
        change(path, "config.json", model_type="llama")
        tokenizers.append(AutoTokenizer.from_pretrained(path))
    left, right = tokenizers
    assert left.get_vocab() == right.get_vocab() and left.chat_template == right.chat_template == "{{ messages }}"
    assert left.special_tokens_map == right.special_tokens_map
    assert {n: repr(t) for n, t in left.added_tokens_decoder.items()} == {
        n: repr(t) for n, t in right.added_tokens_decoder.items()
    }
    text = " ".join(["<new><tool>two words<code> <s>", *(one for several in TEXTS.values() for one in several)])
    assert left(text)["input_ids"] == right(text)["input_ids"]
    assert left.decode(left(text)["input_ids"]) == right.decode(right(text)["input_ids"])


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("tokenizer_config.json", {"pad_token": "<pad>"}),  # transformers adds it
        ("tokenizer_config.json", {"pad_token": 7}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<more>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<more>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": ["GPT2Tokenizer"]}),
        ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}),  # whose default it lacks
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
        ("special_tokens_map.json", {"mask_token": {"content": "<mask>"}}),
        ("config.json", {"model_type": "phi3"}),
        ("config.json", {"model_type": "qwen2"}),
        ("config.json", {"model_type": ["llama"]}),
        ("added_tokens.json", {"<more>": 99}),
        ("tokenizer.json", {"model": {"type": "nonsense"}}),
    ],
)
def test_where_transformers_may_know_more_it_is_asked(roots, tmp_path, file, entries):
    shutil.copytree(roots / "TokenizersBackend", tmp_path / "x")
    ref = CheckpointRef("x", tmp_path / "x")
    assert opened_tokenizers._TokenizerFiles.read(ref) is not None
    change(ref.path, file, **entries)
    assert opened_tokenizers._TokenizerFiles.read(ref) is None


def test_tokens_that_a_config_lists_are_listed_after_a_change(roots, tmp_path):
    shutil.copytree(roots / "TokenizersBackend", tmp_path / "x")
    (number,) = (
        n for n, t in open_tokenizer(CheckpointRef("x", tmp_path / "x")).added().items() if t.content == "<tool>"
    )
    change(tmp_path / "x", "tokenizer_config.json", added_tokens_decoder={number: {"content": "<tool>"}})
    opened = open_tokenizer(CheckpointRef("x", tmp_path / "x"))
    opened.add(["<later>"])
    listed = json.loads(opened.files(None)["tokenizer_config.json"])["added_tokens_decoder"]
    assert {one["content"] for one in listed.values()} == {token.content for token in opened.added().values()}


@pytest.mark.parametrize(
    "entries",
    [
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ],
)
def test_a_file_at_which_the_library_panics_is_refused(roots, tmp_path, entries):
    shutil.copytree(roots / "TokenizersBackend", tmp_path / "x")
    change(tmp_path / "x", "tokenizer.json", **entries)
    with pytest.raises(CheckpointError, match="cannot load its tokenizer"):
        open_tokenizer(CheckpointRef("x", tmp_path / "x"))
