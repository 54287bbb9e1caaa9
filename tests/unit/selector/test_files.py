"""Data sets of one base and of several are read from all three forms, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from simmerge_ray.base.errors import ConfigError, LabelError
from simmerge_ray.plans.plan import pair_plan
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.selector.data.dataset import SelectionDataset, join_datasets
from simmerge_ray.selector.data.files import find_dataset, read_dataset
from tests.unit.selector.made_up import made_up_labels, made_up_table, planted, write_study


def read(path, arms=None):
    return read_dataset(find_dataset(path), arms)


def rows(dataset: SelectionDataset) -> dict[tuple[str, str, str], list[float]]:
    return {
        (context.left, context.right, context.task): [*dataset.features[i].ravel(), *dataset.utilities[i]]
        for i, context in enumerate(dataset.contexts)
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), ("s1", "s2"))


@pytest.fixture
def one_file(study, tmp_path):
    """The same as one file of labels, and the tables beside it."""
    store = LabelStore(tmp_path / "store")
    store.append([label for part in ("s1", "s2") for label in LabelStore(study / "labels" / part).read()])
    (tmp_path / "signals").mkdir()
    shutil.move(next((tmp_path / "store").iterdir()), tmp_path / "labels.parquet")
    for part in ("s1", "s2"):
        shutil.copy(study / "signals" / part / "pairs.parquet", tmp_path / "signals" / f"{part}.parquet")
    return tmp_path / "labels.parquet"


def test_a_study_and_one_file_of_all_labels_hold_the_same(study, one_file):
    loaded, again = read(study), read(one_file)
    assert rows(loaded.dataset) == rows(again.dataset) == rows(read(one_file.parent).dataset)
    assert loaded.base_of == again.base_of and set(loaded.base_of.values()) == {"s1-base", "s2-base"}
    assert loaded.dataset.arms == ("linear", "ties") and not loaded.unused
    one = read_dataset(dataclasses.replace(find_dataset(study), labels=(study / "labels" / "s1",)))
    assert one.unused == ("s2-base",) and set(one.base_of.values()) == {"s1-base"}


def test_one_base(study, tmp_path):
    shutil.copytree(study / "signals" / "s1", tmp_path / "signals")
    shutil.copytree(study / "labels" / "s1", tmp_path / "labels")
    found = rows(read(tmp_path).dataset)
    assert found.items() <= rows(read(study).dataset).items() and len(found) == 20


def test_arms_can_be_chosen(study):
    assert read(study, ["ties", "linear"]).dataset.arms == ("ties", "linear")
    with pytest.raises(LabelError, match="did you mean 'ties'"):
        read(study, ["linear", "tees"])


def test_what_is_no_data_set_is_refused(study, one_file, tmp_path):
    with pytest.raises(ConfigError, match="no data set at"):
        find_dataset(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no data set"):
        find_dataset(study / "signals")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ConfigError, match="no file of labels"):
        find_dataset(tmp_path / "x.txt")
    (one_file.parent / "signals" / "s2.parquet").unlink()
    with pytest.raises(LabelError, match=r"labels of 6 checkpoints have no signals \(s2-base, s2-c00"):
        read(one_file)
    shutil.copy(one_file.parent / "signals" / "s1.parquet", one_file.parent / "signals" / "s2.parquet")
    with pytest.raises(LabelError, match="ids must be unique"):
        read(one_file)


def test_a_part_without_signals_or_without_any_label_is_named(study, tmp_path):
    shutil.copytree(study, tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "signals" / "s2")
    with pytest.raises(LabelError, match="labels of s2 have no signals"):
        find_dataset(tmp_path / "study")
    (tmp_path / "labels").mkdir()
    shutil.copytree(study / "signals" / "s1", tmp_path / "signals")
    with pytest.raises(LabelError, match="no labels at"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("linear", "nuslerp", "dare")}, "other arms"),
        ({"columns": ("loss_left",)}, "other columns"),
        ({"weights": "sampled"}, "exact and sampled"),
    ],
)
def test_data_sets_that_differ_are_not_joined(changes, message):
    with pytest.raises(LabelError, match=message):
        join_datasets([planted(), dataclasses.replace(planted(seed=1), **changes)])


def test_joined_rows_keep_their_order():
    first, second = planted(4), planted(5, seed=1)
    joined = join_datasets([first, second])
    np.testing.assert_array_equal(joined.subset(range(len(first.contexts))).features, first.features)
    assert joined.contexts == (*first.contexts, *second.contexts)


def test_labels_of_two_tables_in_one_plan_are_refused(study, tmp_path):
    of_pair = made_up_labels(made_up_table("s1"))[-1]
    mixed = dataclasses.replace(of_pair, plan=pair_plan("s1-c00", "s2-c00", of_pair.plan.steps[0].arm))
    LabelStore(tmp_path / "labels").append([mixed])
    files = dataclasses.replace(find_dataset(study), labels=(tmp_path / "labels",))
    with pytest.raises(LabelError, match="different signal tables"):
        read_dataset(files)
