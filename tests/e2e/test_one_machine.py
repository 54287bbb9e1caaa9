"""`cluster/README.md`, "On one machine first", as it is written; the job submitted twice at once; the head's end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from simmerge_ray.search.labels import LabelStore
from simmerge_ray.service.http.listening import free_port
from tests import tiny
from tests.job_lines import read_last_line
from tests.leftovers import kill_marked

ROOT = Path(__file__).parents[2]
MARK = "TEST_HEAD_MARK"
PORTS = (
    "RAY_PORT", "DASHBOARD_PORT", "SERVE_PORT", "CLIENT_PORT", "AGENT_PORT", "METRICS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT",
)  # fmt: skip
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


def blocks() -> dict[str, str]:
    """The bash blocks of the section, by a word that only one of them has."""
    text = (ROOT / "cluster" / "README.md").read_text()
    section = text.split("## On one machine first\n")[1].split("\n## ")[0]
    found = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    words = ("export ZOO=", "ray start --head", "build_dataset.py", "train_selector.py", "serve deploy", "/reward")
    chosen = [[block for block in found if word in block] for word in words]
    assert [len(one) for one in chosen] == [1] * len(words) and len(found) == len(words)
    return {word: one[0] for word, one in zip(words, chosen, strict=True)}


class Machine:
    """A shell in which only the variables of the first block were set before, and what was started from it."""

    def __init__(self, root: Path) -> None:
        self.run, self._mark = root / "run", uuid.uuid4().hex
        tiny.make_catalogue(root / "zoo", num_checkpoints=8)
        self._home = Path(tempfile.mkdtemp(prefix="sm-home-"))
        given = {name: os.environ[name] for name in ("PATH", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TEST_SESSION_MARK")}
        self._environment = {
            **given,
            **{name: str(free_port()) for name in PORTS},
            "HOME": str(self._home),
            "RAY_TMPDIR": str(self._home),  # its path must be short
            "RAY_worker_niceness": "0",
            "PYTHONPATH": str(ROOT),
            "ZOO": str(root / "zoo"),
            "RUN": str(self.run),
            "EVALUATOR": "transformers",
            "ARMS": "[linear, nuslerp]",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
            "TOKEN": uuid.uuid4().hex,
            MARK: self._mark,
        }
        self._blocks = blocks()

    def start(self, word: str) -> subprocess.Popen[str]:
        script = self._blocks["export ZOO="] + (self._blocks[word] if word != "export ZOO=" else "")
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, env=self._environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def shell(self, word: str) -> str:
        return self.finish(self.start(word))

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> str:
        output = process.communicate(timeout=400)[0]
        assert process.returncode == 0, output
        return output

    def client(self) -> httpx.Client:
        url, token = f"http://127.0.0.1:{self._environment['SERVE_PORT']}", self._environment["TOKEN"]
        return httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=60)

    def dashboard(self, path: str, **headers: str) -> int:
        """Status of an answer of Ray's dashboard without the token."""
        url = f"http://127.0.0.1:{self._environment['DASHBOARD_PORT']}{path}"
        return httpx.get(url, headers=headers, timeout=60).status_code

    def kill(self) -> None:
        """The end of the head, with all that runs on it."""
        kill_marked(self._mark, MARK)

    def end(self) -> None:
        self.kill()
        shutil.rmtree(self._home, ignore_errors=True)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Iterator[Machine]:
    one = Machine(tmp_path_factory.mktemp("machine"))
    yield one
    one.end()


class TestOneMachine:
    """In order: each test goes on where the last one ended."""

    def test_the_head_starts_and_asks_for_the_token(self, machine):
        machine.shell("ray start --head")
        assert machine.dashboard("/api/jobs/") == 401
        assert machine.dashboard("/api/jobs/", authorization="Bearer of-somebody-else") in (401, 403)

    def test_a_job_that_is_submitted_twice_at_once_makes_one_dataset_and_no_label_twice(self, machine):
        both = [machine.start("build_dataset.py") for _ in range(2)]
        outputs = [machine.finish(one) for one in both]
        said = [read_last_line(output) for output in outputs]
        assert [one["status"] for one in said] == ["done"] * 2 and said[0] == said[1]
        assert said[0]["out"] == str(machine.run / "dataset")
        (waited,) = (output for output in outputs if "another job is at work on" in output)
        assert waited.count("unchanged since the last run") == 2
        report = LabelStore(machine.run / "dataset" / "labels").check()
        assert report.num_labels > 0 and report.num_duplicates == 0 and report.problems == ()

    def test_the_selector_is_trained_and_its_endpoint_decides_and_takes_a_reward(self, machine):
        assert read_last_line(machine.shell("train_selector.py"))["out"] == str(machine.run / "selector")
        machine.shell("serve deploy")
        output = machine.shell("/reward")
        decision = json.loads((machine.run / "decision.json").read_text())
        assert decision["left"] == "m0"
        kept = {f"keep({decision[side]})" for side in ("left", "right")}
        assert decision["arm"] in {"linear", "nuslerp", *kept} and kept <= set(decision["propensities"])
        assert decision["decision_id"] in output and '"utility":0.5' in output.replace(" ", "")

    def test_nothing_acknowledged_is_lost_with_the_head(self, machine):
        decision = json.loads((machine.run / "decision.json").read_text())
        with machine.client() as client:
            open_one = client.post("/v1/decisions", json={"left": "m0", "right": "m3"}).json()
            before = client.get("/v1/policy").json()
        machine.kill()
        machine.shell("ray start --head")
        machine.shell("serve deploy")
        with machine.client() as client:
            after = client.get("/v1/policy").json()
            assert (after["num_rewards"], after["arms"]) == (before["num_rewards"], before["arms"])
            again = client.get(f"/v1/decisions/{decision['decision_id']}").json()
            assert again["decision"]["arm"] == decision["arm"] and again["utility"] == 0.5
            path = f"/v1/decisions/{open_one['decision_id']}/reward"
            assert client.post(path, json={"utility": 0.25}).status_code == 201
            assert client.get("/v1/policy").json()["num_rewards"] == before["num_rewards"] + 1
