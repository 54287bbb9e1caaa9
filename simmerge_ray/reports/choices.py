"""The part of a run's report on ways of choosing a merge, and what each is worth over all pairs with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simmerge_ray.base.markdown import number, with_interval
from simmerge_ray.base.storage import Place
from simmerge_ray.reports.figures import new_figure, save_figure, title_above
from simmerge_ray.reports.page import table_block


def choices_part(choices: Mapping[str, Any], directory: Place) -> list[str]:
    """A table and a figure; `choices` is the `choices.json` of a run."""
    ways = choices["ways"]
    num_pairs = len(choices["pairs"])
    compared = {name for row in ways for name in row["over"]}
    against = [row["way"] for row in ways if row["way"] in compared]
    rows = [
        [
            row["way"],
            row["num_pairs"],
            with_interval(row["utility"], row["interval"]),
            *(_gain(row["over"].get(name)) for name in against),
        ]
        for row in ways
    ]
    _draw(ways, num_pairs, directory)
    tuned = f"Tuned coefficients were taken for {choices['num_tuned']} of the {num_pairs} pairs, where they keep more"
    if choices["always_tuned"] is not None:
        tuned += f" on probes held out; taking them always: {number(choices['always_tuned'])}"
    return [
        "## What choosing is worth",
        f"Every pair that has labels, {num_pairs} of them; utility is the mean of both parents' tasks. *Chosen without "
        "labels* looks at checkpoints and probes (prompts without answers) alone; *chosen and tuned* is the whole of "
        f"`simmerge auto`: a merge for {choices['num_merges']} pairs, else a checkpoint as it is. Intervals are of "
        "95 % when checkpoints are resampled; gains are paired.",
        table_block(["", "pairs", "utility", *(f"minus {name}" for name in against)], rows),
        f"*Best fixed arm*: the best of {choices['num_arms']} on all other pairs ({', '.join(choices['fixed_arms'])}). "
        "*Paper's selector*: trained on the labels of other checkpoints, one arm for each pair. *Better parent*: the "
        "better of the two on the very items of the figure, which nobody knows beforehand. *Oracle*: the best of all "
        "that was measured of the pair (arms, checkpoints, choices) on one half of the items, scored on the other. "
        f"{tuned}.",
        "![What ways of choosing are worth](choices.png)",
    ]


def _gain(gain: Mapping[str, Any] | None) -> str:
    return "" if gain is None else with_interval(gain["value"], gain["interval"], signed=True)


def _draw(ways: Sequence[Mapping[str, Any]], num_pairs: int, directory: Place) -> None:
    known = [row for row in ways if row["utility"] is not None]
    figure, ((axis,),) = new_figure(8.6, 1.4 + 0.42 * len(known))
    figure.set_layout_engine("constrained")
    for place, row in enumerate(known):
        low, high = row["interval"] or (row["utility"], row["utility"])
        axis.plot([low, high], [place, place], c="C0", lw=1.6)
        axis.plot(row["utility"], place, "o", c="C0", ms=7)
        axis.annotate(number(row["utility"]), (row["utility"], place), (0, 7), textcoords="offset points", ha="center")
    axis.set_yticks(range(len(known)), [row["way"] for row in known])
    axis.set_ylim(len(known) - 0.5, -0.8)
    axis.set_xlabel(f"utility of both parents' tasks, mean over {num_pairs} pairs (95 % intervals)")
    axis.grid(axis="x", lw=0.4)
    possible = [row for row in known if not any(word in row["way"] for word in ("oracle", "hindsight"))]
    best, first = max(possible, key=lambda row: row["utility"]), known[0]
    title_above(figure, f"The best way of choosing, {best['way']}, gives {best['utility']:.3f}, the {first['way']} "
                f"{first['utility']:.3f}")  # fmt: skip
    save_figure(figure, directory, "choices.png")
