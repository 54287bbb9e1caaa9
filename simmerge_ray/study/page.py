"""The pages of the study's longer parts: tables in Markdown and the figure of what evaluations buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simmerge_ray.figures import legend_below, new_figure, save_figure
from simmerge_ray.report import table_lines

_PROPAGATORS = ("bound", "second_order", "virtual", "exact")


def longer_lines(longer: Mapping[str, Any]) -> list[str]:
    """Plans of three and more: every policy beside the predicted plan, ranks, and aggregates."""
    lines = []
    for name, rows in sorted(longer["tables"].items(), key=lambda item: _order(item[0])):
        lines += ["", f"**{name}** ({max(row['num_groups'] for row in rows)} groups)", ""]
        lines += table_lines(
            ("policy", "pooled utility", "predicted plan ahead by", "expert degradation %", "auxiliary gain %"),
            [
                (
                    row["policy"],
                    f"{row['pooled']:.3f}",
                    "" if row["policy"] == "predicted" else _signed(row["difference"], row["interval"]),
                    f"{row['degradation']:+.1f}",
                    f"{row['auxiliary_gain']:+.1f}",
                )
                for row in rows
            ],
        )
    taus = [
        (name, size, _signed(row["tau"], row["interval"]), row["num_groups"])
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
    return [*lines, "", f"Share of the gain of a selector that was trained there: {said}."]


def later_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """An operator that came later."""
    return table_lines(
        ("labels", "GapClosed", "gain in points", "chosen"),
        [
            (
                row["num_labels"],
                f"{row['gap_closed']:.3f}",
                _points(row["gain"], row["gain_interval"]),
                f"{100 * row['chosen']:.0f} %",
            )
            for row in rows
        ],
    )


def budget_lines(found: Mapping[str, Any], directory: Path) -> list[str]:
    """What evaluations buy, with its figure, and when labels have paid."""
    rows = found["rows"]
    figure, axes = new_figure(6, 4)
    axis = axes if not hasattr(axes, "ravel") else axes.ravel()[0]
    for strategy, marker in (("predicted", "o"), ("random", "s"), ("few items", "^")):
        some = [row for row in rows if row["strategy"] == strategy]
        x, y = [row["evaluations"] for row in some], [row["utility"] for row in some]
        low = [row["utility"] - row["interval"][0] for row in some]
        high = [row["interval"][1] - row["utility"] for row in some]
        axis.errorbar(x, y, yerr=[low, high], marker=marker, capsize=3, label=strategy)
        for row in some:
            if row["items"]:
                where, offset = (row["evaluations"], row["utility"]), (8, -4)
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
            f"with none. An evaluation took {costs['evaluation']:.1f} s, all labels {costs['labels'] / 3600:.1f} h: "
            f"they have paid after {even['merges']} merges."
        )
    return [f"![Utility of what is chosen, against evaluations]({path.name})", "", said]


def _order(name: str) -> tuple[int, str]:
    propagator = name.split(",")[0]
    return (_PROPAGATORS.index(propagator) if propagator in _PROPAGATORS else len(_PROPAGATORS), name)


def _points(value: float, interval: Sequence[float]) -> str:
    return _signed(100 * value, [100 * end for end in interval], 1)


def _signed(value: float, interval: Sequence[float], digits: int = 3) -> str:
    low, high = interval
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
