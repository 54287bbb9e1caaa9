"""The check that ends every test session: it names what was started and runs on, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

from tests.leftovers import MARK, leftovers, marked_processes

ROOT = Path(__file__).parents[2]


def sleeping(mark: str) -> subprocess.Popen[bytes]:
    """A process with a mark, whose parent has ended: as HAProxy does it when its Ray was killed."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, MARK: mark})


def test_marked_processes_are_named_until_they_end():
    mark = uuid.uuid4().hex
    assert leftovers(mark, 0) == []
    process = sleeping(mark)
    try:
        (line,) = leftovers(mark, 0)
        assert line.startswith(f"{process.pid} ") and "sleep(600)" in line
    finally:
        process.kill()
        process.wait()
    assert leftovers(mark) == []


def test_the_session_itself_and_what_it_descends_from_are_no_leftovers():
    mine = {one.pid for one in marked_processes(os.environ[MARK])}
    assert os.getpid() not in mine and os.getppid() not in mine


def test_a_session_that_leaves_a_process_fails_and_names_it(tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_sessionfinish\n")
    (tmp_path / "test_leaving.py").write_text(
        textwrap.dedent("""
            import subprocess, sys
            import tests.leftovers
            tests.leftovers.PATIENCE_S = 0.0

            def test_passes():
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(599)"], start_new_session=True)
        """)
    )
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    try:
        assert result.returncode == 1 and "1 passed" in result.stdout, result.stdout + result.stderr
        assert "left behind by the tests" in result.stdout and "sleep(599)" in result.stdout
    finally:
        for process in marked_processes(mark):
            process.kill()
