"""Figures as PNG files: what all of them share, and the heat maps of a signal table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.storage import Place, write_atomically
from simmerge_ray.signals.features import SIGNALS, Signal
from simmerge_ray.signals.table import SignalTable

FIGURES = "figures"  # where a report's figures lie
# Colours that people with any vision tell apart: Okabe and Ito 2008.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#b3a100")
# Letters that can be read when the figure is shown at half its size.
_STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "figure.titlesize": 13,
    "legend.fontsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
MAX_LABELS = 20  # checkpoints on an axis; of more, every second, third ... is named
_MAX_COLUMNS = 4
_OVERVIEW = (
    "kl_lr", "activation_cosine", "attention_cosine", "weight_cosine", "task_vector_cosine", "weight_l2",
)  # fmt: skip
_SIGNED = ("task_vector_cosine", "task_vector_norm_ratio")  # zero is the middle of the colours
_LOGARITHMIC = ("kl_lr", "kl_greedy_lr", "weight_l2")
# What a colour bar or an axis of bars says.
_UNITS: Mapping[str, str] = {
    "kl_lr": "nats",
    "kl_greedy_lr": "nats",
    "activation_cosine": "cosine",
    "attention_cosine": "cosine",
    "weight_cosine": "cosine",
    "weight_l2": "distance / norm of the base",
    "task_vector_cosine": "cosine",
    "task_vector_norm_ratio": "natural logarithm of the ratio",
    "sign_conflict": "share of the coordinates that both moved",
    "trimmed_overlap": "share of the coordinates kept of each",
    "task_vector_norm": "norm / norm of the base",
    "entropy": "nats",
    "loss": "nats",
}


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure of that size in inches, and its (rows, columns) array of axes, in the style of all reports."""
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    rcParams.update(_STYLE)
    rcParams["axes.prop_cycle"] = cycler(color=PALETTE)

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, directory: Place, name: str) -> Place:
    """Write a figure as PNG; its path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    write_atomically(directory / name, buffer.getvalue())
    return directory / name


def title_above(figure: Any, finding: str) -> None:
    """What a figure shows, as a sentence above all of it; the figure has a constrained layout."""
    from textwrap import fill

    width = int(figure.get_size_inches()[0] * 10)
    figure.suptitle(fill(finding, width), x=0.01, ha="left", fontweight="bold")


def wrapped(label: str, width: int = 38) -> str:
    """A label of an axis in as many lines as it takes: names are not cut."""
    from textwrap import fill

    return fill(label, width, break_long_words=False, break_on_hyphens=False)


def legend_below(axis: Any) -> None:
    """A legend below the axis, where it hides no data."""
    axis.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)


def legend_outside(figure: Any, axes: Any) -> None:
    """One legend below all axes, of what the first of them shows."""
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="outside lower center", frameon=False)


def hide_spare(axes: Any, count: int) -> None:
    """Hide the axes after the first `count`."""
    for axis in list(axes.flat)[count:]:
        axis.set_visible(False)


def grouped_bars(
    axis: Any,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    bounds: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> None:
    """Bars side by side, a group a label on the axis, with a line at zero. series: heights by name, one for each group;
    NaN has no bar. bounds: intervals, likewise."""
    width = 0.84 / len(series)
    for index, (name, heights) in enumerate(series.items()):
        places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        errors = None
        if bounds is not None:
            low, high = np.array(bounds[name]).T
            # A percentile interval need not hold the estimate; a bar of errors cannot be negative.
            errors = np.maximum([heights - low, high - heights], 0)
        axis.bar(places, heights, width, yerr=errors, label=name, error_kw={"lw": 0.8, "capsize": 1.5})
    axis.axhline(0, c="black", lw=0.6)
    axis.set_xticks(range(len(groups)), groups)


def write_heat_maps(table: SignalTable, directory: Place) -> list[Place]:
    """One PNG `<signal>.png` per signal of the table; their paths.

    The main statistic of all ordered pairs, the left checkpoint in the row, a panel per task; signals of weights do not
    depend on the task and have one panel. KL in the other direction is the transpose and has no figure of its own.
    Signals of single checkpoints are bars, with the base as a line.
    """
    return [
        _write_bars(signal, table, directory) if signal.family == "single" else _write_maps(signal, table, directory)
        for signal in SIGNALS.values()
        if signal.name in _UNITS and signal.columns[0] in table.columns
    ]


def write_overview(table: SignalTable, directory: Place, name: str) -> Place:
    """One PNG with the heat maps of the main signals, means over the tasks."""
    shown = [SIGNALS[signal] for signal in _OVERVIEW if SIGNALS[signal].columns[0] in table.columns]
    side = 2.8 + 0.085 * max(map(len, table.checkpoint_ids))  # with room for the names beside and below each map
    figure, axes = _panels(len(shown), side, side, room=0.8, columns=3)
    for axis, signal in zip(axes.flat, shown, strict=False):
        values = np.mean([_matrix(table, signal.columns[0], task) for task in _tasks(signal, table)], axis=0)
        norm, ticks = _colour_scale(signal.name, values)
        image = _draw_map(axis, signal, values, norm, table.checkpoint_ids)
        axis.set_title(signal.name)
        _add_colour_bar(figure, image, axis, signal, ticks)
        if axis is axes.flat[0]:
            title_above(figure, _extremes(signal, table.checkpoint_ids, values))
    return save_figure(figure, directory, name)


def _extremes(signal: Signal, ids: Sequence[str], values: np.ndarray) -> str:
    """Between which two checkpoints, left and right, a signal (M, M) is the largest and the smallest."""

    def pair(place: int) -> str:
        left, right = divmod(place, len(ids))
        return f"{values[left, right]:.3g} ({ids[left]}, {ids[right]})"

    highest, lowest = int(np.nanargmax(values)), int(np.nanargmin(values))
    return f"{signal.name}: largest {pair(highest)}, smallest {pair(lowest)}"


def _write_maps(signal: Signal, table: SignalTable, directory: Place) -> Place:
    ids = table.checkpoint_ids
    panels = {task: _matrix(table, signal.columns[0], task) for task in _tasks(signal, table)}
    norm, ticks = _colour_scale(signal.name, np.stack(list(panels.values())))
    side = float(np.clip(0.2 * len(ids), 2.2, 5.0))
    figure, axes = _panels(len(panels), side, side, room=1.6)
    for index, (axis, (task, values)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        image = _draw_map(axis, signal, values, norm, ids, has_names=index % axes.shape[1] == 0)
        axis.set_title(_panel_title(signal, task))
        axis.set_xlabel("right")
        if index % axes.shape[1] == 0:
            axis.set_ylabel("left")
    _add_colour_bar(figure, image, list(axes.flat), signal, ticks)
    mean = np.mean(list(panels.values()), axis=0)
    return _finish(figure, signal, table, _extremes(signal, ids, mean), directory)


def _draw_map(
    axis: Any, signal: Signal, values: np.ndarray, norm: Any, ids: Sequence[str], has_names: bool = True
) -> Any:
    """(M, M) values as colours; has_names: of the rows."""
    from matplotlib import colormaps

    is_signed = norm.vmin == -norm.vmax  # `_colour_scale`: two colours that meet at zero
    colours = colormaps["RdBu_r" if is_signed else "viridis"].with_extremes(bad="0.85")
    positions, names = _labels(ids)
    axis.set_xticks(positions, names, rotation=90, fontsize=10)
    axis.set_yticks(positions, names if has_names else [""] * len(names), fontsize=10)
    return axis.imshow(np.clip(values, norm.vmin, norm.vmax), cmap=colours, norm=norm)


def _add_colour_bar(figure: Any, image: Any, axes: Any, signal: Signal, ticks: np.ndarray | None) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, ticks=ticks)
    if ticks is not None:
        bar.ax.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks])
        bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=10)
    bar.set_label(_UNITS[signal.name])


def _write_bars(signal: Signal, table: SignalTable, directory: Place) -> Place:
    ids, base = table.checkpoint_ids, table.provenance.get("base")
    tasks = _tasks(signal, table)
    height = float(np.clip(0.2 * len(ids), 1.6, 8.0))
    figure, axes = _panels(len(tasks), 2.6, height, room=1.4)
    every: list[list[float]] = []
    for index, (axis, task) in enumerate(zip(axes.flat, tasks, strict=False)):
        values = list(table.single(signal.name, task).values())
        every.append(values)
        axis.barh(range(len(ids)), values, height=0.7)
        axis.set_ylim(len(ids) - 0.4, -0.6)
        positions, names = _labels(ids)
        axis.set_yticks(positions, names if index % axes.shape[1] == 0 else [""] * len(names), fontsize=10)
        if base and signal.name != "task_vector_norm":  # it would be zero
            value = table.rows[base, ids[0], task].features[f"{signal.name}_left"]
            axis.axvline(value, c="black", lw=0.9, ls="--", label=f"base: {value:.3g}")
            axis.legend(loc="upper left", bbox_to_anchor=(0, -0.12 * 2.6 / height), frameon=False)
        axis.tick_params(axis="x", labelsize=10)
        axis.set_title(_panel_title(signal, task))
        axis.set_xlabel(_UNITS[signal.name])
    mean = np.mean(every, axis=0)
    high, low = ids[int(mean.argmax())], ids[int(mean.argmin())]
    finding = f"{signal.name}: largest {mean.max():.3g} ({high}), smallest {mean.min():.3g} ({low})"
    return _finish(figure, signal, table, finding, directory)


def _tasks(signal: Signal, table: SignalTable) -> tuple[str, ...]:
    return table.tasks[:1] if signal.of_weights else table.tasks


def _panel_title(signal: Signal, task: str) -> str:
    return "" if signal.of_weights else f"probes: {task}"


def _matrix(table: SignalTable, column: str, task: str) -> np.ndarray:
    """(M, M) values, the left checkpoint in the row; NaN on the diagonal."""
    return table.matrix(column, task)[-len(table.checkpoint_ids) :, -len(table.checkpoint_ids) :]


def _colour_scale(name: str, values: np.ndarray) -> tuple[Any, np.ndarray | None]:
    """The norm that all panels of a figure share, and the ticks of its colour bar (None: matplotlib's)."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if name in _SIGNED or (low < 0 < high and name not in _LOGARITHMIC):
        # The ratio to a norm of zero is e^700; it takes the colour of the largest other one.
        reach = float(np.abs(values[np.abs(values) < 100.0]).max(initial=0.0)) or 1.0
        return Normalize(-reach, reach), None
    if name in _LOGARITHMIC and high > 0:
        # Equal checkpoints are at distance 0; they take the lowest colour.
        low = max(float(np.nanmin(values[values > 0])), 1e-6 * high)
        low, high = (low, high) if high > 1.01 * low else (low / 1.5, high * 1.5)
        return LogNorm(low, high), np.geomspace(low, high, 5)
    if high == low:
        low, high = low - 0.01, high + 0.01
    return Normalize(low, high), None


def _labels(ids: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions that get a label, and the labels."""
    positions = list(range(0, len(ids), -(-len(ids) // MAX_LABELS)))
    return positions, [ids[position] for position in positions]


def _panels(count: int, width: float, height: float, room: float, columns: int = _MAX_COLUMNS) -> tuple[Any, Any]:
    """A figure of `count` panels of that size in inches, with `room` for labels; panels too many are hidden."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure, axes = new_figure(columns * (width + 0.25) + room, rows * (height + room), columns, rows)
    figure.set_layout_engine("constrained")
    hide_spare(axes, count)
    return figure, axes


def _finish(figure: Any, signal: Signal, table: SignalTable, finding: str, directory: Place) -> Place:
    title = f"{finding}. {signal.meaning.rsplit(', nats', 1)[0].capitalize()}"
    if signal.of_weights and signal.family != "single" and table.provenance.get("weights") == "sampled":
        title += " (from a sample of the weights)"
    title_above(figure, title)
    return save_figure(figure, directory, f"{signal.name}.png")
