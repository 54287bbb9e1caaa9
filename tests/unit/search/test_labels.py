"""The label store: append-only, one row per key, nothing mixed that must not be."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simmerge_ray.base import storage
from simmerge_ray.base.errors import LabelError
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, fold_plan, pair_plan
from simmerge_ray.search import labels as labels_module
from simmerge_ray.search.labels import (
    EvaluationSettings,
    Infeasible,
    LabeledPlan,
    LabelStore,
    Measured,
    Stopped,
    check_comparable,
    pair_contexts,
    single_items,
    used_digests,
)
from tests.unit.test_layers import loaded_modules

SETTINGS = EvaluationSettings("fake", "float32", 128)


def label(plan: MergePlan, task: str = "t", outcome=None, **changes) -> LabeledPlan:
    outcome = outcome or Measured(np.array([1.0, 0.0, 1.0, 1.0]))
    checkpoints = {name: f"digest-{name}" for name in plan.members}
    return dataclasses.replace(LabeledPlan(plan, task, f"items-{task}", outcome, SETTINGS, checkpoints, 0.5), **changes)


def pair_labels(left: str = "a", right: str = "b") -> list[LabeledPlan]:
    merges = [pair_plan(left, right, make_arm(name)) for name in ("linear", "nuslerp")]
    return [label(plan) for plan in (*merges, MergePlan(source=left), MergePlan(source=right))]


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return LabelStore(tmp_path / "labels" if request.param == "local" else f"memory://labels-{tmp_path.name}")


def test_labels_are_read_back_as_written(store):
    labels = [*pair_labels(), label(pair_plan("a", "c", make_arm("linear")), outcome=Infeasible("NaN in x"))]
    store.append(labels[:2])
    store.append(labels[2:])
    again = {found.key: found for found in store.read()}
    assert set(again) == {one.key for one in labels} == store.keys()
    assert all(one.same_as is None for one in again.values())
    for one in labels:
        found = again[one.key]
        assert (found.plan, found.task, found.settings, found.checkpoints) == (
            one.plan,
            one.task,
            one.settings,
            one.checkpoints,
        )
        if isinstance(one.outcome, Measured):
            assert found.outcome.items.tolist() == one.outcome.items.tolist()
            assert found.outcome.utility == 0.75 and found.outcome.standard_error == pytest.approx(0.25)
        else:
            assert found.outcome == one.outcome


def test_writing_twice_leaves_one_row_and_an_empty_store_is_empty(store):
    assert store.read() == []
    for _ in range(2):
        store.append(pair_labels())
    store.append(pair_labels()[:1])
    assert len(store.read()) == 4


def test_a_measured_label_replaces_an_infeasible_one_and_never_the_reverse(store):
    plan = pair_plan("a", "b", make_arm("linear"))
    good, bad = label(plan), label(plan, outcome=Infeasible("engine died"))
    for order in ((bad, good), (good, bad)):
        for one in order:
            store.append([one, label(MergePlan(source=f"x{id(one)}"))])
        assert {type(found.outcome) for found in store.read() if found.plan == plan} == {Measured}


def test_the_key_depends_on_all_that_the_utility_depends_on():
    one = label(pair_plan("a", "b", make_arm("ties")))
    others = [
        label(pair_plan("a", "b", make_arm("linear"))),
        dataclasses.replace(one, task_digest="other items"),
        dataclasses.replace(one, settings=EvaluationSettings("fake", "bfloat16", 128)),
        dataclasses.replace(one, checkpoints={"a": "new upload", "b": "digest-b"}),
    ]
    assert len({one.key, *(other.key for other in others)}) == 5
    assert one.key == label(pair_plan("b", "a", make_arm("ties"))).key == dataclasses.replace(one, seconds=9.0).key


def test_the_base_counts_only_where_an_operator_takes_it():
    digests = {"a": "1", "b": "2", "base": "3"}
    assert set(used_digests(pair_plan("a", "b", make_arm("linear")), digests, "base")) == {"a", "b"}
    assert set(used_digests(pair_plan("a", "b", make_arm("ties")), digests, "base")) == {"a", "b", "base"}


def test_contexts_need_every_arm_and_both_parents():
    labels = pair_labels()
    contexts = pair_contexts(labels, ["linear", "nuslerp"])
    assert [(c.left, c.right, c.task) for c in contexts] == [("a", "b", "t")]
    assert pair_contexts(labels[1:], ["linear", "nuslerp"]) == []
    assert pair_contexts(labels[:3], ["linear"]) == []


def test_other_weights_and_seeds_do_not_stand_for_an_arm():
    (linear,) = pair_plan("a", "b", make_arm("linear")).steps
    others = [
        MergePlan((dataclasses.replace(linear, weight=0.3),)),
        MergePlan((dataclasses.replace(linear, weight=(0.5, 0.2)),)),
        MergePlan((linear,), seed=1),
    ]
    others = [label(plan, outcome=Measured(np.zeros(4))) for plan in others]
    labels = pair_labels()
    for order in ([*labels, *others], [*others, *labels]):
        (context,) = pair_contexts(order, ["linear"])
        assert context.arms["linear"].mean() == 0.75
    assert pair_contexts([*labels[1:], *others], ["linear"]) == []


@pytest.mark.parametrize(
    "changes",
    [{"task_digest": "x"}, {"settings": EvaluationSettings("y", "float32", 128)}, {"checkpoints": {"a": "z"}}],
)
def test_labels_that_must_not_be_compared_are_refused(changes):
    with pytest.raises(LabelError, match="different"):
        check_comparable([*pair_labels(), label(MergePlan(source="a"), **changes)])


def test_files_that_are_no_labels_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"junk")
    with pytest.raises(LabelError, match=r"x.parquet is not a label file"):
        LabelStore(tmp_path).read()


def test_a_copied_label_names_the_plan_that_was_evaluated_and_files_of_before_are_read(tmp_path):
    store = LabelStore(tmp_path)
    store.append([label(pair_plan("a", "b", make_arm("slerp")), same_as="linear: a + b")])
    (found,) = store.read()
    assert found.same_as == "linear: a + b"
    (file,) = tmp_path.glob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["same_as"]), file)
    (found,) = store.read()
    assert found.same_as is None and found.outcome.utility == 0.75


def stopped(*items: float) -> Stopped:
    return Stopped(np.array(items))


def variants(plan: MergePlan) -> list[LabeledPlan]:
    """Outcomes of one key, the one to keep first."""
    outcomes = [None, stopped(1.0, 0.0, 1.0), stopped(1.0), Infeasible("engine died")]
    return [label(plan, outcome=outcome) for outcome in outcomes]


def contents(labels: list[LabeledPlan]) -> list[tuple]:
    """What can be compared of labels: arrays as lists."""
    found = []
    for one in labels:
        outcome = one.outcome.reason if isinstance(one.outcome, Infeasible) else one.outcome.items.tolist()
        found.append((one.key, type(one.outcome), outcome, one.seconds, one.same_as, dict(one.versions)))
    return found


def with_duplicates() -> list[LabeledPlan]:
    """Labels of five keys: all outcomes, repetitions that took longer, and a conflict."""
    again = [dataclasses.replace(one, seconds=9.0) for one in pair_labels()]
    again[0] = dataclasses.replace(again[0], outcome=Measured(np.array([0.0, 0.0, 1.0, 0.0])))
    return [*pair_labels(), *again, *variants(pair_plan("a", "c", make_arm("ties")))[1:]]


def as_before(file: Path) -> None:
    """Turn a label file into one of schema 1."""
    table = pq.read_table(file).drop_columns(["same_as", "stopped", "num_items", "operators", "members"])
    number = table.schema.get_field_index("schema")
    pq.write_table(table.set_column(number, "schema", pa.array([1] * len(table))), file)


def num_files(store: LabelStore) -> int:
    return len(storage.list_objects(store.uri, ".parquet"))


def test_a_stopped_trial_is_read_back_and_is_no_measurement(store):
    plan = pair_plan("a", "b", make_arm("linear"))
    store.append([label(plan, outcome=stopped(1.0, 0.0))])
    (found,) = store.read()
    assert isinstance(found.outcome, Stopped) and not isinstance(found.outcome, Measured)
    assert found.outcome.items.tolist() == [1.0, 0.0]
    assert found.outcome.utility == 0.5 and found.outcome.standard_error == pytest.approx(0.5)
    assert store.keys() == set() and store.keys(include_stopped=True) == {found.key}
    parents = [label(MergePlan(source=name)) for name in "ab"]
    assert pair_contexts([found, *parents], ["linear"]) == []
    assert single_items([label(MergePlan(source="a"), outcome=stopped(1.0))]) == {}


def test_the_digest_tells_a_stopped_from_a_measured_label(tmp_path):
    outcomes = (None, stopped(1.0, 0.0, 1.0, 1.0), stopped(1.0, 0.0, 1.0), Infeasible("0.75"))
    digests = set()
    for number, outcome in enumerate(outcomes):
        store = LabelStore(tmp_path / str(number))
        store.append([label(MergePlan(source="a"), outcome=outcome)])
        digests.add(store.digest())
    assert len(digests) == 4


def test_the_outcome_that_says_most_is_kept_in_any_order(tmp_path):
    plan = pair_plan("a", "b", make_arm("linear"))
    for first in range(4):
        for number, order in enumerate(permutations(variants(plan)[first:])):
            store = LabelStore(tmp_path / f"{first}-{number}")
            for one in order:
                store.append([one])
            assert contents(store.read()) == contents(variants(plan)[first : first + 1])
            assert store.keys() == (set() if first in (1, 2) else {label(plan).key})


def test_what_is_read_does_not_depend_on_files_or_their_order(tmp_path):
    generator = np.random.default_rng(0)
    labels = with_duplicates()
    expected = None
    for number in range(8):
        store = LabelStore(tmp_path / str(number))
        order = generator.permutation(len(labels))
        for part in np.array_split(order, generator.integers(1, len(labels) + 1)):
            store.append([labels[place] for place in part])
        expected = expected or contents(store.read())
        assert contents(store.read()) == expected and len(expected) == 5


def test_files_of_the_same_keys_with_other_outcomes_do_not_replace_each_other(store):
    plan = pair_plan("a", "b", make_arm("linear"))
    for one in variants(plan):
        store.append([one])
    assert num_files(store) == 4
    store.append([variants(plan)[0]])
    assert num_files(store) == 4
    assert isinstance(store.read()[0].outcome, Measured)


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
        patch.setattr(labels_module, "delete_objects", interrupted)
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

    monkeypatch.setattr(labels_module, "read_bytes", read_late)
    assert [one for one in contents(store.read()) if one in before] == before


def test_a_listing_torn_by_a_compaction_is_made_good(tmp_path, monkeypatch):
    store = LabelStore(tmp_path)
    for one in with_duplicates():
        store.append([one])
    before, names = contents(store.read()), storage.list_objects(tmp_path, ".parquet")
    store.compact()
    listings = iter([names[:2], []])  # neither the folded files nor the one that replaced them
    monkeypatch.setattr(labels_module, "list_objects", lambda *a: next(listings, None) or storage.list_objects(*a))
    assert contents(store.read()) == before


def test_a_file_that_is_listed_but_never_there_is_an_error_not_a_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(labels_module, "list_objects", lambda *_: [str(tmp_path / "gone.parquet")])
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
        now = LabelStore(uri).keys()
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


def test_a_truncated_or_damaged_file_has_a_name_in_the_error_and_is_a_problem(tmp_path):
    store = LabelStore(tmp_path)
    store.append(pair_labels())
    (file,) = tmp_path.glob("*.parquet")
    whole = file.read_bytes()
    for length in (0, 3, 8, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(LabelError, match=f"{file.name} is not a label file"):
            store.read()
        report = store.check()
        assert (report.num_files, report.num_labels) == (1, 0)
        assert len(report.problems) == 1 and file.name in report.problems[0]
    pq.write_table(pa.table({"x": [1]}), file)
    with pytest.raises(LabelError, match=f"{file.name}.*schema None"):
        store.read()


def test_files_of_before_are_read_and_folded_with_new_ones(tmp_path):
    store = LabelStore(tmp_path)
    labels = [*pair_labels(), label(pair_plan("a", "c", make_arm("slerp")), outcome=Infeasible("NaN in x"))]
    store.append(labels)
    before = contents(store.read())
    (file,) = tmp_path.glob("*.parquet")
    as_before(file)
    assert contents(store.read()) == before and store.check().problems == ()
    new = label(pair_plan("a", "c", make_arm("ties")), outcome=stopped(1.0, 0.0))
    store.append([new])
    assert store.compact() == 2
    assert contents(store.read()) == sorted([*before, *contents([new])])
    (file,) = tmp_path.glob("*.parquet")
    assert set(pq.read_table(file)["schema"].to_pylist()) == {2}


def test_the_files_are_plain_tables(tmp_path):
    """What somebody with pandas finds, in old, new and folded files."""
    store = LabelStore(tmp_path)
    plan = fold_plan(["a", "b", "c"], [make_arm("ties", {"density": 0.2}), make_arm("linear")])
    store.append([label(plan), label(MergePlan(source="a"), outcome=stopped(1.0, 0.0))])
    table = pandas.read_parquet(tmp_path).sort_values("label")
    assert table["operators"].tolist() == ["ties(density=0.2) ; linear", ""]
    assert [list(members) for members in table["members"]] == [["a", "b", "c"], ["a"]]
    assert table["num_items"].tolist() == [4, 2] and table["stopped"].tolist() == [False, True]
    assert table["utility"].tolist() == [0.75, 0.5]
    (file,) = tmp_path.glob("*.parquet")
    as_before(file)
    store.append([label(plan, outcome=Infeasible("no"), task="u")])
    store.append(pair_labels())
    (tmp_path / ".x.parquet.0.partial").write_bytes(b"half")
    assert len(pandas.read_parquet(tmp_path)) == 7
    store.compact()
    table = pandas.read_parquet(tmp_path)
    assert len(table) == 7 - 1  # `a` was stopped, then measured
    assert table["num_items"].sum() == 5 * 4 and table["members"].notna().all()


def rewrite(file: Path, **columns) -> None:
    """Give columns of a label file other values."""
    table = pq.read_table(file)
    for name, values in columns.items():
        number = table.schema.get_field_index(name)
        table = table.set_column(number, table.schema.field(number), pa.array(values, table.schema.field(number).type))
    pq.write_table(table, file)


def test_check_counts_a_sound_store(store):
    for one in with_duplicates()[4:]:
        store.append([one])
    report = store.check()
    assert (report.num_files, report.num_labels, report.num_duplicates) == (7, 5, 2)
    assert (report.num_measured, report.num_stopped, report.num_infeasible) == (4, 1, 0)
    assert report.problems == ()


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"key": ["0" * 32]}, "key 00000000000000000000000000000000 does not belong to"),
        ({"utility": [0.5]}, "utility is 0.5, the mean of its items is 0.75"),
        ({"utility": [None]}, "utility is None"),
        ({"items": [[1.0, 2.0, 0.0, 0.0]]}, "items outside [0, 1]: 2"),
        ({"items": [[1.0, float("nan"), 1.0, 1.0]]}, "items outside [0, 1]: nan"),
        ({"items": [[]]}, "has no items"),
        ({"items": [None]}, "row 1"),
        ({"num_items": [5]}, "num_items is 5, it has 4"),
        ({"schema": [7]}, "has label schema 7, this version reads 1 and 2"),
        ({"plan": ['{"source": 1}']}, "row 1: a plan needs"),
        ({"settings": ['{"evaluator": "x"}']}, "row 1"),
    ],
)
def test_check_finds_rows_that_are_not_sound(tmp_path, columns, problem):
    store = LabelStore(tmp_path)
    store.append([label(MergePlan(source="a"))])
    (file,) = tmp_path.glob("*.parquet")
    rewrite(file, **columns)
    store.append([label(MergePlan(source="b"))])
    report = store.check()
    assert report.num_files == 2
    assert len(report.problems) == 1 and problem in report.problems[0] and file.name in report.problems[0]


def test_check_lists_conflicts_and_leftovers(tmp_path):
    store = LabelStore(tmp_path)
    plan = pair_plan("a", "b", make_arm("linear"))
    for items in ([1.0, 0.0], [1.0, 0.0], [1.0, 1.0]):
        store.append([label(plan, outcome=Measured(np.array(items))), label(MergePlan(source=f"x{len(items)}"))])
    store.append([label(plan, outcome=Infeasible("engine died"))])
    live, dead = tmp_path / ".live.parquet.0.partial", tmp_path / ".dead.parquet.0.partial"
    live.touch()
    dead.touch()
    os.utime(dead, (0, 0))
    conflict, leftover = store.check().problems
    assert "linear: a + b on t was measured with different results: 0.5, 1" in conflict
    assert dead.name in leftover


def test_merged_stores_hold_what_all_of_them_held(tmp_path):
    labels = with_duplicates()
    first, second, third, union = (LabelStore(tmp_path / name) for name in ("1", "2", "3", "union"))
    for store, part in ((first, labels[:3]), (second, labels[2:7]), (third, labels[7:])):
        store.append(part)
        union.append(part)
    num_new, *others = first.merge([second, third])
    assert num_new in (1, 2) and others == [1]  # `b`, and by its digest the other result of a conflict; `ties`
    expected = {one.key: one.outcome for one in union.read()}
    assert {key for key in expected} == first.keys(include_stopped=True)
    for one in first.read():
        assert type(one.outcome) is type(expected[one.key])
        assert one.outcome.items.tolist() == expected[one.key].items.tolist()
    assert first.merge([second, third, first]) == [0, 0, 0] and num_files(first) == 3
    copy = LabelStore(tmp_path / "copy")
    assert copy.merge([union]) == [5] and contents(copy.read()) == contents(union.read())


def test_a_merge_replaces_lesser_outcomes_only(tmp_path):
    plan = pair_plan("a", "b", make_arm("linear"))
    store, *others = (LabelStore(tmp_path / str(number)) for number in range(5))
    for other, one in zip(others, reversed(variants(plan)), strict=True):
        other.append([one])
    assert store.merge(others) == [1, 1, 1, 1] and store.merge(reversed(others)) == [0, 0, 0, 0]
    assert isinstance(store.read()[0].outcome, Measured)


def test_stores_that_do_not_fit_are_not_merged_and_nothing_is_written(tmp_path):
    store, good, bad = (LabelStore(tmp_path / name) for name in ("store", "good", "bad"))
    store.append(pair_labels())
    good.append(pair_labels("a", "c"))
    bad.append([label(MergePlan(source="a"), checkpoints={"a": "another upload"})])
    with pytest.raises(LabelError, match=r"bad does not fit .*store: .*contents of checkpoint 'a'"):
        store.merge([good, bad])
    assert num_files(store) == 1


def test_the_label_store_loads_no_torch():
    assert not loaded_modules("import simmerge_ray.search.labels") & {"torch", "ray", "transformers", "pandas"}
