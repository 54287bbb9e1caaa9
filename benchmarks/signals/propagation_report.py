"""The report of `benchmarks.signals.propagation`: tables as Markdown, and predicted against exact KL as a figure."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.markdown import number, table_lines, with_interval
from simmerge_ray.reports.figures import new_figure, save_figure

OPERATORS = ("linear", "slerp", "nuslerp", "ties")
PREDICTED = ("bound", "second_order", "virtual", "curved")
DEPTHS = (1, 2, 3)
SIGNALS = {
    "KL mean": "kl_lr_mean",
    "activation cosine mean": "activation_cosine_mean",
    "weight cosine global": "weight_cosine_global",
    "weight l2 global": "weight_l2_global",
    "task vector cosine global": "task_vector_cosine_global",
}
Rows = list[dict[str, Any]]


def draw(rows: Rows, directory: Path) -> None:
    """Predicted against exact KL, one panel for each depth and propagator."""
    figure, axes = new_figure(12, 9, columns=len(PREDICTED), rows=len(DEPTHS))
    values = [row["features"]["exact"]["kl_lr_mean"] for row in rows]
    low, high = min(values) / 1.5, max(values) * 1.5
    for (i, depth), (j, name) in product(enumerate(DEPTHS), enumerate(PREDICTED)):
        panel = axes[i, j]
        panel.plot([low, high], [low, high], color="black", linewidth=0.8)
        for operator in OPERATORS:
            chosen = [row for row in rows if row["depth"] == depth and row["operator"] == operator]
            x, y = ([row["features"][which]["kl_lr_mean"] for row in chosen] for which in ("exact", name))
            panel.scatter(x, np.maximum(y, low), s=5, alpha=0.5, linewidths=0, label=operator)
        panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        panel.grid(color="0.9", linewidth=0.5)
        panel.set_title(name if i == 0 else "")
        panel.set_ylabel(f"depth {depth}: predicted" if j == 0 else "")
        panel.set_xlabel("exact" if i == len(DEPTHS) - 1 else "")
    axes[0, 0].legend(fontsize=8, markerscale=2)
    figure.suptitle("KL(intermediate || checkpoint), mean over prompt tokens, nats")
    figure.tight_layout()
    save_figure(figure, directory, "propagation.png")


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    found = {tuple(e[key] for key in ("operator", "depth", "propagator", "signal")): e for e in result["summary"]}
    seconds = (
        f"{operator} " + ", ".join(f"{name} {value:.3f}" for name, value in of.items())
        for operator, of in result["seconds"].items()
    )
    cast = (f"{signal} {value:.2g}" for signal, value in result["cast_to_bfloat16"].items())
    lines = ["# Propagated signals against `exact`", "", result["about"], ""]
    lines += [f"Rounded intermediates, relative RMSE: {', '.join(cast)}.", ""]
    lines += [f"Seconds a plan and task (median, 4 steps): {'; '.join(seconds)}", ""]
    rows: list[list[Any]] = []
    for operator, depth in product(OPERATORS, DEPTHS[:2]):
        cells: list[Any] = [operator, depth]
        for name in ("virtual", "curved"):
            entry = found[operator, depth, name, "KL mean"]
            low = entry["relative_rmse"] <= 0.06
            high = entry["tau"] >= (0.83 if operator == "ties" else 0.88)
            cells += [f"{entry['relative_rmse']:.3f} {'met' if low else 'missed'}"]
            cells += [f"{entry['tau']:.3f} {'met' if high else 'missed'}"]
        rows.append(cells)
    header = ["operator", "depth", "virtual RMSE", "virtual tau", "curved RMSE", "curved tau"]
    lines += ["## Targets: KL at depth 1 and 2, relative RMSE <= .06, tau >= .88 (ties .83)", ""]
    lines += table_lines(header, rows)
    lines += ["## KL: relative RMSE of `virtual` less that of `curved`, paired over resampled models", ""]
    rows = [
        [e["operator"], e["depth"], with_interval(e["gain"], e["interval"]), " / ".join(map(number, e["median"]))]
        for e in result["gain"]
    ]
    lines += table_lines(["operator", "depth", "gain", "median relative error, virtual / curved"], rows)
    for signal in SIGNALS:
        rows = []
        for operator, depth in product(OPERATORS, DEPTHS):
            cells = [operator, depth]
            for name in PREDICTED:
                entry = found[operator, depth, name, signal]
                digits = 3 if entry["relative_rmse"] >= 0.001 else 6
                rmse = with_interval(entry["relative_rmse"], entry["relative_rmse_interval"], digits=digits)
                cells.append(f"{rmse}; tau {with_interval(entry['tau'], entry['tau_interval'], digits=2)}")
            rows.append(cells)
        lines += [f"## {signal}", "", *table_lines(["operator", "depth", *PREDICTED], rows)]
    lines += ["## Weights of `virtual`", ""]
    lines += ["Largest error over all plans and depths (cosines absolute, else relative):", ""]
    for operator, errors in result["weights"].items():
        worst = errors["worst"]
        column = max(worst, key=lambda name: worst[name])
        groups = max(worst[f"{signal}_global"] for signal in ("weight_cosine", "weight_l2", "task_vector_cosine"))
        lines.append(
            f"- {operator}: global {groups:.2g}; any column {worst[column]:.2g} ({column}); "
            f"{errors['rows_left_out']} rows with unmoved tensors left out"
        )
    lines += ["", "TIES, single tensors of 10 times the sample or more:", ""]
    rows = [
        [
            f"{label}, {of['coordinates']} coordinates, {of['tensors']} tensors",
            depth,
            *(f"{v['rms']:.4f} / {v['max']:.4f}" for v in of[f"depth {depth}"].values()),
        ]
        for label, of in result["sampled_ties"].items()
        for depth in DEPTHS
    ]
    return "\n".join(lines + table_lines(["sample", "depth", "norm rms / max", "l2", "cosine"], rows))
