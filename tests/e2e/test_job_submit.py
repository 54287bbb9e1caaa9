"""`jobs/build_dataset.py` under `ray job submit` on a cluster with token authentication, then as a plain script."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.on_ray.engines import start_evaluator
from simmerge_ray.pipelines.jobs import LAST_LINE
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import pair_plan, resolve_plan, write_plan
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import LabelStore, Measured
from simmerge_ray.search.runner import TrialRunner
from simmerge_ray.search.setup import grid_trials, prepare_search
from tests.job_lines import read_last_line

ROOT = Path(__file__).parents[2]
ARMS = ("linear", "slerp", "ties(density=0.2)")
JOB = "jobs/build_dataset.py"


@pytest.mark.ray
def test_a_submitted_job_makes_the_labels_of_a_local_run(catalogue_path, tmp_path, ray_cluster, monkeypatch, capsys):
    root, out = catalogue_path.parent, tmp_path / "dataset"
    study = {
        "catalogue": str(catalogue_path),
        "probes": str(root / "probes"),
        "tasks": str(root / "tasks"),
        "out": str(out),
        "signals": {"batch_size": 8, "num_workers": 1},
        "search": {"arms": list(ARMS), "evaluator": "transformers", "concurrency": 1},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))

    ray = Path(sys.executable).parent / "ray"
    submit = [ray, "job", "submit", "--address", ray_cluster, "--working-dir", ".", "--", "python", JOB]
    command = [*submit, str(tmp_path / "study.yaml")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"dataset written to {out}" in result.stdout

    # The script, called without a cluster, finds everything in place.
    monkeypatch.setattr(sys, "argv", command[-2:])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / JOB), run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.count("unchanged since the last run") == 2

    # The same labels without Ray, in this process.
    catalogue, tasks = load_catalogue(catalogue_path), load_tasks(root / "tasks")
    undisturbed = prepare_search(
        catalogue, tasks, SearchConfig.model_validate(study["search"]), str(tmp_path / "local")
    )
    runner = TrialRunner(undisturbed, start_evaluator)
    for trial in grid_trials(undisturbed):
        runner.run(trial)
    found, expected = LabelStore(out / "labels").read(), LabelStore(tmp_path / "local").read()
    assert all(isinstance(label.outcome, Measured) for label in found) and len(found) == 4 * 2 + 2 * 3 * 2
    assert [(one.key, one.outcome.items.tolist()) for one in found] == [
        (one.key, one.outcome.items.tolist()) for one in expected
    ]


@pytest.mark.ray
def test_a_submitted_merge_refuses_ray_s_copy_of_the_directory_and_makes_the_bytes_of_a_local_one(
    catalogue, tmp_path, ray_cluster
):
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm("ties")), catalogue)
    write_plan(tmp_path / "plan.json", resolved)
    local = write_merge(resolved, tmp_path / "local").path
    ray = Path(sys.executable).parent / "ray"
    merge = f"python jobs/merge_plan.py {tmp_path}/plan.json"
    entrypoint = f"{merge} merged || {merge} {tmp_path}/merged --workers 2"  # the first is refused
    submit = [
        ray,
        "job",
        "submit",
        "--address",
        ray_cluster,
        "--working-dir",
        ".",
        "--",
        "bash",
        "-c",
        entrypoint,
    ]
    result = subprocess.run(submit, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    refused, made = (read_last_line(line) for line in result.stdout.splitlines() if line.startswith(LAST_LINE))
    assert refused["exit_code"] == 2 and "OUT is 'merged'" in refused["error"]
    assert made["exit_code"] == 0 and made["out"] == str(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()


@pytest.mark.ray
def test_two_submissions_of_a_choice_run_one_after_the_other_and_compute_once(catalogue_path, tmp_path, ray_cluster):
    given = f"--probes {catalogue_path.parent}/probes --out {tmp_path}/best --evaluator transformers"
    small = "--member m0 --member m1 --recipes 200 --shortlist 2 --tune none --max-tokens 4 --concurrency 1 --no-write"
    job = f"python jobs/find_merge.py {catalogue_path} {given} {small}"
    submit = [Path(sys.executable).parent / "ray", "job", "submit", "--address", ray_cluster, "--working-dir", "."]
    both = ["--", "bash", "-c", f"{job} & {job}; wait"]
    result = subprocess.run([*submit, *both], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = (read_last_line(line) for line in result.stdout.splitlines() if line.startswith(LAST_LINE))
    assert first == second and first["exit_code"] == 0 and first["answer"] in ("merge", "keep")
    assert f"another job is at work on {tmp_path}/best; waiting" in result.stdout
    labels = [label.key for label in LabelStore(tmp_path / "best" / "labels").read()]
    assert len(labels) == len(set(labels)) > 0
