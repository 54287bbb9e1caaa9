"""All figures as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.finding.choices import EVALUATIONS
from benchmarks.finding.rows import MAIN, Figures, all_rows
from benchmarks.measuring import markdown


def value_text(value: Any) -> str:
    """A mean with its interval, a table of means, or a list, three decimals."""
    if isinstance(value, Mapping) and "interval" in value:
        low, high = value["interval"]
        return f"{value['mean']:.3f} [{low:.3f}, {high:.3f}], {value['pairs']} pairs"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value_text(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(value_text(one) for one in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _grid_table(figures: Figures) -> str:
    rows = [[name, value_text(value)] for name, value in figures["grid"]["utility"].items()]
    return markdown(["of the fixed 48 candidates, chosen by", "utility"], rows)


def _signal_table(figures: Figures) -> str:
    sources = {"probed": figures["grid"], **figures.get("virtual", {})}
    rows = []
    for kind, found in sources.items():
        for name, value in found["spearman_over_candidates_and_tasks"].items():
            within = found["spearman_within_a_pair"][name]
            rows.append([kind, name, value_text(value), value_text(within)])
    return markdown(["price", "signal", "Spearman, all candidates and tasks", "Spearman within a pair, mean"], rows)


def _curve_table(figures: Figures) -> str:
    curves: dict[str, dict[float, float]] = {}
    for name, by_pair in figures.get("samplers", {}).items():
        budgets = next(iter(by_pair.values()))["budgets"]
        for kind, text in (("best", ""), ("with_kept", ", parents and base measured too")):
            means = np.mean([one[kind] for one in by_pair.values()], axis=0)
            curves[name + text] = dict(zip(map(int, budgets), means.tolist(), strict=True))
    if MAIN in figures:
        means = np.mean([one["curve"] for one in figures[MAIN].values()], axis=0)
        curves["label-free"] = dict(zip(EVALUATIONS, means.tolist(), strict=True))
    counts = sorted({count for curve in curves.values() for count in curve})
    rows = [[name, *(f"{curve[n]:.3f}" if n in curve else "" for n in counts)] for name, curve in curves.items()]
    return markdown(["evaluations", *map(str, counts)], rows)


def written_report(figures: Figures) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """(Markdown, rows as JSON) of the parts that have been run."""
    groups = all_rows(figures)
    parts = []
    for name, rows in groups.items():
        verdicts = {True: "met", False: "**missed**", None: ""}
        cells = [[one["what"], value_text(one["figure"]), one["target"], verdicts[one["met"]]] for one in rows]
        parts.append(f"### {name}\n\n{markdown(['what', 'figure', 'target', ''], cells)}")
    if "grid" in figures:
        parts.append(f"### Choosers among a fixed grid\n\n{_grid_table(figures)}\n\n{_signal_table(figures)}")
    if "samplers" in figures or MAIN in figures:
        parts.append(f"### Utility against evaluations\n\n{_curve_table(figures)}")
    if "check" in figures:
        parts.append(f"Teacher-forced against generated: {value_text(figures['check'])}.")
    return "\n\n".join(parts), groups
