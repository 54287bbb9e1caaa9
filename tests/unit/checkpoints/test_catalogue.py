"""The catalogue file: adapters, adding a checkpoint, and what is refused (reading and pairs: test_checkpoints.py)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from simmerge_ray.base.errors import CheckpointError, ConfigError, IncompatibleCheckpointsError, OutputError, PlanError
from simmerge_ray.checkpoints.catalogue import (
    _edited_text,
    _put_in,
    add_checkpoint,
    load_catalogue,
    remove_checkpoint,
    twins,
    write_catalogue,
)
from simmerge_ray.checkpoints.digests import checkpoint_digest
from simmerge_ray.checkpoints.references import CheckpointRef
from tests import tiny


def write_adapter(path: Path, rank: int = 2, width: int = 64, seed: int = 0, **config) -> Path:
    """A LoRA adapter of one attention matrix of `tiny.make_model`, as peft writes it."""
    path.mkdir(parents=True)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    random = np.random.default_rng(seed)
    matrices = {
        f"{module}.lora_A.weight": random.normal(size=(rank, width)).astype(np.float32),
        f"{module}.lora_B.weight": random.normal(size=(width, rank)).astype(np.float32),
    }
    save_file(matrices, path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": "base"} | config
    (path / "adapter_config.json").write_text(json.dumps(values))
    return path


@pytest.fixture
def zoo(catalogue_path, tmp_path) -> Path:
    """A copy of the tiny catalogue that a test may change, with an adapter `lora` beside the checkpoints."""
    shutil.copytree(catalogue_path.parent, tmp_path / "zoo")
    write_adapter(tmp_path / "zoo" / "lora")
    return tmp_path / "zoo"


def write_file(zoo: Path, *entries: dict[str, str]) -> Path:
    path = zoo / "adapters.yaml"
    path.write_text(yaml.safe_dump({"base": {"id": "base", "path": "base"}, "checkpoints": list(entries)}))
    return path


def test_an_adapter_is_read_relative_to_the_file_and_survives_it(zoo):
    path = write_file(zoo, {"id": "a", "path": "base", "adapter": "lora", "task": "add"}, {"id": "b", "path": "m1"})
    catalogue = load_catalogue(path)
    assert catalogue.ref("a").adapter == zoo / "lora" and catalogue.ref("b").adapter is None
    write_catalogue(zoo / "again.yaml", catalogue)
    assert yaml.safe_load((zoo / "again.yaml").read_text()) == yaml.safe_load(path.read_text())
    assert load_catalogue(zoo / "again.yaml") == catalogue


def test_an_adapter_is_part_of_the_identity(zoo):
    model = CheckpointRef("a", zoo / "base")
    adapted = replace(model, adapter=zoo / "lora")
    digests = {checkpoint_digest(model), checkpoint_digest(adapted)}
    digests.add(checkpoint_digest(replace(model, adapter=write_adapter(zoo / "other", seed=1))))
    digests.add(checkpoint_digest(replace(model, adapter=write_adapter(zoo / "stronger", lora_alpha=8))))
    assert len(digests) == 4
    assert checkpoint_digest(replace(model, adapter=write_adapter(zoo / "same"))) == checkpoint_digest(adapted)


def test_the_digest_of_an_adapter_needs_all_of_it(zoo):
    ref = CheckpointRef("a", zoo / "base", adapter=zoo / "lora")
    (zoo / "lora" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"'a'.*holds no adapter_config.json"):
        checkpoint_digest(ref)
    shutil.rmtree(zoo / "lora")
    with pytest.raises(CheckpointError, match="'a'"):
        checkpoint_digest(ref)


def test_every_problem_of_adapters_and_models_is_in_one_message(zoo):
    write_adapter(zoo / "wide", width=32)
    write_adapter(zoo / "dora", use_dora=True)
    shutil.rmtree(zoo / "m2")
    path = write_file(
        zoo,
        {"id": "alone", "path": "lora"},
        {"id": "wide", "path": "base", "adapter": "wide"},
        {"id": "dora", "path": "base", "adapter": "dora"},
        {"id": "none", "path": "base", "adapter": "m1"},
        {"id": "gone", "path": "m2", "adapter": "lora"},
        {"id": "fine", "path": "base", "adapter": "lora"},
    )
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        load_catalogue(path)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 5, lines
    for checkpoint_id, message in {
        "alone": "holds an adapter without its model; give the model's directory as `path` and this directory as",
        "wide": "shape (32, 32), the tensor (64, 64)",
        "dora": "use_dora",
        "none": "holds no adapter_config.json",
        "gone": "is not a directory",
    }.items():
        assert any(f"'{checkpoint_id}'" in line and message in line for line in lines), (checkpoint_id, lines)


def test_the_base_takes_no_adapter(zoo):
    path = zoo / "c.yaml"
    path.write_text("base: {id: b, path: base, adapter: lora}\ncheckpoints: [{id: a, path: m0}]")
    with pytest.raises(ConfigError, match="unknown key 'base.adapter'"):
        load_catalogue(path)


def test_a_name_is_as_long_as_a_name(zoo):
    path = zoo / "c.yaml"
    path.write_text(f"base: {{id: b, path: base}}\ncheckpoints: [{{id: {'x' * 201}, path: m0}}]")
    with pytest.raises(ConfigError, match="at most 200 characters") as refused:
        load_catalogue(path)
    assert len(str(refused.value)) < 1000


def test_a_catalogue_is_built_one_by_one(zoo):
    path = zoo / "new" / "c.yaml"
    with pytest.raises(ConfigError, match=r"there is no directory .*new; make it first"):
        add_checkpoint(path, CheckpointRef("m0", zoo / "m0"), "add")
    path.parent.mkdir()
    add_checkpoint(path, CheckpointRef("m0", zoo / "m0"), "add")
    add_checkpoint(path, CheckpointRef("base", zoo / "base"), as_base=True)
    last = add_checkpoint(path, CheckpointRef("tuned", zoo / "base", adapter=zoo / "lora"))
    assert load_catalogue(path) == last
    assert last.base == CheckpointRef("base", zoo / "base") and last.ids == ("m0", "tuned")
    assert last.own_task == {"m0": "add", "tuned": None} and last.ref("tuned").base_id == "base"


def test_an_entry_whose_files_are_gone_can_be_removed_and_so_can_the_base(zoo):
    path = zoo / "c.yaml"
    path.write_text(
        "base: {id: base, path: base}\ncheckpoints:\n  - {id: m0, path: gone}  # old\n  - {id: m1, path: m1}\n"
    )
    remove_checkpoint(path, "m0")
    assert path.read_text() == "base: {id: base, path: base}\ncheckpoints:\n  - {id: m1, path: m1}\n"
    assert remove_checkpoint(path, "base").base is None and load_catalogue(path).ids == ("m1",)
    with pytest.raises(PlanError, match="unknown checkpoint 'm0'; known: m1"):
        remove_checkpoint(path, "m0")


def test_copies_are_told_whatever_they_are_called(zoo):
    shutil.copytree(zoo / "base", zoo / "copied")
    shutil.copytree(zoo / "m0", zoo / "twin")
    path = zoo / "c.yaml"
    entries = "".join(f"  - {{id: {name}, path: {name}}}\n" for name in ("m0", "m1", "twin", "copied"))
    path.write_text(f"base: {{id: base, path: base}}\ncheckpoints:\n{entries}")
    told = twins(load_catalogue(path))
    assert [line.split(", so")[0] for line in told] == [
        "'twin' holds the same weights as 'm0'",
        "'copied' holds the same weights as the base",
    ]
    path.write_text("base: {id: base, path: base}\ncheckpoints: [{id: m0, path: m0}, {id: b, path: ./base}]")
    with pytest.raises(ConfigError, match=r"'b' is the base itself \(.*base\); leave it out"):
        load_catalogue(path)


def test_a_base_alone_is_a_draft(zoo):
    path = zoo / "c.yaml"
    add_checkpoint(path, CheckpointRef("base", zoo / "base"), as_base=True)
    assert load_catalogue(path, draft=True).ids == ()
    with pytest.raises(ConfigError, match="checkpoints"):
        load_catalogue(path)
    assert add_checkpoint(path, CheckpointRef("m0", zoo / "m0")).ids == load_catalogue(path).ids == ("m0",)


STYLES = {
    "indented": "# mine\ncheckpoints:\n  - {id: m0, path: ./m0}  # the first\n",
    "not indented": "# mine\ncheckpoints:\n- id: m0\n  path: ./m0\n\n# the end",
    "base last": "# mine\ncheckpoints:\n  - {id: m0, path: ./m0}\nbase: {id: base, path: base}\n",
    "one line": "checkpoints: [{id: m0, path: ./m0}]",
    "wide": "checkpoints:\n    -   id: m0  # mine\n        path: './m0'\n# the end\n",
    "quoted": "checkpoints:\n  - id: \"m0\"\n    path: './m0'  # mine\n",
    "no checkpoints": "# mine\nbase: {id: base, path: base}\ncheckpoints: []\n",
}


@pytest.mark.parametrize(
    ("style", "as_base"),
    [(style, False) for style in STYLES] + [(style, True) for style in STYLES if "base:" not in STYLES[style]],
)
def test_other_entries_stay_as_they_were_written(zoo, style, as_base):
    path = zoo / "c.yaml"
    path.write_text(STYLES[style])
    before = yaml.safe_load(STYLES[style])
    add_checkpoint(path, CheckpointRef("new", zoo / "m1"), as_base=as_base)
    after = yaml.safe_load(path.read_text())
    entry = {"id": "new", "path": "m1"}
    added = {"base": entry} if as_base else {"checkpoints": [*before["checkpoints"], entry]}
    assert after == before | added
    if style not in ("no checkpoints", "one line"):
        kept = path.read_text()
        remove_checkpoint(path, "new")
        assert yaml.safe_load(path.read_text()) == before
        assert set(path.read_text().splitlines()) <= set(kept.splitlines())  # nothing else was touched
    if style != "one line" and (style, as_base) != ("no checkpoints", False):
        assert set(STYLES[style].splitlines()) <= set(path.read_text().splitlines())


def test_an_empty_base_and_comments_are_no_obstacle(zoo):
    path = zoo / "c.yaml"
    path.write_text("# mine\nbase:\ncheckpoints: []\n")
    add_checkpoint(path, CheckpointRef("base", zoo / "base"), as_base=True)
    add_checkpoint(path, CheckpointRef("m0", zoo / "m0"))
    assert path.read_text() == "# mine\nbase: {id: base, path: base}\ncheckpoints:\n  - {id: m0, path: m0}\n"


@given(text=st.text("01.eE+-_:xno #'\"{}[],&*!|>%@`~", min_size=1, max_size=8))
@example("no")
@example("007")
@example("1e3")
@settings(max_examples=200)
def test_any_text_is_added_as_text(text):
    add = partial(_put_in, entry={"id": text, "path": text}, as_base=False)
    edited = _edited_text(Path("c"), "checkpoints:\n  - {id: m0, path: ./m0}\n", add)
    assert yaml.safe_load(edited)["checkpoints"][1:] == [{"id": text, "path": text}]


def test_a_file_with_a_key_twice_is_not_edited(zoo):
    path = zoo / "c.yaml"
    path.write_text(text := "checkpoints: []\ncheckpoints: []\n")
    with pytest.raises(ConfigError, match="is not YAML: key .checkpoints. is given twice"):
        add_checkpoint(path, CheckpointRef("m0", zoo / "m0"))
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("checkpoint", "as_base", "task", "message"),
    [
        (CheckpointRef("m1", Path("m0")), False, None, "id 'm1' is used already"),
        (CheckpointRef("base", Path("m0")), False, None, "id 'base' is used already"),
        (CheckpointRef("new", Path("m0")), True, None, "'base' is its base already"),
        (CheckpointRef("a b", Path("m0")), False, None, "'id': .*got 'a b'"),
        (CheckpointRef("new", Path("shallow")), False, None, "num_hidden_layers: 'new' has 1, 'base' has 2"),
        (CheckpointRef("new", Path("lora")), False, None, "'new': .* holds an adapter without its model"),
        (CheckpointRef("new", Path("m0"), adapter=Path("m1")), False, None, "'new': .* holds no adapter_config.json"),
    ],
)
def test_what_is_refused_leaves_the_file_as_it_was(zoo, checkpoint, as_base, task, message):
    tiny.save(tiny.make_model(num_layers=1), zoo / "shallow")
    path = zoo / "catalogue.yaml"
    before = path.read_bytes()
    ref = replace(
        checkpoint, path=zoo / checkpoint.path, adapter=zoo / checkpoint.adapter if checkpoint.adapter else None
    )
    with pytest.raises((ConfigError, CheckpointError), match=message):
        add_checkpoint(path, ref, task, as_base)
    assert path.read_bytes() == before


@pytest.mark.parametrize("more", [{"task": "add"}, {"adapter": "lora"}])
def test_a_base_with_a_task_or_an_adapter_is_refused(zoo, more):
    adapter = zoo / more["adapter"] if "adapter" in more else None
    with pytest.raises(ConfigError, match="'b': a base takes no adapter"):
        add_checkpoint(zoo / "c.yaml", CheckpointRef("b", zoo / "base", None, adapter), more.get("task"), as_base=True)
    assert not (zoo / "c.yaml").exists()


def test_a_catalogue_that_cannot_be_written_is_named(zoo):
    (zoo / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/c\.yaml lies below .*file, which is a file"):
        add_checkpoint(zoo / "file" / "c.yaml", CheckpointRef("m0", zoo / "m0"))
