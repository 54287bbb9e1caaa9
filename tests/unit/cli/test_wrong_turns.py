"""Wrong turns as people take them: each ends with one message that says what to do, exit code 2 (130 for Ctrl-C), and
no traceback, before anything is computed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

UNWRITABLE = "/sys/kernel/simmerge"  # for root, too
SEARCH = ("search", "catalogue.yaml", "--tasks", "tasks", "--budget", "2", "--evaluator", "transformers")
LABELS = ("labels", "make", "catalogue.yaml", "--tasks", "tasks", "--evaluator", "transformers")
AUTO = ("auto", "catalogue.yaml", "--probes", "probes", "--evaluator", "transformers")
TUNE = ("tune", "catalogue.yaml", "--probes", "probes")
SIGNALS = ("signals", "catalogue.yaml", "--probes", "probes")
RETENTION = ("retention", "m0", "--catalogue", "catalogue.yaml", "--probes", "probes")
EXTRACT = ("extract-lora", "m0", "--base", "base")
TRAIN = ("train", "--signals", "s.parquet", "--labels", "labels")
PLAN = ("plan", "catalogue.yaml", "--signals", "s.parquet")
PREDICTOR = ("predictor", "train", "labels")


@pytest.fixture(scope="module")
def zoo(catalogue_path, tmp_path_factory) -> Path:
    """A catalogue and what lies about; the cases leave it as it is."""
    root = tmp_path_factory.mktemp("wrong turns ü")
    shutil.copytree(catalogue_path.parent, root, dirs_exist_ok=True)
    (root / "notes.txt").write_text("mine\n")
    return root


@pytest.fixture
def unchanged(zoo) -> Iterator[None]:
    before = sorted(zoo.rglob("*"))
    yield
    assert sorted(path for path in zoo.rglob("*") if path.name != "simmerge.log") == before


def check_refusal(result: CompletedProcess[str], message: str, code: int = 2) -> None:
    said = result.stdout + result.stderr
    assert result.returncode == code, said
    assert "Traceback" not in said
    assert message in re.sub(r"[│\s]+", " ", result.stderr), said
    assert len(re.findall(r"^error: |─ Error ─|^interrupted", result.stderr, re.MULTILINE)) == 1, said


OUTPUTS = [
    ((*SEARCH, "--out", UNWRITABLE), "--out /sys/kernel/simmerge: cannot write into /sys/kernel"),
    ((*SEARCH, "--out", "notes.txt", "--dry-run"), "--out notes.txt is a file; name a directory"),
    ((*SEARCH, "--out", "tasks", "--dry-run"), "--out tasks is also --tasks, which is read"),
    ((*SEARCH, "--out", "hf://me/labels"), "the hub is not written to directly"),
    ((*LABELS, "--out", UNWRITABLE, "--dry-run"), "cannot write into /sys/kernel"),
    ((*AUTO, "--out", UNWRITABLE), "cannot write into /sys/kernel"),
    ((*AUTO, "--out", "notes.txt"), "--out notes.txt is a file; name a directory"),
    ((*TUNE, "--out", "notes.txt/tuned"), "notes.txt, which is a file"),
    ((*SIGNALS, "--out", f"{UNWRITABLE}.parquet"), "cannot write into /sys/kernel"),
    ((*SIGNALS, "--out", "."), "--out . is a directory; name a file"),
    ((*SIGNALS, "--out", "catalogue.yaml"), "--out catalogue.yaml is also CATALOGUE, which is read"),
    ((*SIGNALS, "--out", "notes.txt"), "--out notes.txt exists and is not a table of signals; choose another file"),
    ((*SIGNALS, "--out", "s.json"), "--out and what it was made of would both be s.json"),
    ((*SIGNALS, "--out", "s.parquet", "--log", UNWRITABLE), "the log /sys/kernel/simmerge cannot be written"),
    ((*TRAIN, "--out", "."), "--out . would be replaced, and --signals (s.parquet) lies in it"),
    ((*TRAIN, "--out", "m0"), "--out m0 exists and is not a selector made by `simmerge train` (it holds config.json,"),
    ((*TRAIN, "--out", "new", "--crossval", "tasks"), "--crossval tasks is a directory; name a file"),
    ((*PREDICTOR, "--out", "tasks"), "exists and is not a predictor made by `simmerge predictor train`"),
    ((*RETENTION, "--out", "probes"), "--out probes is also --probes, which is read"),
    ((*EXTRACT, "--out", "m1"), "m1 exists and is not an adapter made by `simmerge extract-lora`"),
    (("merge", "catalogue.yaml", "m0"), "OUT m0 exists and is not a merge made by simmerge"),
    (("labels", "merge", UNWRITABLE, "tasks"), "INTO /sys/kernel/simmerge: cannot write into /sys/kernel"),
    ((*PLAN, "--out", "notes.txt"), "--out notes.txt is a file; name a directory"),
]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("command", "message"), OUTPUTS, ids=[" ".join(command)[:70] for command, _ in OUTPUTS])
def test_outputs_are_looked_at_first(simmerge, zoo, command, message):
    check_refusal(simmerge(*command, cwd=zoo), message)
