"""The page of the study's results: tables in Markdown and figures, from the JSON of its sections alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.markdown import percent, table_lines, with_interval
from simmerge_ray.base.storage import write_atomically
from simmerge_ray.reports.figures import legend_below, new_figure, save_figure
from simmerge_ray.research.study.headline import CLAIMED_GAIN, MARGIN

_PROPAGATORS = ("bound", "second_order", "virtual", "exact")
_SHOWN = "virtual"  # the propagator of which every size and weighting has a table; of the others only all together


def write_results(found: Mapping[str, Any], directory: Path) -> Path:
    """Write `results.md` and its figures; the path of the former. Sections without figures say why."""
    sections: Mapping[str, tuple[str, Callable[[Any], list[str]]]] = {
        "counts": ("What was labelled", counts_lines),
        "primary": ("Primary test: unseen model and unseen base", lambda one: primary_lines(one, directory)),
        "longer": ("Plans of three and more", longer_lines),
        "exact": ("The same on a sample with exact features", longer_lines),
        "subsets": ("Which checkpoints to merge: a catalogue of six, every subset labelled", subset_lines),
        "transfer": ("The larger base", transfer_lines),
        "probes": ("Fewer probes, and probes of another domain", probe_lines),
        "later": ("An operator that came later", later_lines),
        "evaluations": ("What evaluations buy", lambda one: budget_lines(one, directory)),
    }
    lines = ["# Results of the study", "", "Made by `jobs/study.py --stage analysis`. Utilities are exact matches.", ""]
    for name, content in found.items():
        title, write = sections[name]
        missing = isinstance(content, Mapping) and "reason" in content
        lines += [f"## {title}", "", *([f"Not measured: {content['reason']}."] if missing else write(content)), ""]
    write_atomically(directory / "results.md", "\n".join(lines).encode())
    return directory / "results.md"


def counts_lines(found: Mapping[str, Any]) -> list[str]:
    """Checkpoints, merges by size and machine hours of every base."""
    rows = found["rows"]
    sizes = sorted({size for row in rows for size in row["merges"]}, key=int)
    header = ("base", "checkpoints", *(f"{size}-way" for size in sizes), "labels", "hours")
    counts = [[row["checkpoints"], *(row["merges"].get(size, 0) for size in sizes), row["labels"]] for row in rows]
    hours = [row["seconds"] / 3600 for row in rows]
    table = [(row["base"], *of, f"{one:.2f}") for row, of, one in zip(rows, counts, hours, strict=True)]
    return table_lines(header, [*table, ("all", *map(sum, zip(*counts, strict=True)), f"{sum(hours):.2f}")])


def primary_lines(found: Mapping[str, Any], directory: Path) -> list[str]:
    """The verdict, then each base and each domain."""
    asked = f"at least {100 * CLAIMED_GAIN:.0f} points with the whole interval above 0"
    verdict = "**The claim holds**" if found["claimed"] else "**The claim is not earned**"
    by_base, oracle = found["by_base"], found["oracle"]
    share = "" if oracle["share"] is None else f", {percent(oracle['share'])} of it"
    lines = [
        f"{verdict} ({asked}): the selector gains {_points(found['gain'], found['interval'])} points of GapClosed over "
        f"the best fixed arm ({', '.join(found['best_fixed'])}), one arm per merge, {found['num_merges']} merges, "
        f"{found['num_defined']} contexts with GapClosed. A split-half oracle gains "
        f"{100 * oracle['gain']:+.1f} points{share}.",
        "",
        f"By bases alone (Student's t over {len(by_base['gains'])} bases): "
        f"{_points(by_base['mean'], by_base['interval'])}.",
        "",
    ]
    lines += table_lines(("base", "gain in points"), [(b, f"{100 * g:+.1f}") for b, g in by_base["gains"].items()])
    lines += ["", f"Not worse by {100 * MARGIN:.0f} points or more, by domain (Holm over the domains):", ""]
    domains = []
    for task, one in found["domains"].items():
        shown = "yes" if one["non_inferior"] else "not shown"
        domains.append((task, _points(one["gain"], one["interval"]), one["num_defined"], f"{one['p']:.4f}", shown))
    lines += table_lines(("domain", "gain in points", "contexts", "p", "non-inferior"), domains)
    figure, axes = new_figure(6, 3.2)
    axis, names = axes[0][0], sorted(by_base["gains"], key=lambda name: (len(name), name))  # s2 before s10
    axis.bar(range(len(names)), [100 * by_base["gains"][name] for name in names], color="0.6")
    low, high = (100 * end for end in found["interval"])
    axis.axhspan(low, high, color="tab:blue", alpha=0.15, label="95 % interval of the mean")
    axis.axhline(100 * found["gain"], c="tab:blue", lw=1.2, label="all bases")
    axis.axhline(0, c="black", lw=0.6)
    axis.set_xticks(range(len(names)), [name.removesuffix("-base") for name in names], fontsize=8)
    axis.set_ylabel("gain over best fixed, points")
    legend_below(axis)
    path = save_figure(figure, directory, "study-gain.png")
    return [*lines, "", f"![Gain of the selector by base that was left out]({path.name})"]


def probe_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The primary test with other probes."""
    gains = [(row["probes"], _points(row["gain"], row["interval"])) for row in rows]
    return table_lines(("probes of each task", "gain in points"), gains)


