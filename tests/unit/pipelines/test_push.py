"""`simmerge push` against a small server that answers as the hub does."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simmerge_ray.base.errors import InputError
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.pipelines.push import check_push
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import pair_plan, resolve_plan
from tests.hub_server import SilentHandler, serving

TOKEN = "hf_of_the_tests"


class Hub(SilentHandler):
    """Makes repositories, and takes files in commits; for other tokens it is 401, for `others/` 403."""

    repositories: dict[str, dict[str, bytes]] = {}

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/merged", "sha": "0" * 40, "siblings": [], "private": False, "tags": []})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif "/others/" in self.path:
            self._answer(403, {"error": "You don't have the rights"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self._answer(200, {"url": f"http://{self.headers['host']}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.repositories[name][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            url = f"http://{self.headers['host']}/{name}/commit/{'1' * 40}"
            self._answer(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:
            self._answer(200, {})


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serving(Hub) as address:
        yield address


@pytest.fixture(scope="module")
def merged(catalogue_path, tmp_path_factory) -> Path:
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm("linear")), load_catalogue(catalogue_path))
    out = tmp_path_factory.mktemp("push") / "merged"
    write_merge(resolved, out, {"m0 on add": {"retention": 0.75}})
    (out / ".hidden").write_text("not for others")
    return out


def push(merged: Path, name: str, endpoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a new process: the client of the hub reads the environment when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    given = ["push", str(merged), name]
    call = f"from simmerge_ray.cli.app import app, run_command; run_command(lambda: app({given}))"
    command = [sys.executable, "-c", call]
    return subprocess.run(command, env=os.environ | settings | environment, capture_output=True, text=True, check=False)


def test_a_merge_is_pushed_with_its_card_and_recipe(merged, hub):
    result = push(merged, "me/merged", hub)
    assert result.returncode == 0, result.stderr
    assert f"pushed: {hub}/me/merged" in result.stdout
    files = Hub.repositories["me/merged"]
    assert {"README.md", "config.json", "model.safetensors", "simmerge_plan.json", "tokenizer.json"} <= set(files)
    assert ".hidden" not in files
    assert files["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert "- merge" in files["README.md"].decode() and "| m0 on add | 0.750 |" in files["README.md"].decode()


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("me/merged", {"HF_TOKEN": "hf_wrong"}, "does not know who you are: `hf auth login`, or set HF_TOKEN"),
        ("others/merged", {}, "your token may not write there"),
        ("me/merged", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it to push"),
        ("me/merged", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_the_hub_does_not_take_is_one_line(merged, hub, name, environment, message):
    result = push(merged, name, hub, **environment)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_what_is_no_merge_is_refused_before_anything_is_sent(merged, catalogue_path, tmp_path):
    for place, name, message in (
        (merged, "merged", "is no repository of the hub; its name is OWNER/NAME"),
        (tmp_path / "absent", "me/merged", "is not a directory"),
        (catalogue_path.parent / "m0", "me/merged", "is not a merge made by simmerge"),
    ):
        with pytest.raises(InputError, match=message):
            check_push(place, name)
