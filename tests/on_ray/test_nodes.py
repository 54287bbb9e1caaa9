"""A head and three emulated nodes that are killed, or taken back with notice, in every stage; drivers that are lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

from simmerge_ray.base.config import SearchConfig, SignalsConfig
from simmerge_ray.capacity.placement import gpu_offer
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.on_ray.engines import start_evaluator
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import pair_plan, resolve_plan, write_plan
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.search.runner import TrialRunner
from simmerge_ray.search.setup import grid_trials, prepare_search
from simmerge_ray.service.http.listening import free_port
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.table import read_signal_table
from tests.job_lines import read_last_line
from tests.on_ray.on_nodes import num_again

ROOT = Path(__file__).parents[2]
NOTICE_S = 2
SEARCH = {"arms": ["linear", "ties(density=0.2)"], "evaluator": "transformers", "concurrency": 2}
SIGNALS = {"batch_size": 8, "num_workers": 3}
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


class Nodes:
    """The cluster; lost nodes are replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        fast = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": fast, "gcs_server_port": free_port()}
        self._cluster = Cluster(True, False, head_node_args=head)
        self._nodes = [self._add() for _ in range(3)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def _add(self, **offered: Any):
        return self._cluster.add_node(num_cpus=1, **offered)

    @contextmanager
    def pool(self, size_gb: int) -> Iterator[str]:
        """One more node, with a GPU of that size as far as Ray knows."""
        node = self._add(num_gpus=1, resources=gpu_offer(size_gb, 1))
        try:
            yield node.node_id
        finally:
            self._cluster.remove_node(node, allow_graceful=False)

    def lose(self, node_id: str) -> None:
        """Kill a node at once."""
        (lost,) = (node for node in self._nodes if node.node_id == node_id)
        self._nodes.remove(lost)
        self._cluster.remove_node(lost, allow_graceful=False)
        self._nodes.append(self._add())

    def take_back(self, node_id: str) -> None:
        """A preemption: Ray is told before the node goes, and that it is not its fault."""
        client = GcsClient(address=self.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, message = client.drain_node(node_id, reason, "spot", int(1000 * (time.time() + NOTICE_S)))
        assert accepted, message
        time.sleep(NOTICE_S)
        self.lose(node_id)

    def end(self) -> None:
        self._cluster.shutdown()


def wait_for(condition: Callable[[], object], what: str, told: Callable[[], object] = lambda: "") -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}: {told()}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
        cluster = Nodes()
    yield cluster
    cluster.end()


class Driver:
    """`on_nodes` as a process."""

    def __init__(
        self, nodes: Nodes, directory: Path, stage: str, *arguments: object, hold: tuple[str, ...] = ()
    ) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "hold.json").write_text(json.dumps(hold))
        self._directory, self._nodes = directory, nodes
        command = [sys.executable, "-m", "tests.on_ray.on_nodes", directory, stage, *arguments]
        environment = {**os.environ, "RAY_ADDRESS": nodes.address, "PYTHONPATH": str(ROOT)}
        self._output = (directory / "output").open("a+")
        self.process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=environment, stdout=self._output, stderr=self._output
        )

    def held(self, name: str) -> str:
        """The node on which a piece of work is being held."""
        path = self._directory / f"held-{name}"
        wait_for(lambda: path.exists() or self.process.poll() is not None, f"{name} is held", self.text)
        assert path.exists(), self.text()
        return path.read_text()

    def text(self) -> str:
        return (self._directory / "output").read_text()

    def end(self) -> dict[str, object]:
        """What the job's last line says."""
        assert self.process.wait(300) == 0, self.text()
        self._output.close()
        return read_last_line(self.text())


def write_job(catalogue_path: Path, out: Path, path: Path) -> Path:
    root = catalogue_path.parent
    paths = {"catalogue": catalogue_path, "probes": root / "probes", "tasks": root / "tasks", "out": out}
    job = {name: str(one) for name, one in paths.items()} | {"signals": SIGNALS, "search": SEARCH}
    path.write_text(yaml.safe_dump(job))
    return path


def local_table(catalogue, probes: Path):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compute_signals(
            catalogue, load_probe_sets(probes), SignatureSpec.of(SignalsConfig.model_validate(SIGNALS))
        )
    finally:
        torch.set_num_threads(threads)


def local_labels(catalogue, tasks: Path, store: Path) -> list:
    study = prepare_search(catalogue, load_tasks(tasks), SearchConfig.model_validate(SEARCH), str(store))
    runner = TrialRunner(study, start_evaluator)
    for trial in grid_trials(study):
        runner.run(trial)
    return LabelStore(store).read()


def test_signal_workers_are_spread_and_engines_get_a_gpu_that_holds_their_model(nodes, tmp_path):
    with nodes.pool(16), nodes.pool(80) as large:
        said = Driver(nodes, tmp_path, "place", 3, hold=()).end()
    assert len(set(said["workers"])) == 3
    assert said["large"] == [large]
    assert said["halves"] == [large] * 2  # packed


def test_a_dataset_is_that_of_a_local_run_though_nodes_and_the_driver_are_lost(
    nodes, catalogue, catalogue_path, tmp_path
):
    """In the signals a node is killed and one is taken back; in the search, too, after its driver was killed."""
    job = write_job(catalogue_path, tmp_path / "dataset", tmp_path / "study.yaml")
    hold = ("outputs.m1", "sums.None", "linear:m0+m1", "ties(density=0.2):m0+m1", "ties(density=0.2):m1+m2")
    driver = Driver(nodes, tmp_path / "ran", "dataset", job, hold=hold)
    nodes.lose(driver.held("outputs.m1"))
    nodes.take_back(driver.held("sums.None"))
    driver.held("linear:m0+m1")
    assert num_again(tmp_path / "ran") <= 2  # one unit for each node
    probes, tasks = (catalogue_path.parent / name for name in ("probes", "tasks"))
    assert read_signal_table(tmp_path / "dataset" / "signals" / "pairs.parquet") == local_table(catalogue, probes)

    driver.process.kill()
    driver.process.wait()
    before = num_again(tmp_path / "ran")
    driver = Driver(nodes, tmp_path / "ran", "dataset", job, hold=hold)
    nodes.lose(driver.held("ties(density=0.2):m0+m1"))
    nodes.take_back(driver.held("ties(density=0.2):m1+m2"))
    assert driver.end()["status"] == "done"
    # One trial for each node, and for the driver those of both of its engines.
    assert num_again(tmp_path / "ran") - before <= 2 + SEARCH["concurrency"]
    store = LabelStore(tmp_path / "dataset" / "labels")
    expected = local_labels(catalogue, tasks, tmp_path / "local")
    assert [(one.key, one.outcome.items.tolist()) for one in store.read()] == [
        (one.key, one.outcome.items.tolist()) for one in expected
    ]
    assert store.check().problems == ()


def test_a_merge_has_the_bytes_of_a_local_one_though_a_node_is_lost_and_one_is_taken_back(nodes, catalogue, tmp_path):
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm("ties")), catalogue)
    write_plan(tmp_path / "plan.json", resolved)
    local = write_merge(resolved, tmp_path / "local").path
    arguments = (tmp_path / "plan.json", tmp_path / "merged", "--workers", 2)
    driver = Driver(nodes, tmp_path / "ran", "merge", *arguments, hold=("merge.journal.0", "merge.journal.4"))
    nodes.lose(driver.held("merge.journal.0"))
    nodes.take_back(driver.held("merge.journal.4"))
    assert driver.end()["num_tensors"] > 8
    assert num_again(tmp_path / "ran") == 2  # of eight shares
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
