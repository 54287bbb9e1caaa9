"""What a person sees, and where the noise of libraries goes."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from simmerge_ray.base.progress import Narrator


def test_a_stage_says_that_it_began_and_how_it_ended():
    text = io.StringIO()
    narrator = Narrator(Console(file=text, width=100))
    with narrator.stage("signals") as stage, narrator.bar("units") as report:
        report(1, 2)
        stage.result = "6 pairs"
    with pytest.raises(RuntimeError), narrator.stage("search"):
        raise RuntimeError
    with pytest.raises(KeyboardInterrupt), narrator.stage("train"):
        raise KeyboardInterrupt
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("signals") and lines[1].endswith("6 pairs")
    assert "failed after" in lines[3] and "interrupted after" in lines[5]


def test_everything_but_the_narration_goes_to_the_log(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from simmerge_ray.base.progress import Narrator, redirected_output
with redirected_output(Path({str(tmp_path / "x.log")!r})) as console:
    print("python noise"); sys.stderr.write("more noise"); os.write(1, b"noise of C++")
    Narrator(console).say("one line")
print("afterwards")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["one line", "afterwards", ""] and result.stderr == ""
    log = (tmp_path / "x.log").read_text()
    assert all(noise in log for noise in ("python noise", "more noise", "noise of C++"))


def test_log_lines_say_how_long_it_will_still_take(monkeypatch):
    now = 0.0
    monkeypatch.setattr("simmerge_ray.base.progress.time.monotonic", lambda: now)
    console = Console(file=(out := io.StringIO()), width=200)
    with Narrator(console).status_bar("merges evaluated") as report:
        report(5, 25, "")  # found in place
        for done in (10, 15, 25):
            now += 90.0
            report(done, 25, f"best 0.{done}")
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[0] == "merges evaluated: 10/25, eta 4 min, best 0.10"  # 18 s each, 15 left
    assert lines[1] == "merges evaluated: 15/25, eta 3 min, best 0.15"
    assert lines[2] == "merges evaluated: 25/25, best 0.25"
