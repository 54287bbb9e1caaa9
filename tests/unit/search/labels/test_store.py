"""The label store: append-only, one row per key, nothing mixed that must not be."""

from __future__ import annotations

import os
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simmerge_ray.base.errors import LabelError
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, fold_plan, pair_plan
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.search.labels import (
    Infeasible,
    LabelStore,
    Measured,
    Stopped,
    pair_contexts,
    single_items,
)
from tests.unit.search.labels.made_up import (
    as_older_file,
    contents,
    label,
    num_files,
    pair_labels,
    stopped,
    variants,
    with_duplicates,
)
from tests.unit.test_layers import loaded_modules


def test_labels_are_read_back_as_written(store):
    labels = [*pair_labels(), label(pair_plan("a", "c", make_arm("linear")), outcome=Infeasible("NaN in x"))]
    store.append(labels[:2])
    store.append(labels[2:])
    again = {found.key: found for found in store.read()}
    assert set(again) == {one.key for one in labels}
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


def test_files_that_are_no_labels_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"junk")
    with pytest.raises(LabelError, match=r"x.parquet is not a label file"):
        LabelStore(tmp_path).read()


def test_a_copied_label_names_the_plan_that_was_evaluated_and_older_files_are_read(tmp_path):
    store = LabelStore(tmp_path)
    store.append([label(pair_plan("a", "b", make_arm("slerp")), same_as="linear: a + b")])
    (found,) = store.read()
    assert found.same_as == "linear: a + b"
    (file,) = tmp_path.glob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["same_as"]), file)
    (found,) = store.read()
    assert found.same_as is None and found.outcome.utility == 0.75


def test_a_stopped_trial_is_read_back_and_is_no_measurement(store):
    plan = pair_plan("a", "b", make_arm("linear"))
    store.append([label(plan, outcome=stopped(1.0, 0.0))])
    (found,) = store.read()
    assert isinstance(found.outcome, Stopped) and not isinstance(found.outcome, Measured)
    assert found.outcome.items.tolist() == [1.0, 0.0]
    assert found.outcome.utility == 0.5 and found.outcome.standard_error == pytest.approx(0.5)
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


def test_the_files_are_plain_tables(tmp_path):
    """What somebody with pandas finds, in old, new and folded files."""
    store = LabelStore(tmp_path)
    plan = fold_plan(["a", "b", "c"], [make_arm("ties", {"density": 0.2}), make_arm("linear")])
    recipe = MergePlan(recipe=recipe_of(make_arm("ties", {"density": 0.3}), {"b": 1.2, "c": 0.4}))
    store.append([label(plan), label(MergePlan(source="a"), outcome=stopped(1.0, 0.0)), label(recipe)])
    table = pandas.read_parquet(tmp_path).sort_values("label")
    assert table["operators"].tolist() == ["ties(density=0.2) ; linear", "", "ties(density=0.3)"]
    assert [list(members) for members in table["members"]] == [["a", "b", "c"], ["a"], ["b", "c"]]
    assert table["num_items"].tolist() == [4, 2, 4] and table["stopped"].tolist() == [False, True, False]
    assert table["utility"].tolist() == [0.75, 0.5, 0.75]
    (file,) = tmp_path.glob("*.parquet")
    as_older_file(file)
    store.append([label(plan, outcome=Infeasible("no"), task="u")])
    store.append(pair_labels())
    (tmp_path / ".x.parquet.0.partial").write_bytes(b"half")
    assert len(pandas.read_parquet(tmp_path)) == 8
    store.compact()
    table = pandas.read_parquet(tmp_path)
    assert len(table) == 8 - 1  # `a` was stopped, then measured
    assert table["num_items"].sum() == 6 * 4 and table["members"].notna().all()


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
        ({"key": ["0" * 32]}, "key '00000000000000000000000000000000' does not belong to"),
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
    assert set(expected) == {one.key for one in first.read()}
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
    (loaded,) = loaded_modules(["import simmerge_ray.search.labels"])
    assert not loaded & {"torch", "ray", "transformers", "pandas"}
