"""`simmerge serve` as a user starts it and `serve deploy` as an operator does, asked over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from benchmarks.service.running import TOKEN, RayService, kill_9, wait_until, write_tokens
from simmerge_ray.base.config import ServeConfig, ServiceConfig
from simmerge_ray.base.errors import ConfigError, SelectorError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.service.http.listening import free_port
from simmerge_ray.service.learner import Learner
from tests.on_ray.served import write_run
from tests.unit.service.published import write_published

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # a start takes as long as replicas need to import torch on a busy machine
PAIR = {"left": "s1-c00", "right": "s1-c01"}


@dataclass
class Running:
    """A service that answers. token: the one that it made."""

    service: RayService
    run: Path
    port: int

    @property
    def url(self) -> str:
        return self.service.url

    @property
    def token(self) -> str:
        return str(yaml.safe_load((self.run / "service" / "tokens.yaml").read_text())[0]["token"])

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.token}"}, timeout=60)


def start(run: Path, output: Path, *options: str) -> Running:
    port = free_port()
    service = RayService(run, output, port, *options)
    try:
        service.start()
        service.wait()
    except BaseException:
        service.kill()
        raise
    return Running(service, run, port)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What `simmerge serve` needs of a run."""
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def running(run, tmp_path_factory) -> Iterator[Running]:
    """Two replicas on one SQLite file."""
    one = start(run, tmp_path_factory.mktemp("printed") / "printed.txt", "--replicas=2")
    yield one
    one.service.kill()  # where the last test did not end it


@pytest.mark.ray
class TestServe:
    """One `simmerge serve`; the last test ends it."""

    def test_the_printed_curl_line_works_as_it_is(self, running):
        lines = running.service.printed().splitlines()
        (line,) = (line for line in lines if line.strip().startswith("curl"))
        result = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
        assert json.loads(result.stdout)["arm"] in ("linear", "ties")

    def test_the_printed_link_shows_the_dashboard_and_only_this_user_can_read_the_token(self, running):
        words = running.service.printed().split()
        link = next(word for word in words if word.startswith(f"{running.url}/?token="))
        with httpx.Client(follow_redirects=True, timeout=60) as browser:
            page = browser.get(link)
        assert page.status_code == 200 and "text/html" in page.headers["content-type"]
        assert (running.run / "service" / "tokens.yaml").stat().st_mode & 0o077 == 0

    def test_haproxy_is_what_listens(self, running):
        pids = running.service.pids("haproxy")
        ports = {one.laddr.port for pid in pids for one in psutil.Process(pid).net_connections() if not one.raddr}
        assert running.port in ports

    def test_without_a_token_or_with_a_wrong_one_only_the_probes_answer(self, running):
        with httpx.Client(base_url=running.url, timeout=60) as nobody:
            assert nobody.get("/healthz").status_code == 200
            assert nobody.get("/readyz").json()["status"] == "ready"
            for path in ("/v1/policy", "/v1/decisions", "/metrics", "/openapi.json"):
                for headers in ({}, {"authorization": "Bearer of-somebody-else"}):
                    answer = nobody.get(path, headers=headers)
                    assert answer.status_code in (401, 429) and "detail" in answer.json()
                    assert answer.status_code == 429 or answer.headers["www-authenticate"] == "Bearer"
            assert nobody.post("/v1/decisions", json=PAIR).status_code == 401

    def test_a_decision_and_its_reward_are_seen_by_both_replicas(self, running):
        assert len(running.service.pids("ray::ServeReplica")) == 2
        with running.client() as client:
            before = client.get("/v1/policy").json()
            decision = client.post("/v1/decisions", json=PAIR).json()
            given = client.post(f"/v1/decisions/{decision['decision_id']}/reward", json={"utility": 0.5})
            assert given.status_code == 201
        replicas = set()
        for _ in range(40):  # a connection each, so that both are asked
            with running.client() as client:
                answer = client.get("/v1/policy").json()
                assert answer["num_rewards"] == before["num_rewards"] + 1
                replicas.add(json.dumps(answer["arms"]))
        assert len(replicas) == 1  # the same to the last bit

    def test_requests_of_one_key_at_the_same_time_are_one_decision(self, running):
        with running.client() as client, ThreadPoolExecutor(8) as threads:
            headers = {"idempotency-key": "the-same"}
            asked = [threads.submit(client.post, "/v1/decisions", json=PAIR, headers=headers) for _ in range(16)]
            answers = [one.result() for one in asked]
        assert sorted(one.status_code for one in answers) == [200] * 15 + [201]
        assert len({one.text for one in answers}) == 1

    @pytest.mark.parametrize(
        ("body", "status"),
        [({"left": "s1-c00", "right": "nobody"}, 404), ({"left": "s1-c00"}, 422), ({**PAIR, "path": "/etc"}, 422)],
    )
    def test_bad_requests_are_answered_with_what_is_wrong(self, running, body, status):
        with running.client() as client:
            answer = client.post("/v1/decisions", json=body)
        assert answer.status_code == status and isinstance(answer.json()["detail"], str)

    def test_the_log_of_a_replica_names_the_decision(self, running):
        with running.client() as client:
            decision = client.post("/v1/decisions", json=PAIR).json()
        session = next(
            word.partition("=")[2]
            for command in running.service.processes().values()
            for word in command.split()
            if word.startswith("--session-dir=")
        )
        logs = Path(session) / "logs" / "serve"

        def lines() -> list[str]:
            return [line for path in logs.glob("replica_*") for line in path.read_text().splitlines()]

        wait_until(lambda: any(decision["decision_id"] in line for line in lines()), "the decision is in a log")
        assert not any(running.token in line for line in lines())

    def test_a_second_service_of_the_run_is_refused_and_the_first_one_answers_on(self, running):
        from simmerge_ray.on_ray.serve_app import run_service

        service = running.run / "service"
        files = {"signals": RunLayout(running.run).signals, "tokens": service / "tokens.yaml"}
        own = ServeConfig(**files, database=f"sqlite:///{service}/service.db", registry=service / "selectors")
        with pytest.raises(
            ConfigError, match=rf"selectors is served already, by process {running.service.process.pid};"
        ):
            run_service(own, "127.0.0.1", free_port(), Narrator.silent())
        with running.client() as client:
            assert client.get("/v1/policy").status_code == 200

    def test_a_start_after_a_crash_of_ray_goes_on_and_ctrl_c_leaves_nothing_running(self, running, tmp_path):
        with running.client() as client:
            before, token = client.get("/v1/policy").json(), running.token
        haproxies = set(running.service.pids("haproxy"))
        while others := set(running.service.processes()) - haproxies:  # HAProxy outlives them, and keeps its port
            for pid in others:
                kill_9(pid)
        again = start(running.run, tmp_path / "again.txt", "--replicas=1")
        try:
            assert not haproxies & set(running.service.processes())
            with again.client() as client:
                after = client.get("/v1/policy").json()
            assert after["arms"] == before["arms"] and after["seq"] == before["seq"]
            assert again.token == token  # links and scripts still work
            assert again.service.stop() == 0  # it raises where a process is left
        finally:
            again.service.kill()


