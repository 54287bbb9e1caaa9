"""Files that lie, one by one: each is refused in words, with code 2, and nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError, safe_open

from simmerge_ray.base.errors import CheckpointError, ProbeError
from simmerge_ray.checkpoints.probes import load_probe_set
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.checkpoints.tokenizers import check_ids
from simmerge_ray.search.evaluation import load_task
from simmerge_ray.search.labels import LabelStore
from tests.fuzz.files import TOKENIZER_CONFIG, Ended, contents, header_of, run, with_header, write_files
from tests.unit.selector.made_up import made_up_labels, made_up_table

EMBED, UP, NORM = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
MERGE = ("merge", "plan.json", "out")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_files(tmp_path / "files")


def refused(root: Path, *command: Any, says: str = "") -> Ended:
    """It ends with code 2, says why, and leaves everything as it was."""
    before = contents(root)
    ended = run(*command, cwd=root)
    assert ended.code == 2 and "error: " in ended.said and says in ended.said, ended
    assert contents(root) == before and len(ended.said) < 60_000
    return ended


def tensor(name: str, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update(changes)


def offsets(name: str, change: Callable[[int, int], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update(data_offsets=change(*header[name]["data_offsets"]))


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "negative": offsets(EMBED, lambda begin, end: [begin - 8, end - 8]),
    "swapped": offsets(UP, lambda begin, end: [end, begin]),
    "overlapping": lambda header: header[UP].update(data_offsets=header[EMBED]["data_offsets"], shape=[6, 4]),
    "of three numbers": offsets(UP, lambda begin, end: [begin, end, end]),
    "of one number": offsets(UP, lambda begin, end: [begin]),
    "floats": offsets(UP, lambda begin, end: [float(begin), float(end)]),
    "text": offsets(UP, lambda begin, end: [str(begin), str(end)]),
    "truth values": offsets(UP, lambda begin, end: [False, end]),
    "no offsets": lambda header: header[UP].pop("data_offsets"),
    "a gap": offsets(NORM, lambda begin, end: [begin + 4, end + 4]),
    "beyond the file": offsets(NORM, lambda begin, end: [begin, end + 400]),
    "bytes of no tensor": lambda header: header.pop(max(header, key=lambda name: header[name]["data_offsets"])),
    "a wider dtype": tensor(UP, dtype="F64"),
    "a narrower dtype": tensor(UP, dtype="F16"),
    "an unknown dtype": tensor(UP, dtype="F31"),
    "a dtype that is a list": tensor(UP, dtype=["F32"]),
    "another shape": tensor(UP, shape=[5, 5]),
    "a negative shape": tensor(UP, shape=[-5, -4]),
    "a shape of floats": tensor(UP, shape=[5.0, 4.0]),
    "a shape that is a number": tensor(UP, shape=20),
    "a side that is a list": tensor(UP, shape=[2**62, [5]]),
    "a side that is a text": tensor(UP, shape=[2**40, "4"]),
    "sides of hundreds of digits": tensor(UP, shape=[10**300, 10**300]),
    "offsets of thousands of digits": tensor(UP, data_offsets=[10**3000, -(10**3000)]),
    "a last offset of thousands of digits": tensor(UP, data_offsets=[0, 10**3000]),
    "a shape of millions": tensor(UP, shape=[2**62, 2**62]),
    "a tensor that is a list": lambda header: header.update({UP: [1, 2]}),
    "a tensor that is null": lambda header: header.update({UP: None}),
    "metadata of numbers": lambda header: header.update(__metadata__={"a": 1}),
    "metadata that is a text": lambda header: header.update(__metadata__=""),
    "empty": lambda header: header.clear(),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_as_by_the_library_of_the_format(root, name):
    file = root / "a" / "model.safetensors"
    data = file.read_bytes()
    header = header_of(data)
    HEADERS[name](header)
    file.write_bytes(with_header(data, json.dumps(header)))
    with pytest.raises(SafetensorError), safe_open(file, "np"):
        pass
    for command in (
        MERGE,
        (*MERGE, "--dry-run"),
        ("merge", "merge.yaml", "out"),
        ("catalogue", "list", "catalogue.yaml"),
    ):
        refused(root, *command, says="a/model.safetensors")


TEXTS = {
    "deep": "[" * 100_000,
    "deep and closed": '{"a":' * 500 + "1" + "}" * 500,
    "infinite": '{"a": Infinity}',
    "not a number": '{"a": NaN}',
    "too large": '{"a": 1e999}',
    "of 5,000 digits": '{"a": %s}' % ("9" * 5000),
    "half a pair": '{"a": "\\ud800"}',
    "a list": "[1, 2]",
    "null": "null",
    "a number": "7",
    "a text": '"x"',
    "empty": "",
    "cut": '{"a": ',
}
BYTES = {name: text.encode() for name, text in TEXTS.items()} | {
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a pair in UTF-8": b'{"a": "\xed\xa0\x80"}',
}
JSON_FILES = {
    "a/config.json": MERGE,
    "a/tokenizer.json": MERGE,
    "b/model.safetensors.index.json": MERGE,
    "plan.json": MERGE,
    "lora/adapter_config.json": ("merge", "lora.json", "out"),
    "tasks/add.jsonl": ("search", "catalogue.yaml", "--tasks", "tasks", "--out", "store", "--budget", "1", "--dry-run"),
    "probes/add.jsonl": ("signals", "catalogue.yaml", "--probes", "probes", "--out", "out.parquet"),
    "selector/selector.json": ("plan", "catalogue.yaml", "--left", "a", "--right", "b", "--signals", "x.parquet",
                               "--selector", "selector"),
}  # fmt: skip


@pytest.mark.parametrize("file", JSON_FILES)
def test_json_that_is_none_is_refused_in_every_file(root, file):
    (root / file).parent.mkdir(exist_ok=True)
    for name, data in BYTES.items():
        (root / file).write_bytes(data)
        ended = refused(root, *JSON_FILES[file])
        assert Path(file).parts[0] in ended.said, (name, ended)


def test_a_header_of_json_that_is_none_is_refused(root):
    file = root / "a" / "model.safetensors"
    data = file.read_bytes()
    for text in TEXTS.values():
        file.write_bytes(with_header(data, text))
        refused(root, *MERGE, says="a/model.safetensors")


INDICES: dict[str, tuple[Any, str]] = {
    "no file": ({EMBED: "model-00009-of-00009.safetensors"}, "not beside it"),
    "a file above": ({EMBED: "../base/model.safetensors"}, "no safetensors file beside it"),
    "an absolute path": ({EMBED: "/etc/passwd"}, "no safetensors file beside it"),
    "another kind of file": ({EMBED: "config.json"}, "no safetensors file beside it"),
    "a number": ({EMBED: 1}, "no safetensors file beside it"),
    "a list": ([EMBED], "no 'weight_map'"),
    "nothing": ({}, "no 'weight_map'"),
    "a tensor too many": ({"model.more.weight": "model-00001-of-00003.safetensors"}, "in no shard"),
    "another shard": ({EMBED: "model-00002-of-00003.safetensors"}, "in no shard"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_lies_is_refused(root, name):
    file = root / "b" / "model.safetensors.index.json"
    value, says = INDICES[name]
    sound = json.loads(file.read_text())["weight_map"]
    file.write_text(json.dumps({"weight_map": {**sound, **value} if isinstance(value, dict) and value else value}))
    refused(root, *MERGE, says=says)


def test_an_index_without_one_of_its_shards_is_refused(root):
    (root / "b" / "model-00002-of-00003.safetensors").unlink()
    refused(root, *MERGE, says="names 1 files that are not beside it")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a\0b", "NUL"),
        ("~no-such-user/model", "a"),
        ("x" * 300, "too long"),
        ("loop", "loop"),
        ("\ud800", "surrogate"),
        (7, "path"),
        (["a"], "path"),
        (None, "path"),
        ({}, "path"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(root, name, says):
    os.symlink("loop", root / "loop")
    plan = json.loads((root / "plan.json").read_text())
    plan["checkpoints"]["a"] = name
    (root / "plan.json").write_text(json.dumps(plan))
    refused(root, *MERGE, says=says)
    document = {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}}], "dtype": "float32"}
    (root / "merge.yaml").write_text(json.dumps(document))
    refused(root, "merge", "merge.yaml", "out")
    (root / "catalogue.yaml").write_text(json.dumps({"checkpoints": [{"id": "a", "path": name}]}))
    refused(root, "catalogue", "list", "catalogue.yaml")


@pytest.mark.parametrize(
    "of_task", [None, 1, [], {"utility": 1.0}, {"utility": "x", "sd": 0}, {"measured": 1}, {"retention": [1]}]
)
def test_what_a_plan_predicts_is_read_before_it_is_merged(root, of_task):
    plan = json.loads((root / "plan.json").read_text())
    (root / "plan.json").write_text(json.dumps(plan | {"predicted": {"add": of_task}}))
    refused(root, *MERGE, says="'predicted' holds an object for each task")
    given = {"add": {"utility": 0.5, "sd": None}, "copy": {"retention": 1, "measured": 0.5, "se": 0}, "other": {}}
    (root / "plan.json").write_text(json.dumps(plan | {"predicted": given}))
    assert run(*MERGE, cwd=root).code == 0


@pytest.mark.parametrize(
    "templates", [{"default": "{{ x }}", "tool": 0}, {"tool": [1]}, {"../up": "{{ x }}"}, {f"../{'x' * 70_000}": "y"}]
)
def test_chat_templates_that_transformers_reads_and_cannot_write_are_refused(root, templates):
    of_no_class = {"chat_template": templates, "tokenizer_class": None}  # transformers reads it, and writes it again
    (root / "a" / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG | of_no_class))
    ended = refused(root, "merge", "union.yaml", "out", says="'a': transformers cannot write its tokenizer: ")
    assert len(ended.said) < 2000


@pytest.mark.parametrize("drops_added", [False, True], ids=["by its files", "by transformers"])
def test_an_id_of_billions_is_refused_and_not_counted_to(root, drops_added, monkeypatch):
    content = json.loads((root / "a" / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 2**31
    if drops_added:
        content["added_tokens"] = []  # the config's special token: transformers adds it
    (root / "a" / "tokenizer.json").write_text(json.dumps(content))
    monkeypatch.setattr("tokenizers.Tokenizer.from_str", None)  # no library is asked
    refused(
        root, "merge", "union.yaml", "out", says=f"tokenizer.json gives token 'a' the id {2**31}; ids are read below"
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": [["a", 0.0]]}, "added_tokens": [{"id": 10**9, "content": "x"}]}),
        ("tokenizer.json", {"model": {"vocab": {"x": 10**39, "y": "z"}}, "added_tokens": 5}),
        ("vocab.json", {"y": 1, "x": 10**9}),
        ("added_tokens.json", {"x": 1 << 24}),
    ],
)
def test_no_file_of_a_tokenizer_may_give_such_an_id(tmp_path, file, content):
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{file} gives token 'x' the id 1.*; ids are read below 16777216"):
        check_ids(CheckpointRef("a", tmp_path))
    (tmp_path / file).write_text(json.dumps({"a: 123456789": 5, "model": {"vocab": {"a: 123456789": (1 << 24) - 1}}}))
    check_ids(CheckpointRef("a", tmp_path))


@pytest.mark.parametrize("make", ["fifo", "device", "directory", "loop"])
def test_what_is_no_file_is_refused_at_once(root, make):
    """A FIFO waits for a writer for ever; /dev/zero has no end."""
    for file, command in {
        **JSON_FILES,
        "a/model.safetensors": MERGE,
        "merge.yaml": ("merge", "merge.yaml", "out"),
    }.items():
        if file.startswith("selector"):
            continue
        place = root / file
        place.parent.mkdir(exist_ok=True)
        kept = place.read_bytes() if place.exists() else None
        place.unlink(missing_ok=True)
        if make == "fifo":
            os.mkfifo(place)
        elif make == "directory":
            place.mkdir()
        else:
            place.symlink_to("/dev/zero" if make == "device" else place.name)
        refused(root, *command)
        place.rmdir() if make == "directory" else place.unlink()
        if kept is not None:
            place.write_bytes(kept)


def bomb(*lines: str) -> str:
    """Ten aliases of ten aliases of ...: 10**9 values in a kilobyte."""
    grown = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(["a0: &a0 [x, x]", *grown, *lines])


MERGED = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)]
YAML = {
    "as method": bomb("merge_method: *a9", "models: [{model: a}]"),
    "as dtype": bomb("merge_method: linear", "dtype: *a9", "models: [{model: a, parameters: {weight: 1}}]"),
    "as models": bomb("merge_method: linear", "models: *a9"),
    "as id": bomb("checkpoints: [{id: *a9, path: a}]"),
    "merge keys": "\n".join(["a0: &a0 {x: 1}", *MERGED, "merge_method: linear"]),
    "an anchor of itself": "merge_method: linear\nmodels: &a [*a]",
    "deep": "models: " + "[" * 5000,
    "wide": "models: [" + "a, " * 200_000 + "a]",
    "a long text many times": "a: &a " + "x" * 100_000 + "\nmodels: [" + "*a, " * 1000 + "*a]",
    "5,000 digits": "merge_method: " + "9" * 5000,
    "a sexagesimal of 5,000 digits": "merge_method: 1" + ":59" * 5000,
    "a day that is none": "merge_method: 2001-13-45",
    "half a pair": 'merge_method: "\\ud800"',
    "a key twice": "merge_method: linear\nmerge_method: ties",
    "an object of Python": "merge_method: !!python/object/apply:os.system ['true']",
    "an odd key": "? [a]\n: b",
    "a list": "[1, 2]",
    "a number": "7",
    "empty": "",
    "NUL": "merge_method: \0",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_explodes_or_lies_is_refused(root, name):
    (root / "merge.yaml").write_text(YAML[name])
    (root / "catalogue.yaml").write_text(YAML[name])
    refused(root, "merge", "merge.yaml", "out")
    refused(root, "catalogue", "list", "catalogue.yaml")


def test_an_error_lists_twenty_problems_and_says_how_many_more(root):
    models = [{"model": "a", "parameters": {"weight": 1, f"wrong{n}": "x" * 9000}} for n in range(500)]
    (root / "merge.yaml").write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "float32"}))
    ended = refused(root, "merge", "merge.yaml", "out", says="more")
    assert ended.said.count("\n") < 25
    entries = [{"id": f"c{n}", "path": 7, "wrong": "x" * 9000} for n in range(500)]
    (root / "catalogue.yaml").write_text(json.dumps({"checkpoints": entries}))
    assert refused(root, "catalogue", "list", "catalogue.yaml", says="and 980 more").said.count("\n") < 25
    (root / "tasks" / "add.jsonl").write_text('{"prompt": 1}\n' * 500)
    assert refused(root, *JSON_FILES["tasks/add.jsonl"], says="more").said.count("\n") < 25


@pytest.mark.parametrize("metric", [["exact_match"], {"a": 1}, 7, None, "x" * 9000])
def test_a_metric_that_is_none_is_refused_in_settings_and_in_items(root, metric):
    item = {"prompt": "1+1=", "target": "2"}
    for rows in ([{"settings": {"metric": metric}}, item], [item | {"metric": metric}]):
        (root / "tasks" / "add.jsonl").write_text("\n".join(map(json.dumps, rows)))
        refused(root, *JSON_FILES["tasks/add.jsonl"], says="metric")


def test_lines_end_where_json_says(root):
    """U+2028, U+2029 and U+0085 may stand in a string as they are."""
    text = "a\u2028b\u2029c\u0085d"
    (root / "tasks" / "add.jsonl").write_text(json.dumps({"prompt": text, "target": "x"}, ensure_ascii=False) + "\r\n")
    assert load_task(root / "tasks" / "add.jsonl").items[0].prompt == text
    (root / "p.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n\n")
    assert [probe.text for probe in load_probe_set(root / "p.jsonl").probes] == [text]
    (root / "p.jsonl").write_text('{"text": "a"}\n{"text": "b"')
    with pytest.raises(ProbeError, match=r"line 2: not JSON \(line 1, column"):
        load_probe_set(root / "p.jsonl")


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "an item beyond 1": ({"items": [0.5, 1.5]}, "items outside [0, 1]: 1.5"),
    "an item below 0": ({"items": [-0.5]}, "items outside [0, 1]: -0.5"),
    "an item that is NaN": ({"items": [float("nan")]}, "items outside [0, 1]: nan"),
    "an item that is null": ({"items": [0.5, None]}, "items outside [0, 1]: nan"),
    "no items": ({"items": []}, "has no items"),
    "a null task": ({"task": None}, "task is None"),
    "a null digest": ({"task_digest": None}, "task_digest is None"),
    "deep settings": ({"settings": "[" * 5000}, "not JSON"),
    "settings of a list": ({"settings": "[]"}, "must be a mapping"),
    "infinite seconds": ({"seconds": float("inf")}, "seconds is inf"),
    "checkpoints of numbers": ({"checkpoints": '{"a": 1}'}, "object of texts"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_label_that_is_none_is_refused_by_all_and_its_store_left_as_it_is(tmp_path, name):
    table = made_up_table("s1", 3)
    labels = made_up_labels(table, 4)
    table.write(tmp_path / "pairs.parquet")
    LabelStore(tmp_path / "labels").append(labels[:3])
    LabelStore(tmp_path / "sound").append([replace(labels[3], seconds=1.0)])
    changes, says = ROWS[name]
    (file,) = (tmp_path / "labels").iterdir()
    read = pq.read_table(file)
    pq.write_table(pa.Table.from_pylist([row | changes for row in read.to_pylist()], schema=read.schema), file)
    train = ("train", "--signals", "pairs.parquet", "--labels", "labels", "--out", "selector", "--log", "../log")
    for command in (
        ("labels", "compact", "labels"),
        ("labels", "merge", "labels", "sound"),
        ("labels", "merge", "sound", "labels"),
        ("labels", "show", "labels"),
        train,
    ):
        refused(tmp_path, *command, says=says)
    found = run("labels", "check", "labels", cwd=tmp_path)
    assert found.code == 1 and found.said.count(says) == 3, found


def test_adapters_whose_matrices_do_not_fit_each_other_are_refused(root):
    from safetensors.numpy import save_file

    module = "base_model.model.model.layers.0.mlp.up_proj"
    for down, up in (((3, 4), (5, 2)), ((0, 4), (5, 0)), ((4,), (5,)), ((2, 4), (6, 2))):
        pair = {
            f"{module}.lora_A.weight": np.ones(down, np.float32),
            f"{module}.lora_B.weight": np.ones(up, np.float32),
        }
        save_file(pair, root / "lora" / "adapter_model.safetensors")
        refused(root, "merge", "lora.json", "out", says="shape")


def test_a_selector_whose_numbers_would_take_the_whole_memory_is_refused(tmp_path):
    """Layers are named before they are looked up, and an array without elements takes no byte of its file."""
    from simmerge_ray.base.arrays import load_arrays
    from simmerge_ray.selector.models.predictors import PREDICTORS

    with pytest.raises(ValueError, match="are no 1099511627776 layers"):
        PREDICTORS["mlp"].from_tensors({"shape": np.array([1, 2**40])})
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}}).encode()
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="has no elements and the shape"):
        load_arrays(empty)
