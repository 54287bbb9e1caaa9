"""Figures of a real table and of a large synthetic one: PNG files that can be read, of sizes that can be looked at."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.reports.figures import MAX_LABELS, _colour_scale, _labels, write_heat_maps
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.features import SIGNALS
from simmerge_ray.signals.table import SignalTable
from tests.unit.signals.test_explain import synthetic_table

FIGURES = sorted(name for name in SIGNALS if name not in ("kl_rl", "kl_greedy_rl"))


@pytest.fixture(scope="module")
def table(catalogue, catalogue_path) -> SignalTable:
    return compute_signals(catalogue, load_probe_sets(catalogue_path.parent / "probes"))


def test_each_signal_has_a_figure_with_a_panel_per_task(table, tmp_path):
    paths = write_heat_maps(table, tmp_path)
    assert sorted(path.stem for path in paths) == FIGURES
    shapes = {}
    for path in paths:
        image = imread(path)
        shapes[path.stem] = image.shape
        assert all(200 < side < 2500 for side in image.shape[:2]), (path.name, image.shape)
        assert image[..., :3].std() > 0.05, path.name
    assert shapes["kl_lr"][1] > 1.3 * shapes["weight_cosine"][1]  # two tasks, and one panel of the weights
    assert shapes["loss"][1] > 1.3 * shapes["task_vector_norm"][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


@pytest.mark.slow
def test_tables_without_a_base_and_with_many_checkpoints(tmp_path):
    small = write_heat_maps(synthetic_table(num=2, with_base=False, tasks=["math"]), tmp_path / "small")
    assert sorted(path.stem for path in small) == sorted(n for n in FIGURES if not SIGNALS[n].needs_base)
    for path in write_heat_maps(synthetic_table(num=30, tasks=["math"]), tmp_path / "large"):
        assert all(200 < side < 2500 for side in imread(path).shape[:2])


def test_labels_are_thinned_beyond_what_can_be_read():
    for num in (1, 2, MAX_LABELS, MAX_LABELS + 1, 64, 1000):
        ids = [f"c{index}" for index in range(num)]
        positions, names = _labels(ids)
        assert len(positions) <= MAX_LABELS and [ids[position] for position in positions] == names
        assert num > MAX_LABELS or names == ids


def test_colours_are_centred_for_signed_values_and_logarithmic_for_distances():
    values = np.array([[np.nan, -0.2], [0.5, np.nan]])
    norm, _ = _colour_scale("task_vector_cosine", values)
    assert float(norm(0.0)) == pytest.approx(0.5) and (norm.vmin, norm.vmax) == (-0.5, 0.5)
    norm, _ = _colour_scale("task_vector_norm_ratio", np.array([[np.nan, -708.0, 1.0], [708.0, np.nan, -1.0]]))
    assert norm.vmax == 1.0
    norm, _ = _colour_scale("activation_cosine", np.array([[np.nan, -0.2], [0.5, np.nan]]))
    assert (norm.vmin, norm.vmax) == (-0.5, 0.5)  # values of both signs: two colours that meet at zero
    norm, _ = _colour_scale("activation_cosine", np.array([[np.nan, 0.2], [0.5, np.nan]]))
    assert (norm.vmin, norm.vmax) == (0.2, 0.5)
    norm, ticks = _colour_scale("kl_lr", np.array([[np.nan, 0.01], [1.0, np.nan]]))
    assert float(norm(0.1)) == pytest.approx(0.5) and (ticks[0], ticks[-1]) == pytest.approx((0.01, 1.0))


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_equal_values_have_a_scale(name, value):
    norm, _ = _colour_scale(name, np.array([[np.nan, value], [value, np.nan]]))
    assert norm.vmin < norm.vmax and np.isfinite(float(norm(min(max(value, norm.vmin), norm.vmax))))
