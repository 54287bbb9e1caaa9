"""Compaction while others read and write."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from simmerge_ray.base import storage
from simmerge_ray.base.errors import LabelError
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.search.labels import (
    Infeasible,
    LabelStore,
    Measured,
    rows,
)
from simmerge_ray.search.labels import (
    store as store_module,
)
from tests.unit.search.labels.made_up import (
    as_older_file,
    contents,
    label,
    num_files,
    pair_labels,
    stopped,
    with_duplicates,
)


def test_compaction_keeps_what_is_read_in_one_file(store):
    assert store.compact() == 0
    for one in with_duplicates():
        store.append([one])
    before, num_before = contents(store.read()), num_files(store)
    assert store.compact() == num_before > 5
    assert num_files(store) == 1 and contents(store.read()) == before
    assert store.compact() == 0
    store.append(pair_labels())
    store.compact()
    assert num_files(store) == 1 and contents(store.read()) == before


@pytest.mark.parametrize("num_deleted", [0, 1, 5, 10])
def test_an_interrupted_compaction_loses_nothing_and_the_next_one_ends_it(tmp_path, monkeypatch, num_deleted):
    store = LabelStore(tmp_path)
    for one in with_duplicates():
        store.append([one])
    before = contents(store.read())

    def interrupted(uris):
        storage.delete_objects(list(uris)[:num_deleted])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "delete_objects", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    assert contents(store.read()) == before
    store.compact()
    assert num_files(store) == 1 and contents(store.read()) == before


def test_compaction_that_cannot_read_a_file_deletes_nothing(tmp_path):
    store = LabelStore(tmp_path)
    for one in pair_labels():
        store.append([one])
    (tmp_path / "z.parquet").write_bytes(b"junk")
    with pytest.raises(LabelError, match=r"z.parquet"):
        store.compact()
    assert num_files(store) == 5


def test_a_reader_whose_files_are_folded_meanwhile_lists_again(store, monkeypatch):
    for one in with_duplicates():
        store.append([one])
    before = contents(store.read())
    others = iter([LabelStore(store.uri).compact, lambda: store.append([label(MergePlan(source="z"))])])

    def read_late(uri):
        next(others, lambda: None)()
        return storage.read_bytes(uri)

    monkeypatch.setattr(rows, "read_bytes", read_late)
    assert [one for one in contents(store.read()) if one in before] == before


def test_a_listing_torn_by_a_compaction_is_made_good(tmp_path, monkeypatch):
    store = LabelStore(tmp_path)
    for one in with_duplicates():
        store.append([one])
    before, names = contents(store.read()), storage.list_objects(tmp_path, ".parquet")
    store.compact()
    listings = iter([names[:2], []])  # neither the folded files nor the one that replaced them
    monkeypatch.setattr(store_module, "list_objects", lambda *a: next(listings, None) or storage.list_objects(*a))
    assert contents(store.read()) == before


def test_a_file_that_is_listed_but_never_there_is_an_error_not_a_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "list_objects", lambda *_: [str(tmp_path / "gone.parquet")])
    with pytest.raises(LabelError, match=r"gone.parquet"):
        LabelStore(tmp_path).read()


def write_labels(uri: str, writer: int) -> None:
    """What a search does: a label a file, some of them stopped first."""
    store = LabelStore(uri)
    for number in range(15):
        plan = pair_plan("a", f"w{writer}-{number}", make_arm("linear"))
        store.append([label(plan, outcome=stopped(1.0))])
        store.append([label(plan), label(MergePlan(source=f"w{writer}-{number}"))])


def compact_until(uri: str, done: str) -> None:
    while not Path(done).exists():
        LabelStore(uri).compact()
        time.sleep(0.02)


@pytest.mark.slow
def test_writers_compactors_and_a_reader_at_the_same_time_lose_nothing(tmp_path):
    uri, done = str(tmp_path / "labels"), tmp_path / "done"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_labels, args=(uri, number)) for number in range(3)]
    compactors = [context.Process(target=compact_until, args=(uri, str(done))) for _ in range(2)]
    for process in (*compactors, *writers):
        process.start()
    measured: set[str] = set()
    while any(process.is_alive() for process in writers):
        now = {label.key for label in LabelStore(uri).read()}
        assert measured <= now, "a reader saw labels vanish"
        measured = now
    done.touch()
    for process in (*writers, *compactors):
        process.join()
    assert [process.exitcode for process in (*writers, *compactors)] == [0] * 5
    store = LabelStore(uri)
    found = store.read()
    assert len(found) == 3 * 15 * 2 and all(isinstance(one.outcome, Measured) for one in found)
    store.compact()
    assert num_files(store) == 1 and contents(store.read()) == contents(found)
    assert store.check().problems == ()


def test_older_files_are_read_and_compacted_with_new_ones(tmp_path):
    store = LabelStore(tmp_path)
    labels = [*pair_labels(), label(pair_plan("a", "c", make_arm("slerp")), outcome=Infeasible("NaN in x"))]
    store.append(labels)
    before = contents(store.read())
    (file,) = tmp_path.glob("*.parquet")
    as_older_file(file)
    assert contents(store.read()) == before and store.check().problems == ()
    new = label(pair_plan("a", "c", make_arm("ties")), outcome=stopped(1.0, 0.0))
    store.append([new])
    assert store.compact() == 2
    assert contents(store.read()) == sorted([*before, *contents([new])])
    (file,) = tmp_path.glob("*.parquet")
    assert set(pq.read_table(file)["schema"].to_pylist()) == {2}
