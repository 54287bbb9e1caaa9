"""What a command will write: every problem is said before it works, and nothing is left by the look."""

from __future__ import annotations

from pathlib import Path

import pytest

from simmerge_ray.base.errors import OutputError, StorageError
from simmerge_ray.base.storage import Output, RemotePath, as_place, check_outputs

UNWRITABLE = Path("/sys/kernel")  # also for root


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("weights")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mark.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "full")
    return tmp_path


def made(place: Path) -> Output:
    return Output(place, marks=("mark.json",), kind="a thing made by simmerge")


@pytest.mark.parametrize(
    ("output", "rule"),
    [
        (lambda root: Output(root / "full", is_file=True), "is a directory; name a file"),
        (lambda root: Output(root / "notes.txt"), "is a file; name a directory"),
        (lambda root: Output(root / "notes.txt" / "a" / "b"), "lies below .*notes.txt, which is a file"),
        (lambda root: Output(root / "notes.txt" / "b", is_file=True), "lies below .*notes.txt, which is a file"),
        (lambda root: Output(UNWRITABLE / "a" / "b"), "cannot write into /sys/kernel: "),
        (lambda root: Output(UNWRITABLE / "b", is_file=True), "cannot write into /sys/kernel: "),
        (lambda root: made(root / "full"), r"is not a thing made by simmerge \(it holds model.safetensors\)"),
        (lambda root: made(root / "link"), "exists and is not a thing made by simmerge"),
        (lambda root: Output(root / "notes.txt", is_file=True, starts=b"PAR1", kind="a table"), "is not a table"),
        (lambda root: Output(root / "read"), "is also --tasks, which is read"),
        (lambda root: Output(root / "link" / ".." / "read"), "is also --tasks, which is read"),
        (lambda root: Output(as_place("hf://me/model")), "the hub is not written to directly.*hf upload"),
        (lambda root: Output(as_place("https://host/x")), "no file can be written there"),
    ],
)
def test_a_place_that_takes_nothing_is_named_with_the_rule(root, output, rule):
    before = sorted(root.rglob("*"))
    with pytest.raises(OutputError, match=rf"--out .*{rule}"):
        check_outputs([output(root)], {"--tasks": root / "read", "--probes": None})
    assert sorted(root.rglob("*")) == before


def test_a_directory_that_would_be_replaced_must_not_hold_an_input(root):
    with pytest.raises(OutputError, match=r"made would be replaced, and --labels \(.*made/labels\) lies in it"):
        check_outputs([made(root / "made")], {"--labels": root / "made" / "labels"})
    check_outputs([Output(root / "made")], {"--labels": root / "made" / "labels"})  # it is only added to


def test_two_outputs_are_two_places_and_all_problems_are_said(root):
    both = [Output(root / "a.json", is_file=True), Output(root / "b" / ".." / "a.json", "--crossval", is_file=True)]
    with pytest.raises(OutputError, match="--out and --crossval would both be"):
        check_outputs(both)
    with pytest.raises(OutputError) as caught:
        check_outputs([Output(root / "full", is_file=True), Output(root / "notes.txt", "--log")])
    assert len(str(caught.value).splitlines()) == 2


def test_what_can_be_written_passes_and_nothing_is_left(root):
    before = sorted(root.rglob("*"))
    new, table = root / "new" / "below" / "x", root / "notes.txt"
    check_outputs([Output(new), made(root / "made"), made(root / "empty"), Output(table, is_file=True)])
    check_outputs([Output(root), Output(Path("new.parquet"), is_file=True, starts=b"PAR1")])
    assert sorted(root.rglob("*")) == before


def test_a_store_is_written_to_once_and_left_empty(bucket, monkeypatch):
    place = as_place(f"{bucket}/run")
    check_outputs([Output(place), Output(place / "a.json", "--crossval", is_file=True)])
    assert not place.exists()
    monkeypatch.setenv("SIMMERGE_STORE_PATIENCE", "0")
    with pytest.raises(StorageError):
        check_outputs([Output(RemotePath("s3", "no-such-bucket-here/run"))])
