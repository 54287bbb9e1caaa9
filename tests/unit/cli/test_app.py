"""Commands as a user calls them: exit code 2 and one clear line for bad input, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests import tiny
from tests.unit.conftest import Run


@pytest.fixture
def zoo(catalogue_path, tmp_path) -> Path:
    shutil.copytree(catalogue_path.parent, tmp_path / "zoo")
    return tmp_path / "zoo"


def test_help_names_every_stage(simmerge):
    result = simmerge("--help")
    assert result.returncode == 0
    for command in ("demo", "zoo", "signals", "search", "train", "plan", "auto", "merge", "serve", "report"):
        assert command in result.stdout
    assert simmerge("--version").stdout.strip() == "0.2.0"


@pytest.fixture
def search(simmerge, zoo) -> Run:
    """`search(*options)`, or with `command="labels make"` that."""

    def run(*options: str, command: str = "search") -> CompletedProcess[str]:
        files = (zoo / "catalogue.yaml", "--tasks", zoo / "tasks", "--out", zoo.parent / "labels")
        return simmerge(*command.split(), *files, *options, cwd=zoo.parent)

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "5", "--arm", "tise"], "unknown operator 'tise' (did you mean 'ties'?); known: arcee_fusion"),
        (["--budget", "5", "--arm", "ties(density=2)"], "'density': 2.0 is outside (0, 1]"),
        (["--budget", "5", "--arm", "linear", "--arm", "linear"], "'linear' is given twice"),
        (["--evaluator", "vlm"], "'vlm' is not one of 'vllm', 'transformers'"),
        (["--exclude", "m0"], "--exclude: a pair is LEFT,RIGHT, got 'm0'"),
        (["--budget", "5", "--objective", "ad"], "objective 'ad': unknown task 'ad' (did you mean 'add'?)"),
        (["--budget", "5", "--ways", "2-4"], "a merge takes from 2 to 3 checkpoints"),
        (["--budget", "5", "--ways", "2-3"], "'nuslerp' at most 2; leave them out: --arm 'linear' --arm"),
        (["--budget", "5", "--member", "m9"], "unknown checkpoint 'm9'"),
        (["--sampler", "tpa"], "--sampler"),
        ([], "name --budget N, the merges to try; `simmerge labels make` labels every pair"),
    ],
)
def test_bad_options_end_with_code_two_and_leave_nothing(zoo, search, options, message):
    before = sorted(path.name for path in zoo.parent.iterdir())
    result = search(*options)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert sorted(path.name for path in zoo.parent.iterdir()) == before


def damage_config(zoo: Path) -> None:
    content = json.loads((zoo / "m1" / "config.json").read_text())
    (zoo / "m1" / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda zoo: shutil.rmtree(zoo / "m1"), "'m1'"),
        (lambda zoo: (zoo / "m1" / "model.safetensors").write_bytes(b"x" * 100), "'m1'"),
        (damage_config, "num_hidden_layers: 'm1' has 3, 'base' has 2"),
        (lambda zoo: tiny.write_tokenizer(zoo / "m1", tiny.CHARACTERS[::-1]), "different vocabularies"),
        (lambda zoo: (zoo / "tasks" / "add.jsonl").write_text(""), "holds no items"),
        (lambda zoo: shutil.rmtree(zoo / "tasks"), "tasks is no directory"),
        (lambda zoo: (zoo / "catalogue.yaml").write_text("checkpoint: []"), "did you mean 'checkpoints'"),
    ],
)
def test_bad_files_are_named_before_anything_starts(zoo, search, damage, message):
    damage(zoo)
    result = search(command="labels make")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (zoo.parent / "labels").exists()


def test_empty_probes_are_named(zoo, simmerge):
    (zoo / "probes" / "add.jsonl").write_text("")
    result = simmerge("signals", zoo / "catalogue.yaml", "--probes", zoo / "probes", "--out", zoo / "s.parquet")
    assert result.returncode == 2 and "add.jsonl holds no probes" in result.stderr


def test_a_plan_is_merged_and_a_bad_one_is_not(zoo, simmerge):
    plan = {
        "steps": [{"left": "m0", "right": "m1", "operator": "ties", "parameters": {"density": 0.2}}],
        "checkpoints": {"m0": "m0", "m1": "m1"},
        "base": {"id": "base", "path": "base"},
    }
    (zoo / "plan.json").write_text(json.dumps(plan))
    result = simmerge("merge", zoo / "plan.json", zoo / "out")
    assert result.returncode == 0, result.stderr
    assert (zoo / "out" / "model.safetensors").exists() and "ties(density=0.2): m0 + m1" in result.stdout
    plan["steps"][0]["operator"] = "teis"  # type: ignore[index]
    (zoo / "plan.json").write_text(json.dumps(plan))
    result = simmerge("merge", zoo / "plan.json", zoo / "other")
    assert result.returncode == 2 and "unknown operator 'teis'" in result.stderr and not (zoo / "other").exists()


@pytest.mark.parametrize("command", [["report"], ["serve"]])
def test_a_directory_without_a_run_is_refused(tmp_path, command, simmerge):
    result = simmerge(*command, tmp_path)
    assert result.returncode == 2 and str(tmp_path) in result.stderr


def test_the_job_refuses_a_study_with_typos(tmp_path):
    (tmp_path / "study.yaml").write_text("catalog: x\n")
    job = Path(__file__).parents[3] / "jobs" / "build_dataset.py"
    result = subprocess.run([sys.executable, job, tmp_path / "study.yaml"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "did you mean 'catalogue'" in result.stderr


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_an_interrupted_command_cleans_up_and_ends_with_130(tmp_path, how):
    program = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from simmerge_ray.cli.app import run_command\n"
        "from simmerge_ray.base.storage import new_directory\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "def command():\n"
        f"    with new_directory(Path({str(tmp_path / 'out')!r})):\n"
        f"        os.kill(os.getpid(), signal.{how})\n"
        "        time.sleep(60)\n"
        "run_command(command)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 130 and "the same command goes on from what is kept" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "all"], "'all' is not one of 'exact', 'sampled'"),
        (["--memory-per-worker", "0"], "--memory-per-worker: Input should be greater than 0"),
        (["--gpus-per-worker", "-1"], "--gpus-per-worker"),
        (["--positions", "0"], "--positions"),
        (["--attention-positions", "many"], "--attention-positions"),
        (["--coordinates", "0"], "--coordinates"),
        (["--explain", "m0"], "--explain"),
        (["--explain", "m0", "m0"], "two different checkpoints, got 'm0' twice"),
        (["--explain", "m0", "m11"], "unknown checkpoint 'm11'"),
        (["--explain", "base", "m0"], "unknown checkpoint 'base'"),
        (["--probes", "absent"], "absent is no directory"),
    ],
)
def test_bad_options_of_signals_end_with_code_two_and_leave_nothing(zoo, options, message, simmerge):
    before = sorted(path.name for path in (*zoo.iterdir(), *zoo.parent.iterdir()))
    result = simmerge("signals", zoo / "catalogue.yaml", "--out", zoo / "s.parquet", *options, cwd=zoo.parent)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert sorted(path.name for path in (*zoo.iterdir(), *zoo.parent.iterdir())) == before
