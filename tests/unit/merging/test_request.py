"""`simmerge merge`: mergekit's YAML or a plan of ours, dry runs, and one clear message for what cannot be merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from simmerge_ray.base.errors import InputError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.cli.app import app
from simmerge_ray.merging.request import read_request
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.operators.table import OPERATORS
from simmerge_ray.plans.plan import fold_plan, resolve_plan, write_plan
from tests import tiny
from tests.readers import TensorReader
from tests.unit.test_layers import loaded_by_commands


@pytest.fixture
def zoo(catalogue_path, tmp_path) -> Path:
    shutil.copytree(catalogue_path.parent, tmp_path / "zoo")
    return tmp_path / "zoo"


def config(**changes) -> dict:
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in (("m0", 0.5), ("m1", 0.3), ("m2", 0.2))
        ],
        "parameters": {"density": 0.3},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    } | changes


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_a_mergekit_file_is_merged_and_its_copy_makes_the_same_again(zoo, tmp_path):
    (zoo / "merge.yml").write_text(yaml.safe_dump(config()))
    result = run("merge", zoo / "merge.yml", tmp_path / "out")
    assert result.exit_code == 0, result.output
    written = TensorReader(CheckpointRef("out", tmp_path / "out"))
    readers = [TensorReader(CheckpointRef(name, zoo / name)) for name in ("base", "m0", "m1", "m2")]
    for name, spec in written.specs.items():
        base, *others = (reader.read(name) for reader in readers)
        expected = OPERATORS["ties"](base, others, [0.5, 0.3, 0.2], density=0.3)
        assert spec.dtype == "BF16" and torch.equal(written.read(name), expected.bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = run("merge", tmp_path / "out" / "mergekit_config.yml", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_a_plan_and_its_mergekit_file_are_one_merge(catalogue, tmp_path):
    resolved = resolve_plan(fold_plan(("m0", "m1", "m2"), [make_arm("ties", {"density": 0.2})]), catalogue)
    write_plan(tmp_path / "plan.json", resolved)
    assert run("merge", tmp_path / "plan.json", tmp_path / "ours").exit_code == 0
    result = run("merge", tmp_path / "ours" / "mergekit_config.yml", tmp_path / "theirs")
    assert result.exit_code == 0, result.output
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert files[0] == files[1]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(zoo, tmp_path):
    (zoo / "merge.yml").write_text(yaml.safe_dump(config()))
    result = run("merge", zoo / "merge.yml", tmp_path / "out", "--dry-run", "--threads", 2)
    assert result.exit_code == 0, result.output
    for text in ("ties: m0 + m1 + m2", "read", "write", "memory   at most", "no problem was found"):
        assert text in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"merge_method": "tise"}, ["tise", "ties"]),
        ({"parameters": {}, "paramters": {"density": 0.3}, "dtype": "f"}, ["paramters", "did you mean 'parameters'"]),
        ({"base_model": None}, ["base"]),
        ({"models": [{"model": "nowhere", "parameters": {"weight": 1}}]}, ["nowhere", "not a directory"]),
        ({"parameters": {"density": 7}, "dtype": "float8"}, ["density", "float8"]),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, ["pad_to_multiple_of", "above 0"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_is_written(zoo, tmp_path, changes, messages):
    (zoo / "merge.yml").write_text(yaml.safe_dump(config(**changes)))
    with pytest.raises(InputError) as error:
        read_request(zoo / "merge.yml", tmp_path / "out")
    for message in messages:
        assert message in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


def test_keys_without_effect_are_named_and_refused_only_by_strict(zoo, tmp_path):
    changes = {"x-anchors": {"low": 0.1}, "models": [{"model": "m0", "wieght": 1, "parameters": {"weight": 1, "t": 2}}]}
    (zoo / "merge.yml").write_text(yaml.safe_dump(config(**changes)))
    shown = run("merge", zoo / "merge.yml", tmp_path / "out", "--dry-run").output
    for key in ("x-anchors: unknown key, ignored", "models[0].wieght: unknown key", "models[0].parameters.t: unknown"):
        assert f"warning: {key}" in shown
    with pytest.raises(InputError, match=r"no effect \(--strict\):\n  x-anchors"):
        read_request(zoo / "merge.yml", tmp_path / "out", strict=True)
    assert isinstance(run("merge", zoo / "merge.yml", tmp_path / "out", "--strict").exception, InputError)
    assert not (tmp_path / "out").exists()
    result = run("merge", zoo / "merge.yml", tmp_path / "out")
    assert result.exit_code == 0 and "warning: x-anchors" in result.output
    assert "x-anchors" not in (tmp_path / "out" / "mergekit_config.yml").read_text()


def test_different_vocabularies_are_refused_with_what_to_do(zoo, tmp_path):
    model = tiny.make_model()
    model.resize_token_embeddings(60)
    tiny.save(model, zoo / "m1")
    (zoo / "merge.yml").write_text(yaml.safe_dump(config()))
    with pytest.raises(InputError, match="vocabular"):
        read_request(zoo / "merge.yml", tmp_path / "out")


def test_an_adapter_that_does_not_fit_is_found_by_the_dry_run(zoo, tmp_path):
    from tests.unit.checkpoints.test_adapters import make_adapter

    make_adapter(zoo / "adapter", r=2, target_modules=["q_proj"])
    models = [{"model": f"{name}+adapter", "parameters": {"weight": 1}} for name in ("m0", "m1")]
    (zoo / "merge.yml").write_text(yaml.safe_dump(config(models=models)))
    lines = read_request(zoo / "merge.yml", tmp_path / "out").lines(10**9, 1)
    assert any("+ " + str(zoo / "adapter") in line for line in lines)
    settings = json.loads((zoo / "adapter" / "adapter_config.json").read_text())
    (zoo / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(InputError, match="use_dora"):
        read_request(zoo / "merge.yml", tmp_path / "out")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match="cannot read .*absent.yml"):
        read_request(tmp_path / "absent.yml", tmp_path / "out")
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text"):
        read_request(tmp_path / "bytes.yml", tmp_path / "out")


@pytest.mark.slow
def test_a_merge_in_blocks_loads_no_torch_transformers_ray_or_compiler(catalogue, tmp_path):
    operators = ("linear", "slerp", "ties")
    for operator in operators:
        resolved = resolve_plan(fold_plan(("m0", "m1"), [make_arm(operator)]), catalogue)
        write_plan(tmp_path / f"{operator}.json", resolved)
        write_merge(resolved, tmp_path / f"{operator}-here")  # its loops are compiled now
    calls = [["merge", str(tmp_path / f"{operator}.json"), str(tmp_path / operator)] for operator in operators]
    for operator, loaded in zip(operators, loaded_by_commands(calls), strict=True):
        assert (tmp_path / operator / "model.safetensors").exists()
        assert not loaded & {"torch", "transformers", "ray", "pandas", "sklearn", "numba", "scipy"}


def test_a_dry_run_counts_what_has_no_effect_in_its_last_line(zoo, tmp_path):
    (zoo / "merge.yml").write_text(yaml.safe_dump(config()))
    lines = run("merge", zoo / "merge.yml", tmp_path / "out", "--dry-run").output.splitlines()
    assert lines[-1] == "no problem was found"
    models = [one | {"parameters": one["parameters"] | {"densty": 0.5}} for one in config()["models"]]
    (zoo / "merge.yml").write_text(yaml.safe_dump(config(models=models)))
    lines = run("merge", zoo / "merge.yml", tmp_path / "out", "--dry-run").output.splitlines()
    assert sum(line.startswith("warning: models[") for line in lines) == 3
    assert lines[-1] == "no problem was found; without effect (--strict refuses): 3 warnings above"


def test_another_merge_that_is_replaced_is_named(zoo, tmp_path):
    said = f"replaces another merge, which {tmp_path / 'out'} holds"
    for weight, is_other in ((0.5, False), (0.5, False), (0.1, True)):
        models = [{"model": name, "parameters": {"weight": w}} for name, w in (("m0", 0.5), ("m1", weight))]
        (zoo / "merge.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
        for option in (["--dry-run"], []):
            result = run("merge", zoo / "merge.yml", tmp_path / "out", *option)
            assert result.exit_code == 0 and (said in result.output) == is_other, result.output
