"""Every file that users deploy or copy loads with the code that reads it, and what is wrong in one is found."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from simmerge_ray.base.config import DatasetConfig, ServiceConfig, load_yaml
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.capacity.cluster_files.check import lint
from simmerge_ray.capacity.placement import gpu_offer
from simmerge_ray.capacity.size import ModelSize
from simmerge_ray.cli.app import app
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.service.metrics import PrometheusMetrics
from tests.declared import EXTRAS

ROOT = Path(__file__).parents[2]


def test_the_serve_config_fits_ray_s_schema_and_our_builder():
    from ray.serve.schema import ServeDeploySchema

    from simmerge_ray.on_ray import serve_app

    content = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(content)
    (application,) = schema.applications
    module, name = application.import_path.split(":")
    assert module == serve_app.__name__ and callable(getattr(serve_app, name))
    ServiceConfig.model_validate(application.args)
    assert [one.name for one in application.deployments] == [serve_app.MergeService.name]
    assert schema.http_options.host == "127.0.0.1"


def test_the_example_study_is_complete():
    config = load_yaml(ROOT / "jobs" / "study.example.yaml", DatasetConfig)
    assert len(parse_arms(config.search.arms)) == 4
    assert config.out == ROOT / "runs" / "dataset"


def test_the_study_in_a_bucket_is_complete():
    config = load_yaml(ROOT / "cluster" / "study.yaml", DatasetConfig)
    assert str(config.out).startswith("s3://") and len(parse_arms(config.search.arms)) == 4


FILES = sorted(
    path
    for path in (ROOT / "cluster").rglob("*.yaml")
    if path.name != "study.yaml"  # read by the job
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_shipped_is_fine(path):
    from simmerge_ray.on_ray.cluster_files import check_cluster_file

    assert check_cluster_file(path) == []


def test_all_parts_are_there():
    assert {path.name for path in FILES} == {
        "aws.yaml", "gcp.yaml", "policies.yaml", "raycluster.yaml", "rayjob.yaml", "rayservice.yaml", "serve.yaml",
    }  # fmt: skip
    for name in ("aws", "gcp"):
        kinds = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())["available_node_types"]
        workers = {kind: one for kind, one in kinds.items() if kind != "head"}
        assert all(one["min_workers"] == 0 for one in workers.values()), "everything starts from zero"
        assert {one["resources"].get("GPU", 0) for one in workers.values()} == {0, 1, 8}
        spot = [one for one in workers.values() if "SPOT" in json.dumps(one).upper()]
        assert any(one["resources"].get("GPU", 0) == 0 for one in spot)
        for one in workers.values():
            sizes = [int(name[4:-2]) for name in one["resources"] if name.startswith("gpu_")]
            assert not sizes or gpu_offer(max(sizes), one["resources"]["GPU"]).items() <= one["resources"].items()


def changed(content: Any, place: str, value: Any) -> Any:
    """A copy with another value at `a/b/0/c` (`~1` is a slash in a key); None takes the field away."""
    result = copy.deepcopy(content)
    one, keys = result, [int(key) if key.isdigit() else key.replace("~1", "/") for key in place.split("/")]
    for key in keys[:-1]:
        one = one[key]
    if value is None:
        del one[keys[-1]]
    else:
        one[keys[-1]] = value
    return result


CPU, GPU, HEAD = (f"available_node_types/{name}" for name in ("cpu", "gpu_48gb", "head"))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("max_worker", 3, "max_worker"),
        (f"{CPU}/resourcs", {"CPU": 1}, "resourcs"),
        (f"{CPU}/resources/CPU", "16", "'16'"),
        ("head_node_type", "nobody", "nobody|head_node_type"),
        (f"{CPU}/min_workers", 9, "min_workers 9 is more than max_workers 8"),
        (f"{CPU}/node_config/InstanceTyp", "r7i.4xlarge", "did you mean 'InstanceType'|unknown field 'InstanceTyp'"),
        (f"{CPU}/resources/cpu_pool", 1, "unknown resource 'cpu_pool'"),
        (f"{CPU}/resources/CPU", 64, "CPU is 64, r7i.4xlarge has 16"),
        (f"{CPU}/resources/memory", 500 * 10**9, "memory is"),
        (f"{GPU}/resources/gpu_48gb", None, "offer gpu_48gb, too"),
        (f"{GPU}/resources/gpu_80gb", 1, "GPUs of 80 GB are written|have 48 GB"),
        (f"{GPU}/resources", {"CPU": 16, "GPU": 1}, "no size"),
        (f"{HEAD}/resources/CPU", 4, "the head takes work"),
        (f"{HEAD}/resources/gpu_sizes", None, "the head must offer `gpu_sizes: 1`"),
        ("head_start_ray_commands/1", "ray start --head", "RAY_AUTH_MODE=token"),
        ("worker_start_ray_commands", ["ray stop"], "no `ray start`"),
        (
            "head_start_ray_commands/1",
            "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=abc ray start --head --dashboard-host=0.0.0.0",
            "the dashboard listens on all interfaces",
        ),
        ("file_mounts", {"/a": "/b"}, "the nodes get no token"),
        ("docker/password", "hunter22", "a secret in the file|password"),
        ("docker/image", "https://me:hunter22@registry.example.com/x", "secret in clear"),
        ("metadata/simmerge/models/0/parameters", 900e9, "no node holds an engine|do not fit"),
        ("metadata/simmerge/models/1/memory_per_worker_gb", None, "no node holds a signal worker|memory_per_worker_gb"),
        ("metadata/simmerge/models/0/hidden", 3, "hidden"),
    ],
)
def test_mistakes_in_a_launcher_file_are_found(place, value, said, tmp_path):
    from simmerge_ray.on_ray.cluster_files import check_cluster_file

    content = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    if place.endswith("memory_per_worker_gb"):  # then the nodes must be too small, too
        content["available_node_types"]["gpu_h100x8"]["resources"]["memory"] = 10**11
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(changed(content, place, value)))
    found = check_cluster_file(path)
    assert any(re.search(said, problem) for problem in found), found


WORKER = "spec/workerGroupSpecs/1"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("spec/enableInTreeAutoscalling", True, "enableInTreeAutoscalling"),
        (f"{WORKER}/replicas", "0", "replicas"),
        (f"{WORKER}/groupName", None, "groupName"),
        ("spec/autoscalerOptions/upscalingMode", "Fast", "upscalingMode"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0, "rayStartParams"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", "4", "num-cpus"),
        (f"{WORKER}/minReplicas", 7, "replicas 0 is not within 7 to 4"),
        ("spec/authOptions/mode", "disabled", "mode must be token"),
        ("spec/authOptions/secretName", None, "name the secret"),
        ("spec/gcsFaultToleranceOptions/redisPassword", {"value": "hunter22"}, "the password is in the file"),
        ("spec/headGroupSpec/serviceType", "LoadBalancer", "puts Ray on the network"),
        (f"{WORKER}/rayStartParams/resources", '"{\\"gpu\\": 1}"', "unknown resource 'gpu'"),
        (f"{WORKER}/rayStartParams/resources", "{gpu", "rayStartParams.resources"),
        (f"{WORKER}/rayStartParams", {}, "no size"),
        ("spec/headGroupSpec/rayStartParams/resources", None, "the head must offer"),
        (f"{WORKER}/template/spec/containers/0/resources/limits/memory", "64Gi", "make them equal"),
        (f"{WORKER}/template/spec/containers/0/resources/requests/nvidia.com~1gpu", None, "nvidia.com/gpu"),
        (
            f"{WORKER}/template/spec/containers/0/securityContext/readOnlyRootFilesystem",
            False,
            "readOnlyRootFilesystem",
        ),
        (f"{WORKER}/template/spec/containers/0/securityContext/runAsNonRoot", None, "runAsNonRoot"),
        (f"{WORKER}/template/spec/containers/0/env/0", {"name": "HF_TOKEN", "value": "abc"}, "HF_TOKEN"),
        (f"{WORKER}/template/spec/containers/0/env/0", {"name": "X", "value": 1}, "value"),
        (f"{WORKER}/template/spec/containers/0/resources/limits/memory", "lots", "no quantity|make them equal"),
    ],
)
def test_mistakes_in_a_manifest_are_found(place, value, said):
    content = yaml.safe_load((ROOT / "cluster" / "kuberay" / "raycluster.yaml").read_text())
    content = json.loads(json.dumps(content))  # without the aliases, which a change would follow
    found = lint(changed(content, place, value))
    assert any(re.search(said, problem) for problem in found), found


def test_a_serve_config_inside_a_manifest_is_read_too(tmp_path):
    from simmerge_ray.on_ray.cluster_files import check_cluster_file

    content = yaml.safe_load((ROOT / "cluster" / "kuberay" / "rayservice.yaml").read_text())
    content["spec"]["serveConfigV2"] = content["spec"]["serveConfigV2"].replace("registry:", "registri:")
    path = tmp_path / "service.yaml"
    path.write_text(yaml.safe_dump(content))
    assert any("registri" in problem for problem in check_cluster_file(path))


def test_the_memory_of_a_model_is_that_of_the_dry_runs():
    """About what is known of such models: weights twice for an engine, float32 for signals."""
    model = ModelSize(
        name="7B", parameters=7.6e9, layers=28, hidden_size=3584, heads=28, intermediate_size=18944, vocab_size=152064
    )
    assert 2 * 2 * 7.6e9 < model.engine_bytes < 2 * 2 * 7.6e9 + 4e9
    assert 4 * 7.6e9 < model.signal_worker_bytes < 4 * 7.6e9 + 12e9
    assert model.model_copy(update={"memory_per_worker_gb": 20}).signal_worker_bytes == 20 * 10**9


def test_the_command_says_what_is_wrong_and_where(tmp_path):
    shipped = ROOT / "cluster" / "gcp.yaml"
    result = CliRunner().invoke(app, ["cluster", "check", str(shipped)])
    assert result.exit_code == 0 and "gcp.yaml: fine" in result.output
    broken = tmp_path / "broken.yaml"
    broken.write_text(shipped.read_text().replace("min_workers: 0", "min_workers: 40", 1))
    result = CliRunner().invoke(app, ["cluster", "check", str(shipped), str(broken)])
    assert isinstance(result.exception, ConfigError) and "problem" in str(result.exception)
    other = ROOT / "cluster" / "study.yaml"  # as by `cluster/*.yaml`
    result = CliRunner().invoke(app, ["cluster", "check", str(other), str(shipped)])
    assert "study.yaml: is no cluster file" in result.output and "gcp.yaml: fine" in result.output
    for text in ("a: [", "- 1", "a: 1", ""):
        broken.write_text(text)
        result = CliRunner().invoke(app, ["cluster", "check", str(broken)])
        assert isinstance(result.exception, ConfigError), text


def test_the_dashboard_shows_our_metrics_by_the_names_that_ray_exports():
    panels = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"ray_simmerge_\w+", target["expr"])
    }
    suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket_total", "_count_total"]}
    families = PrometheusMetrics().families()
    exported = {f"ray_{one.name}{suffix}" for one in families for suffix in suffixes[one.type]}
    source = (ROOT / "simmerge_ray/on_ray/tune_adapters.py").read_text()
    for kind, name in re.findall(r"(Counter|Gauge|Histogram)\(\s*\"(simmerge_\w+)\"", source):
        exported |= {f"ray_{name}_bucket", f"ray_{name}_count"} if kind == "Histogram" else {f"ray_{name}"}
    assert asked <= exported
    end = r"_(bucket|count)(_total)?$"
    hidden = {"ray_simmerge_log_seq"}  # of interest beside another replica's alone
    assert {re.sub(end, "", name) for name in asked} == {re.sub(end, "", name) for name in exported} - hidden


def test_the_image_is_no_root_and_has_both_targets():
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    targets = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    assert targets == ["cpu", "gpu"]
    parts = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    assert all(part.rstrip().endswith("USER ray") and "RAY_AUTH_MODE=token" in part for part in parts)
    assert all(re.search(r"^RUN pip install(.|\\\n)*&& simmerge doctor$", part, re.MULTILINE) for part in parts)
    extras = set(re.findall(r"\.\[([\w,]+)\]", text))
    assert extras and all(set(one.split(",")) <= set(EXTRAS) for one in extras)