@pytest.mark.ray
def test_the_deployed_file_serves_takes_another_selector_and_takes_nothing_back(ray_cluster, tmp_path):
    """`cluster/serve.yaml` with other paths, behind Serve's own proxy: this cluster was not started for HAProxy."""
    first, second, third = (write_published(tmp_path / f"selector{seed}", seed=seed) for seed in range(3))
    config = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    (application,) = config["applications"]
    settings = first.settings(tmp_path).model_copy(update={"selector": None})
    application["args"] |= {"selector": str(first.selector), "signals": str(first.signals)}
    application["args"] |= {"database": settings.database, "registry": str(settings.registry)}
    application["args"]["tokens"] = str(write_tokens(tmp_path / "tokens"))
    user_config = application["deployments"][0]["user_config"]

    def deploy(selector: Path) -> None:
        user_config["selector"] = str(selector)
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
        _serve_command("deploy", str(tmp_path / "serve.yaml"), "--address", ray_cluster)

    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:

        def ready() -> bool:
            try:
                return client.get("/readyz").status_code == 200 and len(_replicas()) == 2
            except httpx.TransportError:
                return False

        def version() -> str:
            return str(client.get("/v1/policy").raise_for_status().json()["model_version"])

        try:
            deploy(first.selector)
            wait_until(ready, "the deployed application is ready")
            began, replicas = version(), _replicas()
            assert client.post("/v1/decisions", json=PAIR).status_code == 201

            deploy(second.selector)
            wait_until(lambda: version() != began, "the other selector is in force")
            assert _replicas() == replicas  # without a restart

            asyncio.run(_published(settings, third.selector))
            retrained = version()
            assert retrained != began
            for pid in replicas:
                kill_9(pid)
            wait_until(lambda: not replicas & _replicas() and ready(), "two replicas are there again")
            assert version() == retrained

            deploy(first.selector)
            wait_until(lambda: version() == began, "a change while replicas run brings a former selector back")
        finally:
            _serve_command("shutdown", "-y", "--address", ray_cluster)
    wait_until(lambda: not _replicas(), "Serve has ended")


def _serve_command(*arguments: str) -> None:
    program = Path(sys.executable).with_name("serve")
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def _replicas() -> set[int]:
    """Processes of replicas in the cluster of the tests' own session."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            title = " ".join(process.cmdline())
            if title.startswith("ray::ServeReplica:simmerge") and os.getsid(process.pid) == os.getsid(0):
                found.add(process.pid)
    return found


async def _published(settings: ServiceConfig, selector: Path) -> None:
    """What `jobs/retrain.py` does at its end: another process puts a selector into force."""
    learner = Learner(settings)
    await learner.start()
    try:
        await learner.publish(selector)
    finally:
        await learner.stop()


def test_artifacts_that_cannot_be_served_are_refused_before_ray(run, tmp_path):
    from simmerge_ray.on_ray.serve_app import run_service

    database = f"sqlite:///{tmp_path}/service.db"
    config = ServeConfig(
        selector=tmp_path, signals=RunLayout(run).signals, registry=tmp_path / "selectors", database=database
    )
    with pytest.raises(SelectorError, match="simmerge train"):
        run_service(config, "127.0.0.1", 8000, Narrator.silent())


def test_arguments_of_the_app_that_are_misspelt_are_refused():
    given = {"selector": "/s", "signals": "/p", "database": "sqlite:////d", "registry": "/r"}
    assert ServiceConfig.model_validate(given).num_replicas == 1
    with pytest.raises(ValueError, match="num_replica"):
        ServiceConfig.model_validate({**given, "num_replica": 2})
