"""`simmerge serve` as a user starts it: a process of its own with its own Ray, asked over HTTP, killed in parts."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from simmerge_ray.config import ServeConfig
from simmerge_ray.errors import ConfigError, SelectorError
from simmerge_ray.progress import Narrator
from simmerge_ray.service.database import open_database
from simmerge_ray.service.event_log import EventLog
from tests.conftest import free_port
from tests.unit.service.published import write_published

pytestmark = pytest.mark.ray
_STARTS_S = 240  # two replicas import torch, on two cores that others use as well


@dataclass
class Service:
    """A running `simmerge serve`. token: the one that it made."""

    process: subprocess.Popen[bytes]
    run: Path
    url: str
    printed: Path

    @property
    def token(self) -> str:
        return str(yaml.safe_load((self.run / "service" / "tokens.yaml").read_text())[0]["token"])

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.token}"}, timeout=30)

    def children(self) -> dict[int, str]:
        """Command lines of all processes that it, its Ray and their children started."""
        parents, commands = {}, {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(place.name)] = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
                commands[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except (OSError, IndexError):
                continue
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return {pid: commands[pid] for pid in found if commands.get(pid)}

    def pids(self, what: str) -> list[int]:
        """Of the processes whose command line begins with, or is a program of, this name."""
        return [pid for pid, command in self.children().items() if what in command.split(" -", 1)[0]]


def start(run: Path, root: Path, *options: str) -> Service:
    port = free_port()
    printed = root / "printed.txt"
    command = [str(Path(sys.executable).with_name("simmerge")), "serve", str(run), "--port", str(port), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIMMERGE_")}
    with printed.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**environment, "COLUMNS": "1000"}, cwd=root)
    service = Service(process, run, f"http://127.0.0.1:{port}", printed)
    deadline = time.monotonic() + _STARTS_S
    while "curl" not in printed.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            stop(service)
            raise AssertionError(f"it did not start: {printed.read_text()[-3000:]}")
        time.sleep(0.2)
    return service


def stop(service: Service) -> None:
    """As Ctrl-C does."""
    service.process.send_signal(signal.SIGINT)
    try:
        service.process.wait(90)
    except subprocess.TimeoutExpired:
        service.process.kill()
        raise


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What `simmerge serve` needs of a run."""
    root = tmp_path_factory.mktemp("run")
    files = write_published(root)
    (root / "signals").mkdir()
    files.signals.rename(root / "signals" / "pairs.parquet")
    return root


@pytest.fixture(scope="module")
def service(run, tmp_path_factory) -> Iterator[Service]:
    """Two replicas on one SQLite file."""
    running = start(run, tmp_path_factory.mktemp("printed"), "--replicas", "2")
    yield running
    if running.process.poll() is None:
        stop(running)


PAIR = {"left": "s1-c00", "right": "s1-c01"}


def test_the_printed_curl_line_works_as_it_is(service):
    line = next(line for line in service.printed.read_text().splitlines() if line.strip().startswith("curl"))
    result = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["arm"] in ("linear", "ties")


def test_the_printed_link_shows_the_dashboard_and_only_this_user_can_read_the_token(service):
    text = service.printed.read_text()
    link = next(word for word in text.split() if word.startswith(f"{service.url}/?token="))
    with httpx.Client(follow_redirects=True) as browser:
        page = browser.get(link)
    assert page.status_code == 200 and "text/html" in page.headers["content-type"]
    assert (service.run / "service" / "tokens.yaml").stat().st_mode & 0o077 == 0


def test_without_a_token_only_the_probes_answer(service):
    assert httpx.get(f"{service.url}/healthz").status_code == 200
    assert httpx.get(f"{service.url}/readyz").json()["status"] == "ready"
    for path in ("/v1/policy", "/v1/decisions", "/metrics", "/openapi.json"):
        answer = httpx.get(f"{service.url}{path}")
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"


def test_a_decision_and_its_reward_are_seen_by_both_replicas(service):
    with service.client() as client:
        before = client.get("/v1/policy").json()
        decision = client.post("/v1/decisions", json=PAIR).json()
        given = client.post(f"/v1/decisions/{decision['decision_id']}/reward", json={"utility": 0.5})
        assert given.status_code == 201
        answers = [client.get("/v1/policy").json() for _ in range(20)]  # whichever replica answers
        assert {one["num_rewards"] for one in answers} == {before["num_rewards"] + 1}
        assert len({json.dumps(one["arms"]) for one in answers}) == 1
    assert len(service.pids("ray::ServeReplica")) == 2


def test_requests_of_one_key_at_the_same_time_are_one_decision(service):
    with service.client() as client, ThreadPoolExecutor(8) as threads:
        headers = {"idempotency-key": "the-same"}
        asked = [threads.submit(client.post, "/v1/decisions", json=PAIR, headers=headers) for _ in range(16)]
        answers = [one.result() for one in asked]
    assert sorted(one.status_code for one in answers) == [200] * 15 + [201]
    assert len({one.text for one in answers}) == 1


@pytest.mark.parametrize("body", [{"left": "s1-c00", "right": "nobody"}, {"left": "s1-c00"}, {**PAIR, "path": "/etc"}])
def test_bad_requests_are_answered_with_what_is_wrong(service, body):
    with service.client() as client:
        answer = client.post("/v1/decisions", json=body)
    assert answer.status_code == (404 if body.get("right") == "nobody" else 422)
    assert isinstance(answer.json()["detail"], str)


