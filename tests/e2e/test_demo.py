"""The whole chain in a process of its own: interrupted, killed, finished, and run once more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from simmerge_ray.checkpoints import CheckpointRef, read_headers
from simmerge_ray.demo.recipe import ARMS
from simmerge_ray.labels import LabelStore
from simmerge_ray.runs import RunLayout
from simmerge_ray.storage import read_json

ROOT = Path(__file__).parents[2]


def start(layout: RunLayout) -> subprocess.Popen[str]:
    # A relative path, as users give it: workers of Ray may run in another directory.
    command = [sys.executable, "-m", "tests.e2e.tiny_demo", os.path.relpath(layout.root, ROOT)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def stop_at(
    layout: RunLayout, number: int, condition: Callable[[], bool], what: str
) -> tuple[int, list[psutil.Process]]:
    """Send a signal once the condition holds; returns the exit code and the processes that the run had started."""
    process = start(layout)
    try:
        wait_for(lambda: condition() or process.poll() is not None, what)
        assert process.poll() is None, process.communicate()[0]
        family = psutil.Process(process.pid).children(recursive=True)
        assert family, "Ray's processes were expected"
        os.kill(process.pid, number)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, family


def assert_gone(family: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(family, timeout=seconds)
    assert not alive, f"left behind: {alive}"


@pytest.mark.ray
def test_the_demo_survives_ctrl_c_and_kill_and_the_second_run_computes_nothing(tmp_path):
    layout = RunLayout(tmp_path / "run")
    experts = ("math-few", "code-few", "multilingual-few", "rag-few")

    # Ctrl-C while experts are trained: a clean end, and nothing half-written under a final name.
    code, family = stop_at(
        layout, signal.SIGINT, lambda: any((layout.zoo / e).exists() for e in experts), "a trained expert"
    )
    assert code == 130
    assert_gone(family, 20)
    trained = {e: (layout.zoo / e).stat().st_mtime_ns for e in experts if (layout.zoo / e).exists()}
    for expert in trained:
        read_headers(CheckpointRef(expert, layout.zoo / expert))

    # kill -9 in the middle of the search.
    code, family = stop_at(
        layout, signal.SIGKILL, lambda: len(list(layout.labels.glob("*.parquet"))) >= 3, "three labels"
    )
    assert code == -9
    assert {e: (layout.zoo / e).stat().st_mtime_ns for e in trained} == trained
    before = {label.key: label.seconds for label in LabelStore(layout.labels).read()}
    assert len(before) >= 3 and not layout.headroom.exists()

    # The third run goes on from there.
    process = start(layout)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    for stage in ("zoo", "signals", "search", "train", "pick", "report"):
        assert stage in output
    after = {label.key: label.seconds for label in LabelStore(layout.labels).read()}
    num_merges = 5 * len(ARMS)  # cross-task pairs but the held-out one
    assert len(after) == 5 * 4 + num_merges * 2
    assert {key: after[key] for key in before} == before

    # What was asked for is there: the merge measured after the pick, the figures, the manifests.
    pick = read_json(layout.pick / "pick.json")
    assert pick["arm"] in pick["measured"]["arms"] and len(pick["measured"]["arms"]) == len(ARMS)
    held_out = {frozenset(pick["pair"])}
    assert held_out.isdisjoint({frozenset(label.plan.members) for label in LabelStore(layout.labels).read()})
    read_headers(CheckpointRef("merged", layout.pick / "merged"))
    for figure in ("signals.png", "operators.png", "pick.png"):
        if (layout.report / figure).exists():
            assert (layout.report / figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (layout.report / "signals.png").exists() and (layout.report / "pick.png").exists()
    report = (layout.report / "report.md").read_text()
    assert f"The pick: {pick['arm']} for math-few + rag-few" in report and "40 items of math" in report
    for manifest in (layout.zoo / "zoo.json", layout.signals.with_suffix(".json"), layout.labels / "search.json"):
        assert {"config", "inputs", "versions", "seconds"} <= set(read_json(manifest))

    # A run that finds everything in place computes nothing and starts no Ray.
    written = {path: path.stat().st_mtime_ns for path in layout.labels.glob("*.parquet")}
    process = start(layout)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and output.count("unchanged since the last run") == 5, output
    assert {path: path.stat().st_mtime_ns for path in layout.labels.glob("*.parquet")} == written

    # The killed run's processes ended without help; two of Ray's agents need a minute for it (see ray_session).
    assert_gone(family, 90)