def longer_lines(longer: Mapping[str, Any]) -> list[str]:
    """Plans of three and more: every policy beside the predicted plan, ranks, and aggregates."""
    lines = []
    header = ("policy", "pooled utility", "predicted plan ahead by", "expert degradation %", "auxiliary gain %")
    tables = {name: rows for name, rows in longer["tables"].items() if name.startswith(_SHOWN) or "all, both" in name}
    for name, rows in sorted(tables.items(), key=lambda item: _order(item[0])):
        table = []
        for row in rows:
            ahead = with_interval(row["difference"], row["interval"], signed=True)
            of_sums = (f"{row[what]:+.1f}" for what in ("degradation", "auxiliary_gain"))
            table.append((row["policy"], row["pooled"], "" if row["policy"] == "predicted" else ahead, *of_sums))
        lines += ["", f"**{name}** ({max(row['num_groups'] for row in rows)} groups)", "", *table_lines(header, table)]
    taus = [
        (name, size, with_interval(row["tau"], row["interval"], signed=True), row["num_groups"])
        for name, sizes in longer["tau"].items()
        for size, row in sizes.items()
    ]
    lines += ["", "Kendall's tau of predicted and measured, within a subset and weighting:", ""]
    lines += table_lines(("propagator", "checkpoints", "tau", "groups"), taus)
    lines += ["", "Pooled utility of the predicted plan, by what is predicted (`last` is what was planned):", ""]
    columns = ("last", "mean", "sum")
    rows = [(name, *(of[column] for column in columns)) for name, of in longer["aggregates"].items()]
    return lines + table_lines(("propagator", *columns), rows)


def subset_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Regret of the choice of a subset, by size and policy."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    regret = {(row["size"], row["policy"]): row["regret"] for row in rows}
    return table_lines(
        ("policy", *(f"{size} checkpoints" if size != "any" else "any number" for size in sizes)),
        [(policy, *(regret[size, policy] for size in sizes)) for policy in policies],
    )


def transfer_lines(found: Mapping[str, Any]) -> list[str]:
    """The larger base."""
    lines = table_lines(("policy", "GapClosed"), list(found["gap_closed"].items()))
    gains = [(name, _points(one["gain"], one["interval"])) for name, one in found["gains"].items()]
    lines += ["", *table_lines(("difference", "gain in points"), gains)]
    nothing = "has no meaning: a selector that was trained there gains nothing"
    said = nothing if found["share"] is None else percent(found["share"])
    return [
        *lines,
        "",
        f"Share of the gain of a selector that was trained there: {said}. {found['num_defined']} of "
        f"{found['num_merges']} merges have a gap; {percent(found['unlike'])} are unlike the small bases' merges.",
    ]


def later_lines(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Operators that came later."""
    lines: list[str] = []
    for arm, rows in found.items():
        gains = [_points(row["gain"], row["gain_interval"]) for row in rows]
        shown = [
            (row["num_labels"], row["gap_closed"], gain, percent(row["chosen"]))
            for row, gain in zip(rows, gains, strict=True)
        ]
        lines += ["", f"**{arm}**", "", *table_lines(("labels", "GapClosed", "gain in points", "chosen"), shown)]
    return lines[1:]


def budget_lines(found: Mapping[str, Any], directory: Path) -> list[str]:
    """What evaluations buy, with its figure, and when labels have paid."""
    rows = found["rows"]
    figure, axes = new_figure(6, 4)
    axis = axes[0][0]
    markers = (("predicted", "o"), ("random", "s"), ("Optuna", "d"), ("few items", "^"))
    for place, (strategy, marker) in enumerate(markers):
        some = [row for row in rows if row["strategy"] == strategy]
        # Side by side, since intervals of the same number of evaluations would hide each other.
        x, y = [row["evaluations"] + 0.04 * (place - 1) for row in some], [row["utility"] for row in some]
        ends = np.abs(np.array([row["interval"] for row in some]).reshape(-1, 2).T - y)
        axis.errorbar(x, y, yerr=ends, marker=marker, capsize=3, label=strategy)
        for row, *where in zip(some, x, y, strict=True):
            if row["items"]:
                axis.annotate(f"{row['items']} items", where, (8, -4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("evaluations of a merge (full ones)")
    axis.set_ylabel("utility of what is chosen")
    legend_below(axis)
    path = save_figure(figure, directory, "study-evaluations.png")
    even, costs = found["break_even"], found["costs"]
    if even["merges"] is None:
        said = (
            "Random search is as good as the first prediction with no number of evaluations that saves anything: the "
            "labels never pay for themselves by evaluations saved."
        )
    else:
        said = (
            f"Random search needs {even['random_evaluations']:g} evaluations to be as good as the first prediction "
            f"with none. An evaluation took {costs['evaluation']:.1f} s, the signals of a catalogue "
            f"{costs['signals']:.2f} s for each of its pairs, all labels {costs['labels'] / 3600:.1f} h: they have "
            f"paid after {even['merges']} merges."
        )
    return [f"![Utility of what is chosen, against evaluations]({path.name})", "", said]


def _order(name: str) -> tuple[int, str]:
    order = {propagator: place for place, propagator in enumerate(_PROPAGATORS)}
    return order.get(name.split(",")[0], len(order)), name


def _points(value: float, interval: Sequence[float]) -> str:
    return with_interval(100 * value, [100 * end for end in interval], signed=True, digits=1)
