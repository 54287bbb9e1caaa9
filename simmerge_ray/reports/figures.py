"""Figures as PNG files: what all of them share, and the heat maps of a signal table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.storage import Place, write_atomically
from simmerge_ray.signals.features import SIGNALS, Signal
from simmerge_ray.signals.table import SignalTable

Array = np.ndarray

MAX_LABELS = 20  # checkpoints on an axis; of more, every second, third ... is named
_MAX_COLUMNS = 4
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
    """A figure of that size in inches, and its (rows, columns) array of axes."""
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, directory: Place, name: str) -> Place:
    """Write a figure as PNG; its path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    write_atomically(directory / name, buffer.getvalue())
    return directory / name


def legend_below(axis: Any) -> None:
    """A legend below the axis, where it hides no data."""
    axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)


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


def _write_maps(signal: Signal, table: SignalTable, directory: Place) -> Place:
    from matplotlib import colormaps

    ids = table.checkpoint_ids
    panels = {task: _matrix(table, signal.columns[0], task) for task in _tasks(signal, table)}
    norm, ticks = _colour_scale(signal.name, np.stack(list(panels.values())))
    colours = colormaps["RdBu_r" if signal.name in _SIGNED else "viridis"].with_extremes(bad="0.85")
    side = float(np.clip(0.2 * len(ids), 2.2, 5.0))
    figure, axes = _panels(len(panels), side, side, room=1.6)
    for index, (axis, (task, values)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        image = axis.imshow(np.clip(values, norm.vmin, norm.vmax), cmap=colours, norm=norm)
        positions, names = _labels(ids)
        axis.set_xticks(positions, names, rotation=90, fontsize=7)
        axis.set_yticks(positions, names if index % axes.shape[1] == 0 else [""] * len(names), fontsize=7)
        axis.set_title(_panel_title(signal, task), fontsize=9)
        axis.set_xlabel("right", fontsize=8)
        if index % axes.shape[1] == 0:
            axis.set_ylabel("left", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes.flat), shrink=0.8, aspect=30, ticks=ticks)
    if ticks is not None:
        bar.ax.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks])
        bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label(_UNITS[signal.name], fontsize=8)
    return _finish(figure, signal, table, len(panels), directory)


def _write_bars(signal: Signal, table: SignalTable, directory: Place) -> Place:
    ids, base = table.checkpoint_ids, table.provenance.get("base")
    tasks = _tasks(signal, table)
    height = float(np.clip(0.2 * len(ids), 1.6, 8.0))
    figure, axes = _panels(len(tasks), 2.6, height, room=1.4)
    for index, (axis, task) in enumerate(zip(axes.flat, tasks, strict=False)):
        # A checkpoint's own value stands on the left of any of its pairs.
        values = [table.get(name, other, task).features[f"{signal.name}_left"] for name, other in _with_another(ids)]
        axis.barh(range(len(ids)), values, height=0.7)
        axis.set_ylim(len(ids) - 0.4, -0.6)
        positions, names = _labels(ids)
        axis.set_yticks(positions, names if index % axes.shape[1] == 0 else [""] * len(names), fontsize=7)
        if base and signal.name != "task_vector_norm":  # it would be zero
            value = table.rows[base, ids[0], task].features[f"{signal.name}_left"]
            axis.axvline(value, c="black", lw=0.9, ls="--", label=f"base: {value:.3g}")
            axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.12 * 2.6 / height), frameon=False)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(_panel_title(signal, task), fontsize=9)
        axis.set_xlabel(_UNITS[signal.name], fontsize=8)
    return _finish(figure, signal, table, len(tasks), directory)


def _tasks(signal: Signal, table: SignalTable) -> tuple[str, ...]:
    return table.tasks[:1] if signal.of_weights else table.tasks


def _panel_title(signal: Signal, task: str) -> str:
    return "" if signal.of_weights else f"probes: {task}"


def _matrix(table: SignalTable, column: str, task: str) -> Array:
    """(M, M) values, the left checkpoint in the row; NaN on the diagonal."""
    ids = table.checkpoint_ids
    values = np.full((len(ids), len(ids)), np.nan)
    for i, left in enumerate(ids):
        for j, right in enumerate(ids):
            if i != j:
                values[i, j] = table.get(left, right, task).features[column]
    return values


def _colour_scale(name: str, values: Array) -> tuple[Any, Array | None]:
    """The norm that all panels of a figure share, and the ticks of its colour bar (None: matplotlib's)."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if name in _SIGNED:
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


def _with_another(ids: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, ids[0] if name != ids[0] else ids[1]) for name in ids]


def _panels(count: int, width: float, height: float, room: float) -> tuple[Any, Any]:
    """A figure of `count` panels of that size in inches, with `room` for labels; panels too many are hidden."""
    columns = min(count, _MAX_COLUMNS)
    rows = -(-count // columns)
    figure, axes = new_figure(columns * (width + 0.25) + room, rows * (height + room), columns, rows)
    figure.set_layout_engine("constrained")
    for axis in list(axes.flat)[count:]:
        axis.set_visible(False)
    return figure, axes


def _finish(figure: Any, signal: Signal, table: SignalTable, num_panels: int, directory: Place) -> Place:
    title = f"{signal.name}: {signal.meaning.rsplit(', nats', 1)[0]}"
    if signal.of_weights and signal.family != "single" and table.provenance.get("weights") == "sampled":
        title += " (from a sample of the weights)"
    figure.suptitle(title, fontsize=10 if num_panels > 1 else 8)
    return save_figure(figure, directory, f"{signal.name}.png")
