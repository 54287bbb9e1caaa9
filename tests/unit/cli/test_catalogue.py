"""`simmerge catalogue` as a user calls it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.digests import checkpoint_digest
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.tokenizers import tokenizer_digest
from simmerge_ray.cli.catalogue import _in_units, catalogue_app
from tests import tiny
from tests.unit.checkpoints.test_catalogue import write_adapter
from tests.unit.test_layers import loaded_by_commands


@pytest.fixture
def zoo(catalogue_path, tmp_path) -> Path:
    shutil.copytree(catalogue_path.parent, tmp_path / "zoo")
    write_adapter(tmp_path / "zoo" / "lora")
    return tmp_path / "zoo"


def call(*arguments: str | Path) -> str:
    """The output of a command that succeeds."""
    result = CliRunner(env={"COLUMNS": "300"}).invoke(catalogue_app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def cells(line: str) -> list[str]:
    return re.split(r" {2,}", line.strip())


def test_a_catalogue_from_nothing_to_list_and_show(zoo, tmp_path):
    file = zoo / "new.yaml"
    shutil.copytree(zoo / "m1", tmp_path / "elsewhere")
    call("add", file, "base", zoo / "base", "--base")
    call("add", file, "m0", zoo / "m0", "--task", "add")
    call("add", file, "tuned", zoo / "base", "--adapter", zoo / "lora")
    assert "holds 3 checkpoints and a base" in call("add", file, "far", tmp_path / "elsewhere")
    assert yaml.safe_load(file.read_text()) == {
        "base": {"id": "base", "path": "base"},
        "checkpoints": [
            {"id": "m0", "path": "m0", "task": "add"},
            {"id": "tuned", "path": "base", "adapter": "lora"},
            {"id": "far", "path": str(tmp_path / "elsewhere")},
        ],
    }
    rows = [cells(line) for line in call("list", file).splitlines()[2:]]
    assert [row[0] for row in rows] == ["base", "m0", "tuned", "far"]
    assert [row[1] for row in rows] == ["(base)", "add", "-", "-"]
    assert {row[3] for row in rows} == {"F32"}
    assert [row[5] for row in rows] == ["-", "-", "lora", "-"]
    assert [row[6] for row in rows] == ["base", "m0", "base", str(tmp_path / "elsewhere")]
    told = json.loads(call("list", file, "--json"))
    assert [row["id"] for row in told] == ["base", "m0", "tuned", "far"] and told[3]["adapter"] is None
    assert json.loads(call("show", file, "m0", "--json"))["task"] == "add"


def test_show_says_what_headers_config_and_digests_say(zoo):
    file = zoo / "catalogue.yaml"
    catalogue = load_catalogue(file)
    for ref in catalogue.all_refs:
        shown = dict(line.strip().split("  ", 1) for line in call("show", file, ref.id).splitlines())
        shown = {name: value.strip() for name, value in shown.items()}
        num_parameters = sum(parameter.numel() for parameter in tiny.make_model().parameters())
        assert shown["parameters"].endswith(f"({num_parameters})")
        assert shown["tensors"] == str(len(read_headers(ref)))
        assert (shown["model type"], shown["layers"], shown["hidden size"]) == ("llama", "2", "64")
        assert shown["digest"] == checkpoint_digest(ref) and shown["tokenizer digest"] == tokenizer_digest(ref)
        assert shown["base"] == ("(this is the base)" if ref == catalogue.base else "base")
        assert shown.get("task") == catalogue.own_task.get(ref.id)


def test_several_dtypes_are_named_that_of_most_bytes_first(zoo):
    from safetensors.torch import load_file, save_file

    for name in ("base", "m0"):
        tensors = load_file(zoo / name / "model.safetensors")
        halved = {key: t.to(torch.bfloat16) if "mlp" in key else t for key, t in tensors.items()}
        save_file(halved, zoo / name / "model.safetensors", {"format": "pt"})
    rows = [cells(line) for line in call("list", zoo / "catalogue.yaml").splitlines()[2:]]
    assert [row[3] for row in rows] == ["F32, BF16", "F32, BF16", "F32", "F32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "catalogue.yaml", "m0", "m1"], "id 'm0' is used already"),
        (["add", "catalogue.yaml", "b", "m1", "--base"], "'base' is its base already"),
        (["add", "catalogue.yaml", "x", "lora"], "holds an adapter without its model"),
        (["add", "catalogue.yaml", "x", "absent"], "absent is not a directory"),
        (["add", "catalogue.yaml", "x", "base", "--adapter", "absent"], "absent is not a directory"),
        (["show", "catalogue.yaml", "m7"], "unknown checkpoint 'm7'"),
        (["list", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_input_ends_with_code_two_and_changes_nothing(zoo, arguments, message, simmerge):
    before = (zoo / "catalogue.yaml").read_bytes()
    result = simmerge("catalogue", *arguments, cwd=zoo)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert (zoo / "catalogue.yaml").read_bytes() == before and not (zoo / "absent.yaml").exists()


def test_a_taken_id_is_refused_before_anything_is_fetched(zoo, simmerge):
    result = simmerge("catalogue", "add", zoo / "catalogue.yaml", "m0", "owner/never-asked-for")
    assert result.returncode == 2 and "id 'm0' is used already" in result.stderr


def test_the_commands_load_no_heavy_library(zoo):
    file = zoo / "catalogue.yaml"
    calls = (
        ["add", str(zoo / "new.yaml"), "tuned", str(zoo / "base"), "--adapter", str(zoo / "lora")],
        ["list", str(file)],
        ["show", str(file), "m0"],
    )
    for arguments, loaded in zip(calls, loaded_by_commands(["catalogue", *call] for call in calls), strict=True):
        assert not loaded & {"torch", "ray", "transformers", "numba", "pyarrow", "huggingface_hub"}, arguments


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1.0 k"), (999_999, "1.0 M"), (134_515_008, "134.5 M"), (7 * 10**9, "7.0 G")],
)
def test_counts_have_decimal_prefixes(count, text):
    assert _in_units(count) == text
