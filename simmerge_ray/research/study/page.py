"""The page of the study's results: tables in Markdown and figures, from the JSON of its sections alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simmerge_ray.base.markdown import table_lines, with_interval
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
    table = [
        (
            row["base"],
            row["checkpoints"],
            *(row["merges"].get(size, 0) for size in sizes),
            row["labels"],
            f"{row['seconds'] / 3600:.2f}",
        )
        for row in rows
    ]
    sums = [sum(int(row[column]) for row in table) for column in range(1, len(header) - 1)]
    hours = f"{sum(row['seconds'] for row in rows) / 3600:.2f}"
    return table_lines(header, [*table, ("all", *sums, hours)])


def primary_lines(found: Mapping[str, Any], directory: Path) -> list[str]:
    """The verdict, then each base and each domain."""
    asked = f"at least {100 * CLAIMED_GAIN:.0f} points with the whole interval above 0"
    verdict = "**The claim holds**" if found["claimed"] else "**The claim is not earned**"
    by_base, oracle = found["by_base"], found["oracle"]
    share = "" if oracle["share"] is None else f", {100 * oracle['share']:.0f} % of it"
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
    lines += table_lines(
        ("domain", "gain in points", "contexts", "p", "non-inferior"),
        [
            (
                task,
                _points(one["gain"], one["interval"]),
                one["num_defined"],
                f"{one['p']:.4f}",
                "yes" if one["non_inferior"] else "not shown",
            )
            for task, one in found["domains"].items()
        ],
    )
    figure, axes = new_figure(6, 3.2)
    axis, names = axes[0][0], sorted(by_base["gains"], key=lambda name: (len(name), name))  # s2 before s10
    gains = {name.removesuffix("-base"): by_base["gains"][name] for name in names}
    axis.bar(range(len(gains)), [100 * gain for gain in gains.values()], color="0.6")
    low, high = (100 * end for end in found["interval"])
    axis.axhspan(low, high, color="tab:blue", alpha=0.15, label="95 % interval of the mean")
    axis.axhline(100 * found["gain"], c="tab:blue", lw=1.2, label="all bases")
    axis.axhline(0, c="black", lw=0.6)
    axis.set_xticks(range(len(gains)), list(gains), fontsize=8)
    axis.set_ylabel("gain over best fixed, points")
    legend_below(axis)
    path = save_figure(figure, directory, "study-gain.png")
    return [*lines, "", f"![Gain of the selector by base that was left out]({path.name})"]


def probe_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The primary test with other probes."""
    return table_lines(
        ("probes of each task", "gain in points"),
        [(row["probes"], _points(row["gain"], row["interval"])) for row in rows],
    )


def longer_lines(longer: Mapping[str, Any]) -> list[str]:
    """Plans of three and more: every policy beside the predicted plan, ranks, and aggregates."""
    lines = []
    tables = {name: rows for name, rows in longer["tables"].items() if name.startswith(_SHOWN) or "all, both" in name}
    for name, rows in sorted(tables.items(), key=lambda item: _order(item[0])):
        lines += ["", f"**{name}** ({max(row['num_groups'] for row in rows)} groups)", ""]
        lines += table_lines(
            ("policy", "pooled utility", "predicted plan ahead by", "expert degradation %", "auxiliary gain %"),
            [
                (
                    row["policy"],
                    f"{row['pooled']:.3f}",
                    _lead(row),
                    f"{row['degradation']:+.1f}",
                    f"{row['auxiliary_gain']:+.1f}",
                )
                for row in rows
            ],
        )
    taus = [
        (name, size, with_interval(row["tau"], row["interval"], signed=True), row["num_groups"])
        for name, sizes in longer["tau"].items()
        for size, row in sizes.items()
    ]
    lines += ["", "Kendall's tau of predicted and measured, within a subset and weighting:", ""]
    lines += table_lines(("propagator", "checkpoints", "tau", "groups"), taus)
    aggregates = longer["aggregates"]
    lines += ["", "Pooled utility of the predicted plan, by what is predicted (`last` is what was planned):", ""]
    columns = ("last", "mean", "sum")
    rows = [(name, *(f"{values[column]:.3f}" for column in columns)) for name, values in aggregates.items()]
    return lines + table_lines(("propagator", *columns), rows)


def subset_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Regret of the choice of a subset, by size and policy."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    regret = {(row["size"], row["policy"]): row["regret"] for row in rows}
    return table_lines(
        ("policy", *(f"{size} checkpoints" if size != "any" else "any number" for size in sizes)),
        [(policy, *(f"{regret[size, policy]:.3f}" for size in sizes)) for policy in policies],
    )


def transfer_lines(found: Mapping[str, Any]) -> list[str]:
    """The larger base."""
    lines = table_lines(
        ("policy", "GapClosed"), [(name, f"{value:.3f}") for name, value in found["gap_closed"].items()]
    )
    gains = [(name, _points(one["gain"], one["interval"])) for name, one in found["gains"].items()]
    lines += ["", *table_lines(("difference", "gain in points"), gains)]
    share = found["share"]
    said = (
        "has no meaning: a selector that was trained there gains nothing" if share is None else f"{100 * share:.0f} %"
    )
    return [
        *lines,
        "",
        f"Share of the gain of a selector that was trained there: {said}. {found['num_defined']} of "
        f"{found['num_merges']} merges have a gap; {100 * found['unlike']:.0f} % are unlike the small bases' merges.",
    ]


def later_lines(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Operators that came later."""
    lines: list[str] = []
    for arm, rows in found.items():
        shown = [
            (
                row["num_labels"],
                f"{row['gap_closed']:.3f}",
                _points(row["gain"], row["gain_interval"]),
                f"{100 * row['chosen']:.0f} %",
            )
            for row in rows
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
        low = [row["utility"] - row["interval"][0] for row in some]
        high = [row["interval"][1] - row["utility"] for row in some]
        axis.errorbar(x, y, yerr=[low, high], marker=marker, capsize=3, label=strategy)
        for row in some:
            if row["items"]:
                where, offset = (row["evaluations"] + 0.04 * (place - 1), row["utility"]), (8, -4)
                axis.annotate(f"{row['items']} items", where, offset, textcoords="offset points", fontsize=8)
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


def _lead(row: Mapping[str, Any]) -> str:
    if row["policy"] == "predicted":
        return ""
    return with_interval(row["difference"], row["interval"], signed=True)


def _order(name: str) -> tuple[int, str]:
    propagator = name.split(",")[0]
    return (_PROPAGATORS.index(propagator) if propagator in _PROPAGATORS else len(_PROPAGATORS), name)


def _points(value: float, interval: Sequence[float]) -> str:
    return with_interval(100 * value, [100 * end for end in interval], signed=True, digits=1)
