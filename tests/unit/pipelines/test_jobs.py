"""The scripts in `jobs/`: help without heavy imports, where results may go, exit codes and the last line, resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simmerge_ray.base.errors import EngineError, InputError, OutputError
from simmerge_ray.base.storage import as_place
from simmerge_ray.pipelines.jobs import output_place, run_job
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import pair_plan, resolve_plan, write_plan
from simmerge_ray.search.labels import LabelStore
from tests.job_lines import read_last_line
from tests.unit.selector.made_up import made_up_labels, made_up_table, write_study

ROOT = Path(__file__).parents[3]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
HEAVY = {"ray", "torch", "vllm", "numpy", "transformers", "pandas", "sqlalchemy", "fastapi"}
UNPACKED = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123"


def test_every_job_of_the_readme_is_there():
    names = {path.stem for path in JOBS}
    assert names >= {"build_dataset", "find_merge", "train_selector", "replay_bandit", "merge_plan", "study", "retrain"}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_help_loads_no_heavy_library(path):
    code = f"""
import runpy, sys
sys.argv = [{path.name!r}, "--help"]
try:
    runpy.run_path({str(path)!r}, run_name="__main__")
except SystemExit:
    print(sorted({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"jobs/{path.name}" in done.stdout and done.stdout.endswith("[]\n")


class TestPlaces:
    """Where a job may write."""

    def test_a_uri_stays_and_a_path_becomes_absolute(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert output_place(as_place("s3://bucket/run")) == as_place("s3://bucket/run")
        assert output_place(Path("run")) == tmp_path / "run"
        assert output_place(Path("/shared/run")) == Path("/shared/run")

    @pytest.mark.parametrize("place", ["run", "./run", "../run", f"{UNPACKED}/run"])
    def test_under_a_submitted_job_the_working_directory_is_refused(self, monkeypatch, place):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        with pytest.raises(OutputError, match=r"--out is .*run'.*absolute path.*s3://"):
            output_place(Path(place))
        for shared in ("/shared/run", "gs://bucket/run"):
            assert output_place(as_place(shared)) == as_place(shared)


class TestLastLine:
    """What a job says at its end."""

    @pytest.mark.parametrize(
        ("error", "status", "code", "text"),
        [
            (InputError("no such file"), "failed", 2, "no such file"),
            (EngineError("the cluster lost 2 trials"), "failed", 1, "the cluster lost"),
            (KeyboardInterrupt(), "interrupted", 130, "again"),
            (ZeroDivisionError("division by zero"), "failed", 1, "ZeroDivisionError: division by zero"),
        ],
    )
    def test_an_error_is_told_with_its_code(self, capsys, error, status, code, text):
        def work():
            raise error

        assert run_job("merge_plan", work) == code
        said = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("simmerge-job "))
        assert (said["job"], said["status"], said["exit_code"]) == ("merge_plan", status, code)
        assert text in said["error"]

    def test_results_stand_in_it_and_it_is_found_among_ray_s_lines(self, capsys):
        assert run_job("study", lambda: {"out": "/shared/run"}) == 0
        output = capsys.readouterr().out
        expected = {"job": "study", "status": "done", "exit_code": 0, "out": "/shared/run"}
        assert read_last_line(f"{output}\nJob 'x' succeeded\n") == expected


@pytest.mark.slow
def test_a_selector_is_trained_once(run_job_script, tmp_path):
    study = write_study(tmp_path / "study", ("p", "q"))
    code, said, _ = run_job_script("train_selector", study, "--out", tmp_path / "selector", "--model", "ridge")
    assert code == 0 and said["out"] == str(tmp_path / "selector") and (tmp_path / "selector" / "report.md").exists()
    before = (tmp_path / "selector" / "manifest.json").stat().st_mtime_ns
    code, said, output = run_job_script("train_selector", study, "--out", tmp_path / "selector", "--model", "ridge")
    assert code == 0 and said["status"] == "done" and "unchanged since the last run" in output
    assert (tmp_path / "selector" / "manifest.json").stat().st_mtime_ns == before


def test_what_a_selector_cannot_be_trained_from_is_refused(run_job_script, tmp_path):
    code, said, _ = run_job_script("train_selector", tmp_path / "none", "--out", tmp_path / "selector")
    assert code == 2 and "no data set at" in said["error"]
    code, said, _ = run_job_script("train_selector", tmp_path, "--out", tmp_path / "selector", "--model", "mpl")
    assert code == 2 and "model" in said["error"] and not (tmp_path / "selector").exists()
    code, said, _ = run_job_script("train_selector", "--out", tmp_path / "selector")
    assert code == 2 and said["error"] == "give DATASET, or both --signals and --labels"


@pytest.mark.slow
def test_a_replay_goes_on_with_the_domains_that_are_missing(run_job_script, tmp_path):
    study = tmp_path / "study"
    made_up = made_up_table("p", 9, ("s", "t", "u"))
    made_up.write(study / "signals" / "p" / "pairs.parquet")
    own = made_up.provenance["own_task"]
    labels = [
        one for one in made_up_labels(made_up) if not one.plan.steps or one.task in {own[m] for m in one.plan.members}
    ]
    LabelStore(study / "labels" / "p").append(labels)
    arguments = (study, "--out", tmp_path / "replay", "--orders", 2, "--rounds", 5)
    code, said, output = run_job_script("replay_bandit", *arguments)
    assert code == 0 and said["regret"]["oracle"] == 0.0 and "| warm, safe |" in output
    assert {"bandit-replay.json", "bandit-replay.png"} <= {one.name for one in (tmp_path / "replay").iterdir()}
    parts = sorted((tmp_path / "replay" / "bandit-replay.parts").iterdir())
    assert len(parts) == 3 and output.count("clusters played") == 3
    parts[1].unlink()
    code, again, output = run_job_script("replay_bandit", *arguments)
    assert code == 0 and again == said and output.count("clusters played") == 1
    assert sorted((tmp_path / "replay" / "bandit-replay.parts").iterdir()) == parts


def test_a_merge_s_dry_run_and_its_problems(run_job_script, catalogue, tmp_path):
    plan = tmp_path / "plan.json"
    write_plan(plan, resolve_plan(pair_plan("m0", "m1", make_arm("ties")), catalogue))
    code, said, output = run_job_script("merge_plan", plan, tmp_path / "merged", "--dry-run")
    assert code == 0 and said["status"] == "unchanged" and "no problem was found" in output
    assert not (tmp_path / "merged").exists()
    code, said, _ = run_job_script("merge_plan", tmp_path / "none.json", tmp_path / "merged")
    assert code == 2 and "none.json" in said["error"]


def test_a_choice_without_labels_is_refused_before_anything_is_computed(
    run_job_script, catalogue_path, tmp_path, monkeypatch
):
    given = (catalogue_path, "--probes", catalogue_path.parent / "probes", "--evaluator", "transformers")
    code, said, _ = run_job_script("find_merge", *given, "--out", tmp_path / "best", "--objective", "ad")
    assert (code, said["job"]) == (2, "find_merge") and "did you mean 'add'" in said["error"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    code, said, _ = run_job_script("find_merge", *given, "--out", "best")
    assert code == 2 and "--out is" in said["error"] and "absolute path" in said["error"]
    more = ("--out", tmp_path / "best", "--signatures", "signatures")
    code, said, _ = run_job_script("find_merge", *given, *more)
    assert code == 2 and "--signatures is" in said["error"] and not (tmp_path / "best").exists()


def test_a_study_with_an_unknown_stage_is_refused(run_job_script, tmp_path):
    code, said, _ = run_job_script("study", "--out", tmp_path / "study", "--stage", "pears")
    assert code == 2 and "did you mean 'pairs'" in said["error"] and not (tmp_path / "study").exists()
