"""`simmerge tune`: a recipe that `simmerge merge` makes, resumable, with one error for what cannot be tuned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.base.storage import write_atomically
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.on_ray import resources
from simmerge_ray.pipelines.tune import tuning_job
from simmerge_ray.plans.plan import read_plan
from simmerge_ray.plans.recipe import GroupWeights


@pytest.fixture
def tune(catalogue_path, simmerge, tmp_path, monkeypatch):
    """In this process, whether or not other tests have started a cluster."""
    root = catalogue_path.parent
    monkeypatch.setattr(resources, "on_running_cluster", lambda: False)

    def run(*options, out="tuned"):
        given = ("--probes", root / "probes", "--out", out, "--steps", "5", "--max-tokens", "4", *options)
        return simmerge("tune", catalogue_path, *given, cwd=tmp_path)

    return run


def test_the_recipe_is_a_plan_that_can_be_merged(tune, simmerge, tmp_path):
    result = tune("--member", "m0", "--member", "m1", "--groups", "layer")
    assert result.returncode == 0, result.stderr
    assert "memory: about" in result.stdout and "make it with: simmerge merge" in result.stdout
    resolved, _ = read_plan(tmp_path / "tuned" / "recipe.json")
    recipe = resolved.plan.recipe
    assert recipe.members == ("m0", "m1")
    assert all(isinstance(weight, GroupWeights) and len(weight.filters) == 2 for weight in recipe.weights)
    made = simmerge("merge", "tuned/recipe.json", "merged", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "filter: model.layers.1." in (tmp_path / "merged" / "mergekit_config.yml").read_text()


def test_an_interrupted_run_goes_on_to_the_same_recipe(tune, tmp_path, monkeypatch):
    import simmerge_ray.signals.tuning.run as pipeline

    assert tune("--groups", "global", out="whole").returncode == 0
    kept = []

    def write_twice(path, content):
        write_atomically(path, content)
        kept.append(path)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(pipeline, "write_atomically", write_twice)
        assert tune("--groups", "global", out="again").returncode == 130
    assert not (tmp_path / "again" / "recipe.json").exists()
    with np.load(tmp_path / kept[-1]) as arrays:
        assert len(arrays["objectives"]) == 2
    assert tune("--groups", "global", out="again").returncode == 0
    recipes = [json.loads((tmp_path / out / "recipe.json").read_text())["members"] for out in ("whole", "again")]
    assert recipes[0] == recipes[1]


def test_an_actor_finds_the_state_wherever_it_runs(catalogue, catalogue_path):
    probes = load_probe_sets(catalogue_path.parent / "probes")
    job = tuning_job(catalogue, probes, TuneConfig(max_tokens=4), Path("tuned"))
    assert job.state_file.parent == Path.cwd() / "tuned"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--member", "m0"), "tuning needs two or more different members, got m0"),
        (("--member", "m0", "--member", "m9"), "unknown checkpoint 'm9'"),
        (("--groups", "layers"), "--groups"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_what_cannot_be_tuned_is_one_error(tune, tmp_path, options, message):
    result = tune(*options)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "tuned").exists()


def test_without_a_base_there_are_no_task_vectors(catalogue_path, simmerge, tmp_path):
    text = catalogue_path.read_text()
    (tmp_path / "c.yaml").write_text(
        text[text.index("checkpoints:") :].replace("path: ", f"path: {catalogue_path.parent}/")
    )
    result = simmerge("tune", "c.yaml", "--probes", catalogue_path.parent / "probes", "--out", "o", cwd=tmp_path)
    assert result.returncode == 2 and "name the common ancestor under `base`" in result.stderr


def test_regmean_is_a_plan_and_a_catalogue_that_other_commands_take(tune, simmerge, tmp_path):
    result = tune("--method", "regmean", "--alpha", "0.5", "--member", "m0", "--member", "m1")
    assert result.returncode == 0, result.stderr
    resolved, _ = read_plan(tmp_path / "tuned" / "recipe.json")
    assert resolved.plan.recipe.arm.label == "regmean(alpha=0.5)"
    made = simmerge("merge", "tuned/recipe.json", "merged", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "# Merge of m0 and m1" in card and "base_model" not in card  # they are of no hub
    assert not (tmp_path / "merged" / "mergekit_config.yml").exists()
    plan = {"operator": "regmean", "members": [{"checkpoint": "m0"}, {"checkpoint": "m1"}], "checkpoints": {}}
    plan["checkpoints"] = {ref.id: str(ref.path) for ref in resolved.checkpoints}
    (tmp_path / "bare.json").write_text(json.dumps(plan))
    refused = simmerge("merge", "bare.json", "other", cwd=tmp_path)
    assert refused.returncode == 2 and "--method regmean" in refused.stderr
    again = simmerge("tune", "tuned/catalogue.yaml", "--probes", "nowhere", "--out", "x", cwd=tmp_path)
    assert "nowhere" in again.stderr  # the catalogue itself is read
