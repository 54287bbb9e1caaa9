"""What the signals say about operators, on a finished demo run: a table of signal x operator.

`python -m benchmarks.signals.signs RUN [--out docs]` writes OUT/figures/signals-operators.png and .json and prints the
Markdown tables.

A row of the data is an unordered pair of checkpoints. Its signals are the means over both parents' tasks and over both
orders (of the norm ratio the size, |log|). Its utility under an operator is pooled over both parents' tasks, in two
ways: `plain`, the mean; `normalised`, the mean of `(u - u(base)) / (best single checkpoint - u(base))` over those tasks
where that gap is at least 0.1 (a pair without one is left out). The *contrast* of an operator is its utility minus the
mean over all operators of the pair; a *difference* is one operator's utility minus another's.

A figure is Spearman's rank correlation over pairs of a signal with a contrast or a difference. Its 95 % interval is
that of resampled checkpoints: a pair weighs the product of how often its two were drawn. The p-value is the two-sided
share of resamples on the other side of zero; q is its Benjamini-Hochberg adjustment over all signals and operators of
one table. Leave-one-out is the range of the correlation when any one checkpoint is left out with its pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control

from benchmarks.signals.command import figure_command
from benchmarks.signals.probes import resampled, weighted_spearman
from simmerge_ray.base.markdown import table_lines, with_interval

RESAMPLES = 10_000
MIN_GAP = 0.1
LEVEL = 0.05
# Columns that are averaged into the value of an unordered pair.
SIGNALS: Mapping[str, tuple[str, ...]] = {
    "KL, prompt": ("kl_lr_mean", "kl_rl_mean"),
    "KL, greedy tokens": ("kl_greedy_lr_mean", "kl_greedy_rl_mean"),
    "activation cosine": ("activation_cosine_mean",),
    "attention cosine": ("attention_cosine_mean",),
    "weight cosine": ("weight_cosine_global",),
    "weight l2": ("weight_l2_global",),
    "task vector cosine": ("task_vector_cosine_global",),
    "task vector norm ratio": ("task_vector_norm_ratio_global",),
    "sign conflict": ("sign_conflict_global",),
    "trimmed overlap": ("trimmed_overlap_global",),
    "task vector norm": ("task_vector_norm_left", "task_vector_norm_right"),
    "entropy": ("entropy_left", "entropy_right"),
    "loss": ("loss_left", "loss_right"),
}
SHOWN = {"ties": "ties(density=0.5)"}  # the label of an arm leaves out defaults
DIFFERENCES = (
    ("nuslerp", "linear"),
    ("ties(density=0.1)", "linear"),
    ("ties", "linear"),
    ("ties(density=0.1)", "ties"),
)
# (signal, what, sign): what the paper says, as contrasts and as the differences that these come to.
CLAIMS = (
    ("KL, prompt", "nuslerp", 1, "high KL: SLERP up"),
    ("KL, prompt", "linear", -1, "high KL: Linear down"),
    ("KL, prompt", "nuslerp - linear", 1, "high KL: SLERP better than Linear"),
    ("weight cosine", "ties(density=0.1)", 1, "high weight cosine: TIES up (density 0.1)"),
    ("weight cosine", "ties", 1, "high weight cosine: TIES up (density 0.5)"),
    ("weight cosine", "linear", -1, "high weight cosine: Linear down"),
    ("weight cosine", "ties(density=0.1) - linear", 1, "high weight cosine: TIES (0.1) better than Linear"),
    ("weight cosine", "ties - linear", 1, "high weight cosine: TIES (0.5) better than Linear"),
)


@dataclass(frozen=True)
class Pairs:
    """P pairs: indices of their checkpoints (P, 2), signals (S, P), pooled utilities (K, P), NaN where undefined."""

    ids: tuple[str, ...]
    checkpoints: np.ndarray
    signals: np.ndarray
    arms: tuple[str, ...]
    utilities: Mapping[str, np.ndarray]


def normalised_utility(utility: float, base: float, best: float) -> float | None:
    """Share of the way from the base to the best single checkpoint; None where that is shorter than MIN_GAP."""
    return (utility - base) / (best - base) if best - base >= MIN_GAP else None


def load_pairs(root: Path) -> tuple[Pairs, dict[str, Any]]:
    from simmerge_ray.base.runs import RunLayout
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.probes import load_probe_sets
    from simmerge_ray.search.labels import LabelStore, pair_contexts, single_items
    from simmerge_ray.selector.data.dataset import check_same_checkpoints, common_arms
    from simmerge_ray.signals.compute import compute_signals

    layout = RunLayout(root)
    table = compute_signals(load_catalogue(layout.catalogue), load_probe_sets(layout.probes))
    labels = LabelStore(layout.labels).read()
    check_same_checkpoints(table, labels)
    arms = common_arms(labels)
    singles = {key: float(items.mean()) for key, items in single_items(labels).items()}
    base = {task: singles[table.provenance["base"], task] for task in table.tasks}
    best = {task: max(value for (_, other), value in singles.items() if other == task) for task in table.tasks}
    by_pair: dict[tuple[str, str], dict[str, Any]] = {}
    for context in pair_contexts(labels, arms):
        by_pair.setdefault((context.left, context.right), {})[context.task] = context
    ids = table.checkpoint_ids
    rows, signals, plain, normalised = [], [], [], []
    for (left, right), contexts in sorted(by_pair.items()):
        tasks = table.pair_tasks(left, right)
        if set(tasks) <= set(contexts):
            rows.append((ids.index(left), ids.index(right)))
            features = [table.get(left, right, task).features for task in tasks]
            values = {c: float(np.mean([one[c] for one in features])) for columns in SIGNALS.values() for c in columns}
            values["task_vector_norm_ratio_global"] = abs(values["task_vector_norm_ratio_global"])
            signals.append([np.mean([values[column] for column in columns]) for columns in SIGNALS.values()])
            utilities = {task: [float(contexts[task].arms[arm].mean()) for arm in arms] for task in tasks}
            plain.append(np.mean(list(utilities.values()), axis=0))
            scaled = [
                [normalised_utility(value, base[task], best[task]) for value in utilities[task]]
                for task in tasks
                if best[task] - base[task] >= MIN_GAP
            ]
            normalised.append(np.mean(scaled, axis=0) if scaled else np.full(len(arms), np.nan))
    about = {
        "num_checkpoints": len(ids),
        "num_pairs": len(rows),
        "tasks": {task: {"base": base[task], "best": best[task]} for task in table.tasks},
        "num_items": min(len(items) for items in single_items(labels).values()),
        "resamples": RESAMPLES,
    }
    pooled = {"plain": np.array(plain).T, "normalised": np.array(normalised).T}
    return Pairs(ids, np.array(rows), np.array(signals).T, arms, pooled), about


def correlations(
    signals: np.ndarray, targets: np.ndarray, checkpoints: np.ndarray, drawn: np.ndarray
) -> dict[str, np.ndarray]:
    """Spearman of every signal (S, P) with every target (K, P).

    Args:
        checkpoints: (P, 2) indices of the pairs' checkpoints. drawn: (M, 1 + B), from `resampled`.

    Returns:
        rho, low and high of the interval, p, q, and the range when one checkpoint is left out; each (S, K).
    """
    drawn = np.concatenate([1 - np.eye(len(drawn)), drawn], axis=1)
    weights = drawn[checkpoints[:, 0]] * drawn[checkpoints[:, 1]]
    rho = np.stack([weighted_spearman(signal, targets, weights) for signal in signals])  # (S, K, M + 1 + B)
    without, whole, resamples = np.split(rho, [len(drawn), len(drawn) + 1], axis=-1)
    low, high = np.nanquantile(resamples, [0.025, 0.975], axis=-1)
    below, above = (1 + (resamples <= 0).sum(-1), 1 + (resamples >= 0).sum(-1))
    p_values = np.minimum(1.0, 2 * np.minimum(below, above) / (1 + np.isfinite(resamples).sum(-1)))
    return {
        "rho": whole[..., 0],
        "low": low,
        "high": high,
        "p": p_values,
        "q": false_discovery_control(p_values, axis=None).reshape(p_values.shape),
        "least_without_one": np.nanmin(without, axis=-1),
        "most_without_one": np.nanmax(without, axis=-1),
    }


def measure(root: Path, seed: int) -> dict[str, Any]:
    pairs, about = load_pairs(root)
    drawn = resampled(len(pairs.ids), RESAMPLES, seed)
    contrasts = list(pairs.arms)
    differences = [f"{a} - {b}" for a, b in DIFFERENCES]
    tables: dict[str, Any] = {}
    for pooling, utilities in pairs.utilities.items():
        known = np.isfinite(utilities).all(0)
        values = utilities[:, known]
        by_arm = dict(zip(pairs.arms, values, strict=True))
        groups = {
            "contrasts": (contrasts, values - values.mean(0)),
            "differences": (differences, np.array([by_arm[a] - by_arm[b] for a, b in DIFFERENCES])),
        }
        tables[pooling] = {
            "num_pairs": int(known.sum()),
            "mean_utility": {a: float(v.mean()) for a, v in by_arm.items()},
        }
        for name, (columns, targets) in groups.items():
            found = correlations(pairs.signals[:, known], targets, pairs.checkpoints[known], drawn)
            tables[pooling][name] = {"columns": columns} | {
                key: value.round(4).tolist() for key, value in found.items()
            }
    between = weighted_spearman(pairs.signals[:, None], pairs.signals[None], np.ones((len(pairs.checkpoints), 1)))
    about |= {"seed": seed, "arms": list(pairs.arms), "signals": list(SIGNALS)}
    return {"about": about, "tables": tables, "between_signals": between[..., 0].round(4).tolist()}


def figures_of(table: Mapping[str, Any], signal: str, column: str) -> dict[str, float]:
    """What `correlations` found of one signal with one contrast or difference."""
    for name in ("contrasts", "differences"):
        if column in table[name]["columns"]:
            row, place = list(SIGNALS).index(signal), table[name]["columns"].index(column)
            return {key: values[row][place] for key, values in table[name].items() if key != "columns"}
    raise ValueError(f"unknown column {column!r}")


def verdict(found: Mapping[str, float], sign: int) -> str:
    """Whether a claimed sign holds, is contradicted, or is undecided."""
    if mark(found) != "**":
        return "undecided"
    return "holds" if found["rho"] * sign > 0 else "contradicted"


def mark(found: Mapping[str, float]) -> str:
    """`*` interval without zero, `**` also after the correction for the number of tests."""
    if found["low"] <= 0 <= found["high"]:
        return ""
    return "**" if found["q"] <= LEVEL else "*"


def cell(found: Mapping[str, float]) -> str:
    stars = mark(found).replace("*", chr(92) + "*")
    return f"{with_interval(found['rho'], (found['low'], found['high']), signed=True, digits=2)}{stars}"


def renamed(column: str) -> str:
    return " - ".join(SHOWN.get(part, part) for part in column.split(" - "))


def lines(results: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for pooling, table in results["tables"].items():
        for name in ("contrasts", "differences"):
            columns = table[name]["columns"]
            rows = [[s, *(cell(figures_of(table, s, column)) for column in columns)] for s in SIGNALS]
            found += [f"**{pooling}, {name}, {table['num_pairs']} pairs**", ""]
            found += table_lines(["signal", *map(renamed, columns)], rows)
    rows = []
    for signal, column, sign, text in CLAIMS:
        row: list[Any] = [text]
        for table in results["tables"].values():
            one = figures_of(table, signal, column)
            without = f"{one['least_without_one']:+.2f} ... {one['most_without_one']:+.2f}"
            row += [cell(one), without, f"{one['q']:.2f}", verdict(one, sign)]
        rows.append(row)
    parts = ("", ": leave-one-out", ": q", ": verdict")
    header = ["claim", *(f"{name}{part}" for name in results["tables"] for part in parts)]
    return [*found, *table_lines(header, rows)]


def draw(results: Mapping[str, Any], directory: Path) -> Path:
    from simmerge_ray.reports.figures import new_figure, save_figure

    tables = results["tables"]
    figure, axes = new_figure(11.5, 6.4, columns=2)
    figure.set_layout_engine("constrained")
    for index, (axis, (pooling, table)) in enumerate(zip(axes.flat, tables.items(), strict=True)):
        part = table["contrasts"]
        rho = np.array(part["rho"])
        image = axis.imshow(rho, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(rho):
            one = figures_of(table, list(SIGNALS)[row], part["columns"][column])
            text = f"{value:+.2f}{mark(one)}\n[{one['low']:+.2f}, {one['high']:+.2f}]"
            colour = "white" if abs(value) > 0.65 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour, linespacing=1.1)
        names = [renamed(column).replace("(density=", "\ndensity ").rstrip(")") for column in part["columns"]]
        axis.set_xticks(range(len(names)), names, fontsize=9)
        axis.set_yticks(range(len(SIGNALS)), SIGNALS if index == 0 else [""] * len(SIGNALS), fontsize=9)
        axis.tick_params(length=0)
        axis.set_title(f"utility {pooling} ({table['num_pairs']} pairs)", fontsize=10.5)
    bar = figure.colorbar(image, ax=list(axes.flat), shrink=0.7, aspect=30)
    bar.set_label("rank correlation of the signal with the operator's contrast", fontsize=9)
    note = f"[ ] 95 % interval over checkpoints   * without zero   ** also after Benjamini-Hochberg at {LEVEL:g}"
    figure.supxlabel(note, fontsize=9)
    return save_figure(figure, directory, "signals-operators.png")


if __name__ == "__main__":
    figure_command(__doc__, "signals-operators.json", measure, lines, draw)
