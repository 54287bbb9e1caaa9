"""Driver and workers on two "machines": network and mount namespaces of their own, no disk in common, an S3 store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from simmerge_ray.base.storage import write_atomically
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.service.http.listening import free_port
from simmerge_ray.signals.table import read_signal_table
from tests.job_lines import read_last_line
from tests.leftovers import kill_marked
from tests.object_store import endpoint, make_bucket, s3_server
from tests.on_ray.test_nodes import SEARCH, SIGNALS, local_labels, local_table

ROOT = Path(__file__).parents[2]
MARK = "TEST_NAMESPACES_MARK"
NAMES = ("head", "worker")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def why_not() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if sys.platform != "linux" or any(shutil.which(name) is None for name in ("ip", "unshare", "mount")):
        return "needs Linux with ip, unshare and mount"
    name = f"sm{uuid.uuid4().hex[:6]}"
    try:
        run("ip", "netns", "add", name)
        try:
            run("ip", "link", "add", f"{name}b", "type", "bridge")
            run("ip", "link", "del", f"{name}b")
            run("ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt")
        finally:
            run("ip", "netns", "del", name)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"namespaces cannot be made: {getattr(error, 'stderr', '') or error}".strip()
    return None


class Network:
    """A bridge, and two namespaces on it."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        number = int(tag[1:], 16) % 200 + 20
        self.address = {name: f"10.213.{number}.{place}" for place, name in enumerate(("bridge", *NAMES), 1)}

    def begin(self) -> None:
        tag = self._tag
        run("ip", "link", "add", f"{tag}b", "type", "bridge")
        run("ip", "addr", "add", f"{self.address['bridge']}/24", "dev", f"{tag}b")
        run("ip", "link", "set", f"{tag}b", "up")
        for name in NAMES:
            inside = self.name(name)
            run("ip", "netns", "add", inside)
            run("ip", "link", "add", f"{tag}{name[0]}0", "type", "veth", "peer", "name", f"{tag}{name[0]}1")
            run("ip", "link", "set", f"{tag}{name[0]}0", "master", f"{tag}b", "up")
            run("ip", "link", "set", f"{tag}{name[0]}1", "netns", inside)
            run("ip", "-n", inside, "addr", "add", f"{self.address[name]}/24", "dev", f"{tag}{name[0]}1")
            run("ip", "-n", inside, "link", "set", f"{tag}{name[0]}1", "up")
            run("ip", "-n", inside, "link", "set", "lo", "up")

    def name(self, which: str) -> str:
        return f"{self._tag}{which}"

    def end(self) -> None:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", self.name(name)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self._tag}b"], capture_output=True, check=False)


@contextmanager
def machines() -> Iterator[tuple[Network, Path, dict[str, str]]]:
    """The network, a directory that is another disk on each machine, and the environment of their processes."""
    mark, disk = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="sm-ns-"))
    network = Network(f"s{mark[:5]}")
    try:
        network.begin()
        yield network, disk, {MARK: mark, "HOME": str(disk), "TMPDIR": str(disk), "PYTHONPATH": str(ROOT)}
    finally:
        kill_marked(mark, MARK)
        network.end()
        shutil.rmtree(disk, ignore_errors=True)


def on(network: Network, name: str, disk: Path, hidden: Path, environment: dict[str, str], script: str, out: Path):
    """A shell on a machine: its own network, disk, shared memory, and nothing of the files that the test has made."""
    private = f"mount --make-rprivate /; for d in {disk} {hidden} /dev/shm; do mount -t tmpfs tmpfs $d; done; cd {ROOT}"
    command = ["ip", "netns", "exec", network.name(name), "unshare", "-m", "bash", "-ec", f"{private}\n{script}"]
    with out.open("w") as stream:
        return subprocess.Popen(command, env={**os.environ, **environment}, stdout=stream, stderr=stream)


def test_a_dataset_is_made_by_a_driver_and_a_worker_that_share_an_object_store_only(
    catalogue, catalogue_path, tmp_path
):
    if reason := why_not():
        pytest.skip(reason)
    root, port, ports = catalogue_path.parent, free_port(), [free_port() for _ in range(4)]
    with machines() as (network, disk, environment):
        bridge, head, worker = (network.address[name] for name in ("bridge", *NAMES))
        s3_port = free_port()
        with s3_server(s3_port, tmp_path / "s3.log", bridge) as url, endpoint(url):
            make_bucket(url, "study")
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    write_atomically(f"s3://study/zoo/{path.relative_to(root)}", path.read_bytes())
            places = {name: f"s3://study/zoo/{name}" for name in ("probes", "tasks")}
            job = {"catalogue": "s3://study/zoo/catalogue.yaml", **places, "out": "s3://study/dataset"}
            text = yaml.safe_dump(
                job | {"signals": SIGNALS | {"num_workers": 1}, "search": SEARCH | {"concurrency": 1}}
            )
            environment |= {"AWS_ENDPOINT_URL": url, "SIMMERGE_CACHE_DIR": f"{disk}/cache"}
            start = f"ray start --temp-dir={disk}/r --object-store-memory=100000000 --disable-usage-stats"
            starting = f"{start} --address={head}:{port} --node-ip-address={worker} --num-cpus=1 --block"
            second = f"until (exec 3<>/dev/tcp/{head}/{port}) 2>/dev/null; do sleep 0.3; done; {starting}"
            first = (
                f"{start} --head --port={port} --node-ip-address={head} --num-cpus=0 --include-dashboard=false "
                f"--ray-client-server-port={ports[0]} --dashboard-agent-listen-port={ports[1]} "
                f"--metrics-export-port={ports[2]}\n"
                f"cat > {disk}/study.yaml <<'END'\n{text}END\n"
                f"RAY_ADDRESS={head}:{port} python jobs/build_dataset.py {disk}/study.yaml"
            )
            hidden = root.resolve()
            others = on(network, "worker", disk, hidden, environment, second, tmp_path / "worker.log")
            driver = on(network, "head", disk, hidden, environment, first, tmp_path / "head.log")
            code = driver.wait(400)
            told = (tmp_path / "head.log").read_text()
            assert code == 0, told + (tmp_path / "worker.log").read_text()
            assert others.poll() is None  # the worker is still there
            assert read_last_line(told)["out"] == "s3://study/dataset"
            store = LabelStore("s3://study/dataset/labels")
            expected = local_labels(catalogue, root / "tasks", tmp_path / "local")
            assert [(one.key, one.outcome.items.tolist()) for one in store.read()] == [
                (one.key, one.outcome.items.tolist()) for one in expected
            ]
            table = read_signal_table("s3://study/dataset/signals/pairs.parquet")
            assert table == local_table(catalogue, root / "probes")
            assert list(disk.iterdir()) == []  # this machine's disk is none of theirs
