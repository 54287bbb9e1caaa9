"""Probes out of the files that people have."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simmerge_ray.base.errors import ProbeError
from simmerge_ray.checkpoints.probe_sources import read_texts, some_of

TEXTS = ["1+1=", 'a "quoted", text', "two\nlines", "ünïcode", "1+1="]  # one of them twice
FOUND = list(dict.fromkeys(TEXTS))


def write_csv(path, separator):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("id", "prompt"), *enumerate(TEXTS)])


def write_arrow(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(TEXTS)), "prompt": TEXTS})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


ROWS = [{"id": number, "prompt": text} for number, text in enumerate(TEXTS)]
SOURCES = {
    "a.csv": lambda path: write_csv(path, ","),
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.parquet": lambda path: pq.write_table(pa.table({"prompt": TEXTS}), path),
    "a.arrow": write_arrow,
    "set": lambda path: write_arrow(path / "data-00000-of-00001.arrow"),  # Dataset.save_to_disk
    "sets": lambda path: write_arrow(path / "train" / "data-00000-of-00001.arrow"),  # DatasetDict.save_to_disk
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_form_gives_the_same_different_texts_in_order(tmp_path, name):
    SOURCES[name](tmp_path / name)
    assert read_texts(tmp_path / name) == read_texts(tmp_path / name, "prompt") == FOUND
    with pytest.raises(ProbeError, match=r"unknown field 'promt' \(did you mean 'prompt'\?\)"):
        read_texts(tmp_path / name, "promt")


def test_plain_text_is_a_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\n  \ntwo: 2+2=\none\r\n")
    assert read_texts(tmp_path / "a.txt") == ["one", "two: 2+2="]
    with pytest.raises(ProbeError, match="plain text, a prompt a line; it has no field 'prompt'"):
        read_texts(tmp_path / "a.txt", "prompt")


def test_what_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"question": TEXTS}).save_to_disk(tmp_path / "set")
    assert read_texts(tmp_path / "set") == FOUND


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"body": "x", "id": 1}', "which field holds the prompts\\? name one with --field: body, id"),
        ("a.jsonl", '{"prompt": 3}', "field 'prompt' holds 3; a probe is a text"),
        ("a.jsonl", '{"prompt": ""}\n', "holds no texts"),
        ("a.jsonl", "[1]", "line 1: expected an object"),
        ("a.json", '{"prompt": "x"}', "no list of objects"),
        ("a.csv", "", "holds no texts"),
        ("a.parquet", "PAR1", "cannot read"),
        ("a.arrow", "nothing", "cannot read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ProbeError, match=message):
        read_texts(tmp_path / name)


def test_what_is_not_there_or_holds_no_data_is_named(tmp_path):
    with pytest.raises(ProbeError, match="cannot read .*absent.txt"):
        read_texts(tmp_path / "absent.txt")
    with pytest.raises(ProbeError, match="holds no .*arrow or .*parquet"):
        read_texts(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ProbeError, match="cannot be read as text"):
        read_texts(tmp_path / "latin.txt")


def test_a_sample_is_in_order_and_always_the_same():
    texts = [str(number) for number in range(1000)]
    chosen = some_of(texts, 64)
    assert chosen == some_of(texts, 64) and len(set(chosen)) == 64
    assert chosen == sorted(chosen, key=int) and int(chosen[-1]) > 900
    assert some_of(texts[:5], 64) == texts[:5]
