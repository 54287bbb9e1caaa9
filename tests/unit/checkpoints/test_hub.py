"""Checkpoints of the hub that cannot be had, from a small server with the hub's answers: one line each, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.hub_server import SilentHandler, serving

# The hub's client reads its variables when it is imported, so it runs in a process of its own: one for all cases.
PROGRAM = """
import sys
from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.references import locate_checkpoint
for name, revision in (line.split("@") for line in sys.argv[1:]):
    try:
        print("found", locate_checkpoint(name, revision or None).path)
    except CheckpointError as error:
        print(error)
"""
MODEL = '{"id": "%s", "sha": "%s", "siblings": [{"rfilename": "config.json"}]}'
FILES = b'[{"type": "file", "path": "config.json", "size": 2, "oid": "0123456789abcdef0123456789abcdef01234567"}]'
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(SilentHandler):
    """The hub's ways of saying no, as its client knows them."""

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self.answer(403, b"", **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."})
        elif "/gone/" in self.path:
            self.answer(404, b"{}", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif "/revision/nothing" in self.path:
            self.answer(404, b"{}", **{"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif "/tree/" in self.path:
            self.answer(200, FILES)
        else:
            self.answer(200, (MODEL % ("own/model", COMMIT)).encode())

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Type": "application/json", "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with serving(Hub) as address:
        yield address


def said(tmp_path, *names: str, **environment: str) -> list[str]:
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", PROGRAM, *names]
    result = subprocess.run(command, env=variables | environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_what_the_hub_does_not_give_is_one_line_each_with_the_remedy(endpoint, tmp_path):
    gated, gone, revision = said(tmp_path, "own/gated@", "gone/model@", "own/model@nothing", HF_ENDPOINT=endpoint)
    assert gated == (
        "'own/gated' is no directory here, and on the hub it is gated: ask for access at "
        f"{endpoint}/own/gated, then `hf auth login` or set HF_TOKEN"
    )
    assert "'gone/model' is no directory here, and the hub has no such repository (or it is private:" in gone
    assert revision.endswith("the repository on the hub has no revision 'nothing'")


def test_a_hub_that_cannot_be_reached_and_one_that_must_not_be_are_told_apart(tmp_path):
    (away,) = said(tmp_path, "own/model@", HF_ENDPOINT="http://127.0.0.1:9")
    assert away.endswith("cache does not hold it: http://127.0.0.1:9 cannot be reached; name a directory, or try again")
    (offline,) = said(tmp_path, "own/model@", HF_HUB_OFFLINE="1")
    assert offline.endswith("does not hold it: HF_HUB_OFFLINE is set; unset it, or name a directory")
