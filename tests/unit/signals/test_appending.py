"""A table that grows: its blocks, its files, new pairs against the whole computation, and runs that were cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.signals import bounds, compute, table_files
from simmerge_ray.signals.compute import compute_signals, signals_into
from simmerge_ray.signals.pair_blocks import MemoryBlock, PairColumns, block_pairs, num_rows, row_place
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.table import SignalTable, read_signal_table
from simmerge_ray.signals.table_files import append_block, digest_table, parts_directory
from tests import tiny
from tests.tables import synthetic_table

SPEC = SignatureSpec(num_positions=12, num_attention_positions=4, num_coordinates=50)


@given(st.integers(0, 9), st.integers(1, 9))
def test_every_pair_of_a_block_has_one_place(start, new):
    stop = start + new
    left, right = block_pairs(start, stop)
    wanted = [(i, j) for i in range(stop) for j in range(stop) if i != j and max(i, j) >= start]
    assert sorted(zip(left.tolist(), right.tolist(), strict=True)) == wanted and len(left) == num_rows(start, stop)
    assert [row_place(start, stop, i, j) for i, j in zip(left, right, strict=True)] == list(range(len(left)))


def cut(table: SignalTable, stops: list[int]) -> PairColumns:
    """The rows of a table in blocks that end at `stops`."""
    rows, blocks, start = table.by_columns, [], 0
    for stop in stops:
        left, right = block_pairs(start, stop)
        values = {
            task: np.array([rows.matrix(column, task)[left, right] for column in rows.columns]) for task in rows.tasks
        }
        blocks.append(MemoryBlock(start, stop, rows.columns, values))
        start = stop
    return PairColumns(rows.points, rows.tasks, rows.columns, blocks)


def write_in_parts(table: SignalTable, path, stops: list[int], last: int | None = None) -> None:
    """The first block as the first file, the others, or those before `last`, appended."""
    rows = cut(table, stops)
    for number, block in enumerate(rows.blocks[:last]):
        names = rows.points[block.start : block.stop]
        added = {name: {one: table.provenance[name].get(one) for one in names} for name in ("checkpoints", "own_task")}
        if number == 0:
            first = PairColumns(names, rows.tasks, rows.columns, [block])
            SignalTable(table.columns, first, {**table.provenance, **added}).write(path)
        else:
            append_block(path, rows.points, block, added)


@settings(max_examples=6)
@given(st.lists(st.integers(1, 2), min_size=1, max_size=3), st.booleans())
def test_a_table_in_parts_is_the_table(tmp_path_factory, sizes, is_read_whole):
    path = tmp_path_factory.mktemp("parts") / "pairs.parquet"
    stops = np.cumsum([2, *sizes]).tolist()
    table = synthetic_table(stops[-1] - 1)
    write_in_parts(table, path, stops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_files, "WHOLE_VALUES", 1 << 24 if is_read_whole else 0)
        found = read_signal_table(path)
        assert found.checkpoint_ids == table.checkpoint_ids and found.provenance["weights"] == "exact"
        for task in table.tasks:
            for column in table.columns:
                np.testing.assert_array_equal(found.matrix(column, task), table.matrix(column, task))
        assert found.rows == table.rows


def test_points_stand_sorted_whatever_order_they_came_in(tmp_path):
    table = synthetic_table(5)
    rows = table.by_columns
    order = [0, 4, 2, 1, 5, 3]
    left, right = block_pairs(0, 6)
    shuffled = {
        task: np.array([rows.matrix(one, task)[np.ix_(order, order)][left, right] for one in rows.columns])
        for task in rows.tasks
    }
    points = [rows.points[place] for place in order]
    found = SignalTable(
        table.columns,
        PairColumns(points, rows.tasks, rows.columns, [MemoryBlock(0, 6, rows.columns, shuffled)]),
        table.provenance,
    )
    np.testing.assert_array_equal(found.matrix("kl_lr_mean", "s"), table.matrix("kl_lr_mean", "s"))
    assert found.rows == table.rows
    found.write(tmp_path / "one.parquet")
    table.write(tmp_path / "other.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "other.parquet").read_bytes()


def test_a_part_changes_no_other_file_and_what_a_kill_leaves_is_passed_over(tmp_path):
    path, table = tmp_path / "pairs.parquet", synthetic_table(4)
    write_in_parts(table, path, [3, 4, 5], last=2)
    before = {one: one.read_bytes() for one in tmp_path.rglob("*.parquet")}
    digest = digest_table(path)
    (parts_directory(path) / ".0000004-x.parquet.123.partial").write_bytes(b"PAR1 half of it")
    (parts_directory(path) / "0000004-of another table.parquet").write_bytes(b"PAR1")
    assert digest_table(path) == digest and len(read_signal_table(path).checkpoint_ids) == 3
    write_in_parts(table, tmp_path / "other.parquet", [3, 4, 5])
    last = max(parts_directory(tmp_path / "other.parquet").glob("*4-*.parquet"))
    (parts_directory(path) / last.name).write_bytes(last.read_bytes())  # the same, by whoever goes on
    assert {one: one.read_bytes() for one in before} == before
    assert read_signal_table(path).rows == table.rows and digest_table(path) != digest
    table.write(path)  # in place of all
    assert not list(parts_directory(path).glob("[!.]*")) and read_signal_table(path) == table


def test_parts_that_are_damaged_or_of_others_are_refused(tmp_path, monkeypatch):
    path, table = tmp_path / "pairs.parquet", synthetic_table(4)
    write_in_parts(table, path, [3, 4, 5])
    last = max(parts_directory(path).iterdir())
    content = last.read_bytes()
    changed = pq.read_table(last)
    for name, written in {
        "cut": content[:-30],
        "empty": b"",
        "rows": changed.slice(1),
        "pairs": changed.set_column(0, "left", [changed["right"].to_pylist()]),
        "infinite": changed.set_column(3, "kl_lr_mean", [[float("inf")] * len(changed)]),
        "text": changed.set_column(3, "kl_lr_mean", [["x"] * len(changed)]),
    }.items():
        if isinstance(written, bytes):
            last.write_bytes(written)
        else:
            pq.write_table(written, last, row_group_size=len(changed) // 2)
        with pytest.raises(ConfigError, match=f"{last.name} is damaged"):
            read_signal_table(path)
            pytest.fail(name)
    monkeypatch.setattr(table_files, "WHOLE_VALUES", 0)
    last.write_bytes(content)
    found = read_signal_table(path)
    last.unlink()
    with pytest.raises(ConfigError, match="damaged.*FileNotFoundError"):
        found.matrix("kl_lr_mean", "s")
    with pytest.raises(ConfigError, match="was changed by somebody else"):
        append_block(path, ["base", "x", "y", "z", "c04"], cut(table, [4, 5]).blocks[1], {})


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    tiny.make_catalogue(root, num_checkpoints=6)
    return root


def some(zoo, count: int):
    every = load_catalogue(zoo / "catalogue.yaml")
    return replace(every, checkpoints=every.checkpoints[:count])


def assert_same(found: SignalTable, whole: SignalTable) -> None:
    assert found.checkpoint_ids == whole.checkpoint_ids and found.tasks == whole.tasks
    assert found.provenance == whole.provenance
    for task in whole.tasks:
        for column in whole.columns:
            np.testing.assert_allclose(
                found.matrix(column, task), whole.matrix(column, task), rtol=1e-9, atol=1e-12, err_msg=column
            )


def test_new_pairs_are_those_of_the_whole_computation(zoo, tmp_path, monkeypatch):
    probes, store = load_probe_sets(zoo / "probes"), SignatureStore(zoo / "signatures")
    whole = compute_signals(load_catalogue(zoo / "catalogue.yaml"), probes, SPEC, "sampled", store)
    at_once = tmp_path / "at_once.parquet"
    signals_into(at_once, load_catalogue(zoo / "catalogue.yaml"), probes, SPEC, "sampled", store)
    assert read_signal_table(at_once) == whole and not parts_directory(at_once).exists()
    # One after the other, and several together.
    path = tmp_path / "pairs.parquet"
    for count in (2, 3, 6):
        signals_into(path, some(zoo, count), probes, SPEC, "sampled", store)
    assert len(list(parts_directory(path).iterdir())) == 2
    assert_same(read_signal_table(path), whole)
    # In parts from the beginning, of one and two new ones; cut between two parts, and gone on with.
    monkeypatch.setattr(bounds, "FIRST_POINTS", 2)
    monkeypatch.setattr(compute, "_PART_ROWS", 8)
    append, parts = table_files.append_block, []

    def dying(*arguments):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(arguments[2].stop)
        append(*arguments)

    monkeypatch.setattr(compute, "append_block", dying)
    cut_path = tmp_path / "cut.parquet"
    with pytest.raises(KeyboardInterrupt):
        signals_into(cut_path, load_catalogue(zoo / "catalogue.yaml"), probes, SPEC, "sampled", store)
    assert parts == [4, 5] and len(read_signal_table(cut_path).checkpoint_ids) == 4
    monkeypatch.setattr(compute, "append_block", append)
    assert_same(signals_into(cut_path, load_catalogue(zoo / "catalogue.yaml"), probes, SPEC, "sampled", store), whole)


def test_what_was_made_otherwise_is_replaced(zoo, tmp_path):
    probes, store = load_probe_sets(zoo / "probes"), SignatureStore(zoo / "signatures")
    path = tmp_path / "pairs.parquet"
    made = []
    for count, weights, spec in (
        (2, "exact", SPEC),
        (2, "sampled", SPEC),
        (3, "exact", SPEC),
        (3, "sampled", SignatureSpec(num_positions=12, num_attention_positions=4, num_coordinates=51)),
        (4, "sampled", SPEC),
        (3, "sampled", SPEC),
    ):
        made.append(signals_into(path, some(zoo, count), probes, spec, weights, store))
        assert read_signal_table(path) == made[-1] and not list(parts_directory(path).glob("*"))
        assert made[-1] == compute_signals(some(zoo, count), probes, spec, weights, store)
    path.write_bytes(b"not a table")
    assert signals_into(path, some(zoo, 3), probes, SPEC, "sampled", store) == made[-1]