class Asking:
    """Decides and rewards without a pause, every request with a key and tried until it is answered."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stopped = threading.Event()
        self.rewarded: dict[str, float] = {}
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(120)
        assert not self._thread.is_alive()

    def _ask(self) -> None:
        number = 0
        while not self._stopped.is_set():
            number += 1
            decision = self._answered("/v1/decisions", PAIR, f"decide-{id(self)}-{number}")
            utility = (number % 100) / 100
            if decision is not None:
                path = f"/v1/decisions/{decision['decision_id']}/reward"
                if self._answered(path, {"utility": utility}, f"reward-{id(self)}-{number}") is not None:
                    self.rewarded[decision["decision_id"]] = utility

    def _answered(self, path: str, body: object, key: str) -> dict | None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with self._service.client() as client:
                    answer = client.post(path, json=body, headers={"idempotency-key": key})
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            if answer.status_code in (200, 201):
                return answer.json()
            if answer.status_code < 500:
                self.errors.append(answer.text)
                return None
            time.sleep(0.1)
        self.errors.append(f"no answer to {path}")
        return None


def logged_rewards(run: Path) -> list[tuple[str, float]]:
    """Of the log itself, read by another process than the service."""
    engine = open_database(f"sqlite:///{run}/service/service.db")
    log = EventLog(engine)
    rows = log.tail(0, 10**6)
    log.close()
    engine.dispose()
    return [(row.subject or "", json.loads(row.body)["utility"]) for row in rows if row.kind == "reward"]


@pytest.mark.parametrize(
    "killed", ["ray::ServeReplica", "ray::ServeReplica", "haproxy", "ray::ServeController", "ray::ServeReplica both"]
)
def test_nothing_acknowledged_is_lost_where_a_part_is_killed(service, killed):
    name = killed.split()[0]
    with Asking(service) as asking:
        wait_until(lambda: len(asking.rewarded) >= 3)
        victims = service.pids(name)
        assert victims, service.children()
        for pid in victims if killed.endswith("both") else victims[:1]:
            os.kill(pid, signal.SIGKILL)
        seen = len(asking.rewarded)
        wait_until(lambda: len(asking.rewarded) >= seen + 10)
    assert asking.errors == []
    rewards = logged_rewards(service.run)
    assert len({name for name, _ in rewards}) == len(rewards)  # none counted twice
    logged = dict(rewards)
    assert {name: logged.get(name) for name in asking.rewarded} == asking.rewarded
    wait_until(lambda: len(service.pids("ray::ServeReplica")) == 2)
    with service.client() as client:
        assert client.get("/v1/policy").json()["num_rewards"] == len(rewards)


def test_ctrl_c_leaves_nothing_running_and_the_next_start_goes_on(service, tmp_path):
    with service.client() as client:
        before = client.get("/v1/policy").json()
    family = service.children()
    stop(service)
    assert service.process.returncode == 0
    wait_until(lambda: not [pid for pid in family if _is(pid, family[pid])], 90)
    again = start(service.run, tmp_path)
    try:
        with again.client() as client:
            after = client.get("/v1/policy").json()
        assert after["arms"] == before["arms"] and after["seq"] == before["seq"]
        assert again.token == service.token  # links and scripts still work
        family = again.children()
        os.kill(again.process.pid, signal.SIGKILL)  # without any clean-up: HAProxy may outlive it
        again.process.wait()
    finally:
        if again.process.poll() is None:
            stop(again)
    third = start(service.run, tmp_path)
    try:
        with third.client() as client:
            assert client.get("/v1/policy").json()["arms"] == before["arms"]
    finally:
        stop(third)
    family |= third.children()
    wait_until(lambda: not [pid for pid in family if _is(pid, family[pid])], 90)


def _is(pid: int, command: str) -> bool:
    """Whether a process is still the one that it was."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip() == command
    except OSError:
        return False


def test_artifacts_that_cannot_be_served_are_refused_before_ray(tmp_path):
    from simmerge_ray.distributed.serve_app import run_service

    with pytest.raises(SelectorError, match="simmerge train"):
        run_service(ServeConfig(selector=tmp_path, signals=tmp_path / "x", out=tmp_path), Narrator.silent())


def test_a_token_file_that_is_damaged_is_said(run, tmp_path):
    from simmerge_ray.distributed.serve_app import app_args

    (tmp_path / "tokens.yaml").write_text("[]")
    config = ServeConfig(selector=run / "selector", signals=run / "signals" / "pairs.parquet", out=tmp_path)
    with pytest.raises(ConfigError, match=r"tokens\.yaml is damaged"):
        app_args(config)


def test_a_replica_that_starts_takes_back_no_newer_selector_and_a_change_is_published(run, tmp_path):
    """What Serve calls with `user_config`, on the class itself."""
    from simmerge_ray.distributed.serve_app import AppArgs, MergeService, build

    files = write_published(tmp_path / "other", seed=1)
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text('[{name: one, role: admin, token: "0123456789abcdef"}]')
    first, second = str(run / "selector"), str(files.selector)
    args = AppArgs(
        selector=first,
        signals=str(files.signals),
        database=f"sqlite:///{tmp_path}/service.db",
        registry=str(tmp_path / "selectors"),
        tokens=str(tokens),
    )
    application = build(args)  # it makes the database, too
    assert application is not None
    plain = MergeService.func_or_class

    async def main() -> None:
        replica = plain(args)
        learner = replica._learner
        await learner.start()

        async def present() -> str:
            return (await learner.policy()).model_version

        began = await present()
        await replica.reconfigure({"selector": second})
        retrained = await present()
        assert retrained != began
        await replica.reconfigure({"selector": first})
        assert await present() == began
        await learner.publish(files.selector)
        await replica.reconfigure({"selector": first})  # said again, not changed
        assert await present() == retrained
        restarted = plain(args)
        await restarted.reconfigure({"selector": first})
        assert await present() == retrained
        await restarted._learner.stop()
        await learner.stop()

    asyncio.run(main())
