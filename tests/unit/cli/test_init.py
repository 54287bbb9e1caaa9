"""`simmerge init`: a directory that `simmerge auto` takes as it is, made from checkpoints and files that are there."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from simmerge_ray.base.errors import InputError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.pipelines.starting import plan_start
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.selector.finding.sources import find_request
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`base`, its fine-tunes `m0` and `m1`, and files of prompts."""
    root = tmp_path_factory.mktemp("made")
    tiny.make_catalogue(root, num_checkpoints=2)
    (root / "add.txt").write_text("".join(f"{number}+1=\n" for number in range(90)) + "a" * 300 + "\n")
    (root / "copy.csv").write_text("id,question\n" + "".join(f"{number},copy {number}:\n" for number in range(30)))
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "root")
    return tmp_path / "root"


def say_base(root, name, base):
    path = root / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": str(base)}))


def make_adapter(root, name, base):
    """A LoRA adapter of rank 1 on the first query projection, as peft writes it."""
    (root / name).mkdir()
    key = "model.layers.0.self_attn.q_proj"
    rows, columns = load_file(root / "base" / "model.safetensors")[f"{key}.weight"].shape
    zeros = load_file(root / "base" / "model.safetensors")[f"{key}.weight"] * 0
    factors = {"lora_A": zeros[:1, :columns], "lora_B": zeros[:rows, :1]}
    save_file(
        {f"base_model.model.{key}.{part}.weight": value.copy() for part, value in factors.items()},
        root / name / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (root / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


def test_a_directory_is_made_that_auto_takes(root, simmerge):
    work = root.parent / "work"
    say_base(root, "m0", root / "base")
    call = (f"add={root / 'm0'}", f"copy={root / 'm1'}", "--probes", f"add={root / 'add.txt'}")
    result = simmerge("init", work, *call, "--probes", root / "copy.csv")
    assert result.returncode == 0, result.stderr
    assert "base: " in result.stdout and "which add names" in result.stdout
    assert "64 of 91 texts" in result.stdout and "1 with more than 240 tokens left out" in result.stdout
    assert f"next: simmerge auto {work}/catalogue.yaml --probes {work}/probes" in result.stdout
    catalogue, probes = load_catalogue(work / "catalogue.yaml"), load_probe_sets(work / "probes")
    assert catalogue.ids == ("add", "copy") and catalogue.base.path == root / "base"
    assert dict(catalogue.own_task) == {"add": "add", "copy": "copy"}
    assert {task: len(one.probes) for task, one in probes.items()} == {"add": 64, "copy": 30}
    find_request(catalogue, probes, FindConfig())  # nothing is missing
    assert (work / "catalogue.yaml").read_text().startswith("# ")


def test_templates_say_what_goes_in_and_become_valid_files(root, simmerge):
    work = root.parent / "work"
    result = simmerge("init", work, root / "m0", root / "m1", "--base", root / "base")
    assert f"no probes yet of m0, m1: simmerge init {work} --probes m0=FILE --probes m1=FILE" in result.stdout
    assert "next, with probes: " in result.stdout and not list((work / "probes").glob("*.jsonl"))
    for room in ("probes", "tasks"):
        for template in (work / room).glob("*.template"):
            lines = template.read_text().splitlines(keepends=True)
            assert lines[0].startswith("# ")
            template.with_suffix("").write_text("".join(line for line in lines if not line.startswith("#")))
    assert set(load_probe_sets(work / "probes")) == set(load_tasks(work / "tasks")) == {"m0", "m1"}
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    result = simmerge("init", work, "--probes", f"m0={root / 'add.txt'}")
    assert result.returncode == 2 and "m0.jsonl: exists already; nothing was written" in result.stderr
    result = simmerge("init", work, root / "m0")
    assert result.returncode == 2 and "simmerge catalogue add" in result.stderr
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before


def test_probes_are_added_later(root, simmerge):
    work = root.parent / "work"
    assert simmerge("init", work, f"add={root / 'm0'}", f"copy={root / 'm1'}").returncode == 0
    assert "no base: no checkpoint names one" in simmerge("init", root.parent / "w2", root / "m0").stdout
    more = ("--probes", f"copy={root / 'copy.csv'}", "--field", "question", "--num-probes", "8")
    result = simmerge("init", work, *more)
    assert result.returncode == 0 and "no probes yet of add:" in result.stdout
    assert len(load_probe_sets(work / "probes")["copy"].probes) == 8


def test_a_base_is_found_where_checkpoints_and_adapters_name_it(root):
    make_adapter(root, "lora", root / "base")
    (root / "m1" / "README.md").write_text(f"---\nbase_model: {root / 'base'}\n---\n# m1\n")
    say_base(root, "m1", root / "m1")  # its own path, as some trainers write
    start = plan_start(root / "work", (f"copy={root / 'm1'}", str(root / "lora"), str(root / "m0")))
    assert any("base: " in line and "which copy, lora name" in line for line in start.lines)
    start.write()
    catalogue = load_catalogue(root / "work" / "catalogue.yaml")
    assert catalogue.ids == ("copy", "lora", "m0") and catalogue.base.path == root / "base"
    assert catalogue.ref("lora").adapter == root / "lora" and catalogue.ref("lora").path == root / "base"


def test_a_base_that_is_not_here_is_said(root):
    say_base(root, "m0", "nobody/has-this")
    start = plan_start(root / "work", (str(root / "m0"), str(root / "m1")))
    assert any("m0: made from 'nobody/has-this', which is not here; give --base" in line for line in start.lines)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda root: ((), None, ()), "name the checkpoints: simmerge init"),
        (lambda root: ((str(root / "absent"),), None, ()), "is not a directory"),
        (lambda root: (("hf://nobody/has-this@main",), None, ()), "'nobody/has-this' is no directory here"),
        (lambda root: ((f"a b={root / 'm0'}",), None, ()), "a task is letters, digits"),
        (lambda root: ((str(root / "m0"),), None, ("ad=x.txt",)), "unknown task 'ad'; known: m0"),
        (lambda root: ((str(root / "m0"),), None, ("m0=absent.txt",)), "cannot read absent.txt"),
        (lambda root: ((str(root / "m0"),), None, ("m0=a.txt", "m0=b.txt")), "has probes from a.txt already"),
        (lambda root: ((str(root / "m0"), str(root / "other")), None, ()), "num_hidden_layers"),
        (lambda root: ((str(root / "lora"),), None, ()), "which cannot be had"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_error_and_nothing_is_written(root, call, message):
    tiny.save(tiny.make_model(num_layers=1), root / "other")
    make_adapter(root, "lora", root / "gone")
    with pytest.raises(InputError, match=message):
        plan_start(root / "work", *call(root)).write()
    assert not (root / "work").exists()


def test_different_bases_are_not_guessed(root):
    say_base(root, "m0", root / "base")
    say_base(root, "m1", root / "m0")
    with pytest.raises(InputError, match="name different bases .*m0: .*base; m1: .*m0.*--base"):
        plan_start(root / "work", (str(root / "m0"), str(root / "m1")))


def test_ids_are_made_free_and_legal(root):
    shutil.copytree(root / "m0", root / "x" / "m 0")
    shutil.copytree(root / "m0", root / "y" / "m-0")
    plan_start(root / "work", (str(root / "x" / "m 0"), str(root / "y" / "m-0"))).write()
    assert load_catalogue(root / "work" / "catalogue.yaml").ids == ("m-0", "m-0-2")
