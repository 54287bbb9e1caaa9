"""`jobs/build_dataset.py` under `ray job submit` on a cluster with token authentication, and as a plain script."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from simmerge_ray.catalogue import load_catalogue
from simmerge_ray.config import SearchConfig
from simmerge_ray.distributed.merge_search import TrialRunner, plan_study
from simmerge_ray.evaluation import load_tasks
from simmerge_ray.labels import LabelStore, Measured
from simmerge_ray.probes import load_probe_sets
from simmerge_ray.signals.table import compute_signals, read_signal_table

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Ports that are free now, outside the range that Ray gives to its workers (10002-19999)."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port >= 20000 and port not in found:
            found.append(port)
    return found


@pytest.fixture
def head(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """(dashboard address, environment) of a head node in the foreground of a process of its own."""
    gcs, dashboard, client, agent, metrics = free_ports(5)
    # Sockets live below it, and their paths may have 107 characters.
    temp_dir = Path(f"/tmp/sm-{os.getpid()}")
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    environment.pop("RAY_ADDRESS", None)
    command = [
        BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
        "--object-store-memory=300000000", f"--port={gcs}", f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", f"--temp-dir={temp_dir}",
    ]  # fmt: skip
    log = (tmp_path_factory.mktemp("head") / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=2)
                break
            except urllib.error.HTTPError as error:
                assert error.code == 401  # without the token: authentication is on
                break
            except OSError:
                time.sleep(0.3)
        yield address, environment
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, f"left behind: {alive}"


@pytest.mark.ray
def test_a_submitted_job_makes_the_dataset_of_a_local_run(catalogue_path, tmp_path, head):
    address, environment = head
    root = catalogue_path.parent
    study = {
        "catalogue": str(catalogue_path),
        "probes": str(root / "probes"),
        "tasks": str(root / "tasks"),
        "signals": {"batch_size": 8},
        "search": {"arms": ["linear", "ties(density=0.2)"], "evaluator": "transformers", "concurrency": 1},
    }
    out = tmp_path / "dataset"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"out": str(out)}))
    submit = [BIN / "ray", "job", "submit", "--address", address, "--working-dir", ".", "--"]
    command = [*submit, "python", "jobs/build_dataset.py", str(tmp_path / "study.yaml")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"dataset written to {out}" in result.stdout

    # The plain script finds everything in place; a study with a typo is refused.
    job = [sys.executable, "jobs/build_dataset.py"]
    again = subprocess.run([*job, tmp_path / "study.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout.count("unchanged since the last run") == 2, (
        again.stdout + again.stderr
    )
    (bad := tmp_path / "bad.yaml").write_text(yaml.safe_dump(study | {"out": "x", "serach": {}}))
    refused = subprocess.run([*job, bad], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "did you mean 'search'" in refused.stderr

    # The same without Ray, in this process.
    catalogue, tasks = load_catalogue(catalogue_path), load_tasks(root / "tasks")
    table = read_signal_table(out / "signals" / "pairs.parquet")
    local = compute_signals(catalogue, load_probe_sets(root / "probes"), batch_size=8)
    assert table.rows.keys() == local.rows.keys() and table.provenance == local.provenance
    for key, row in local.rows.items():
        assert dict(table.rows[key].features) == pytest.approx(dict(row.features), rel=1e-5, abs=1e-5)
    config = SearchConfig(arms=("linear", "ties(density=0.2)"), evaluator="transformers")
    undisturbed = plan_study(catalogue, tasks, config, str(tmp_path / "local"))
    runner = TrialRunner(undisturbed)
    for trial in undisturbed.trials:
        runner.run(trial)
    labels = [
        [(one.key, one.outcome.items.tolist()) for one in LabelStore(uri).read() if isinstance(one.outcome, Measured)]
        for uri in (out / "labels", tmp_path / "local")
    ]
    assert labels[0] == labels[1] and len(labels[0]) == 16
