"""The report of `benchmarks.signals.propagation`: tables as Markdown, and predicted against exact KL as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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


def draw(rows: Rows, path: Path) -> None:
    """Predicted against exact KL, one panel for each depth and propagator."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(DEPTHS), len(PREDICTED), figsize=(12, 9), sharex=True, sharey=True)
    values = [row["features"]["exact"]["kl_lr_mean"] for row in rows]
    low, high = min(values) / 1.5, max(values) * 1.5
    for i, depth in enumerate(DEPTHS):
        for j, name in enumerate(PREDICTED):
            panel = axes[i, j]
            panel.plot([low, high], [low, high], color="black", linewidth=0.8)
            for operator in OPERATORS:
                chosen = [row for row in rows if row["depth"] == depth and row["operator"] == operator]
                x, y = ([row["features"][which]["kl_lr_mean"] for row in chosen] for which in ("exact", name))
                panel.scatter(x, np.maximum(y, low), s=5, alpha=0.5, linewidths=0, label=operator)
            panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
            panel.grid(color="0.9", linewidth=0.5)
            if i == 0:
                panel.set_title(name)
            if j == 0:
                panel.set_ylabel(f"depth {depth}: predicted")
            if i == len(DEPTHS) - 1:
                panel.set_xlabel("exact")
    axes[0, 0].legend(fontsize=8, markerscale=2)
    figure.suptitle("KL(intermediate || checkpoint), mean over prompt tokens, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def with_interval(value: float, bounds: Sequence[float], digits: int) -> str:
    return f"{value:.{digits}f} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def find(entries: list[dict[str, Any]], *key: str | int) -> dict[str, Any]:
    return next(e for e in entries if (e["operator"], e["depth"], e["propagator"], e["signal"]) == key)


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Propagated signals against `exact`", "", result["about"], ""]
    lines += ["Rounded intermediates, relative RMSE: "]
    lines += [", ".join(f"{signal} {value:.2g}" for signal, value in result["cast_to_bfloat16"].items()) + ".", ""]
    lines += ["Seconds a plan and task (median, 4 steps): "]
    lines += [
        "; ".join(
            f"{operator} " + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
            for operator, seconds in result["seconds"].items()
        ),
        "",
    ]
    lines += ["## Targets: KL at depth 1 and 2, relative RMSE <= .06, tau >= .88 (ties .83)", ""]
    lines += [
        "| operator | depth | " + " | ".join(f"{name} RMSE | {name} tau" for name in ("virtual", "curved")) + " |"
    ]
    lines += ["|---" * 6 + "|"]
    for operator in OPERATORS:
        for depth in DEPTHS[:2]:
            cells = []
            for name in ("virtual", "curved"):
                entry = find(result["summary"], operator, depth, name, "KL mean")
                low = entry["relative_rmse"] <= 0.06
                high = entry["tau"] >= (0.83 if operator == "ties" else 0.88)
                cells += [f"{entry['relative_rmse']:.3f} {'met' if low else 'missed'}"]
                cells += [f"{entry['tau']:.3f} {'met' if high else 'missed'}"]
            lines.append(f"| {operator} | {depth} | " + " | ".join(cells) + " |")
    lines += ["", "## KL: relative RMSE of `virtual` less that of `curved`, paired over resampled models", ""]
    lines += ["| operator | depth | gain | median relative error, virtual / curved |", "|---|---|---|---|"]
    for entry in result["gain"]:
        gain = with_interval(entry["gain"], entry["interval"], 3)
        medians = " / ".join(f"{value:.3f}" for value in entry["median"])
        lines.append(f"| {entry['operator']} | {entry['depth']} | {gain} | {medians} |")
    lines.append("")
    for signal in SIGNALS:
        lines += [f"## {signal}", "", "| operator | depth | " + " | ".join(PREDICTED) + " |"]
        lines += ["|---" * (len(PREDICTED) + 2) + "|"]
        for operator in OPERATORS:
            for depth in DEPTHS:
                cells = []
                for name in PREDICTED:
                    entry = find(result["summary"], operator, depth, name, signal)
                    digits = 3 if entry["relative_rmse"] >= 0.001 else 6
                    rmse = with_interval(entry["relative_rmse"], entry["relative_rmse_interval"], digits)
                    cells.append(f"{rmse}; tau {with_interval(entry['tau'], entry['tau_interval'], 2)}")
                lines.append(f"| {operator} | {depth} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "## Weights of `virtual`",
        "",
        "Largest error over all plans and depths (cosines absolute, else relative):",
        "",
    ]
    for operator, errors in result["weights"].items():
        worst = errors["worst"]
        column = max(worst, key=lambda name: worst[name])
        groups = max(worst[f"{signal}_global"] for signal in ("weight_cosine", "weight_l2", "task_vector_cosine"))
        lines.append(
            f"- {operator}: global {groups:.2g}; any column {worst[column]:.2g} ({column}); "
            f"{errors['rows_left_out']} rows with unmoved tensors left out"
        )
    lines += [
        "",
        "TIES, single tensors of 10 times the sample or more:",
        "",
        "| sample | depth | norm rms / max | l2 | cosine |",
    ]
    lines.append("|---|---|---|---|---|")
    for label, found in result["sampled_ties"].items():
        for depth in DEPTHS:
            cells = [f"{v['rms']:.4f} / {v['max']:.4f}" for v in found[f"depth {depth}"].values()]
            lines.append(f"| {label}, {found['coordinates']} coordinates, {found['tensors']} tensors | {depth} | ")
            lines[-1] += " | ".join(cells) + " |"
    return "\n".join(lines) + "\n"
