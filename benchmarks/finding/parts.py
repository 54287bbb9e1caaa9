"""The parts of the proof: each measures, or reads what was measured before, and returns figures that are JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.finding.candidates import fixed_grid
from benchmarks.finding.choices import PROBES, answered_pairs, chosen_pairs
from benchmarks.finding.controls import control_figures
from benchmarks.finding.derived import BROKEN, COPY, make_derived
from benchmarks.finding.grid import GridPair, measured_grid
from benchmarks.finding.grid_report import grid_figures
from benchmarks.finding.samplers import BUDGETS, sampler_curves
from benchmarks.finding.situations import (
    Groups,
    half_as_good,
    one_task,
    several,
    situation,
    with_intervals,
    with_odd_one,
)
from benchmarks.finding.speed import seconds_of_choices
from benchmarks.finding.tuned import TUNINGS, tuned_pairs
from benchmarks.finding.utilities import Bench, check_against_evaluator
from benchmarks.finding.virtual import virtual_figures

ANSWERS = ("layer", "tensor")  # granularities of the tuned answer


@dataclass
class Campaign:
    """A zoo, where its results are, and how far it goes.

    zoo: directory. out: of results. until: `time.time()` after which nothing new is measured. budget: most evaluations
    of a sampler. tunings: which of `tuned.TUNINGS`.
    """

    zoo: Path
    out: Path
    writer: str
    until: float | None = None
    budget: int = BUDGETS[-1]
    tunings: tuple[str, ...] = tuple(TUNINGS)

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.zoo, self.out, self.writer, self.until)

    @cached_property
    def derived(self) -> Bench:
        made = make_derived(self.bench, self.zoo, self.out / "derived")
        return Bench(made, self.out, self.writer, self.until)

    @cached_property
    def grid(self) -> list[GridPair]:
        return measured_grid(self.bench, self.bench.pairs())


def check(campaign: Campaign) -> dict[str, Any]:
    """Teacher-forced against generated, on some merges of some pairs."""
    bench, plans = campaign.bench, []
    for pair in bench.pairs()[::11]:
        grid = fixed_grid(*pair)
        plans += [(grid[name], bench.tasks_of(pair)) for name in ("average", "0.6/0.8", "ties 0.3 x 1.4")]
    return check_against_evaluator(bench, plans)


def grid(campaign: Campaign) -> dict[str, Any]:
    return grid_figures(campaign.grid)


def virtual(campaign: Campaign) -> dict[str, Any]:
    return virtual_figures(campaign.bench, campaign.grid)


def chosen(campaign: Campaign, probes: str) -> dict[str, Any]:
    return chosen_pairs(campaign.bench, campaign.bench.pairs(), probes)


def answered(campaign: Campaign, groups: str) -> dict[str, Any]:
    return answered_pairs(campaign.bench, groups)


def samplers(campaign: Campaign) -> dict[str, Any]:
    return sampler_curves(campaign.bench, campaign.budget)


def tuned(campaign: Campaign) -> dict[str, Any]:
    return tuned_pairs(campaign.bench, campaign.tunings)


def controls(campaign: Campaign) -> dict[str, Any]:
    return control_figures(campaign.bench)


def same_task(campaign: Campaign) -> dict[str, Any]:
    groups = one_task(campaign.bench)
    found = situation(campaign.bench, groups)
    pairs = [(one["members"][0], one["members"][1]) for one in found["rows"]]
    return found | {"gain": with_intervals(pairs, found["rows"])} if pairs else found


def odd_ones(campaign: Campaign) -> dict[str, Any]:
    """A broken member, the base as a member, a member half as good as the other."""
    bench = campaign.derived
    groups: Mapping[str, Groups] = {
        "a broken member": with_odd_one(bench, BROKEN),
        "the base as a member": with_odd_one(bench, COPY),
        "half as good, the same task": half_as_good(bench, same_task=True),
        "half as good, another task": half_as_good(bench, same_task=False),
    }
    return {name: situation(bench, of) for name, of in groups.items()}


def more_members(campaign: Campaign) -> dict[str, Any]:
    return {str(size): situation(campaign.bench, several(campaign.bench, size), with_oracle=True) for size in (3, 4)}


def speed(campaign: Campaign) -> dict[str, Any]:
    return seconds_of_choices(campaign.bench, campaign.bench.pairs()[::27])


PARTS: Mapping[str, Callable[[Campaign], dict[str, Any]]] = {
    "check": check,
    "grid": grid,
    "virtual": virtual,
    **{f"chosen, {probes}": lambda campaign, probes=probes: chosen(campaign, probes) for probes in PROBES},
    **{
        f"answer, {groups}": lambda campaign, groups=groups: answered_pairs(campaign.bench, groups)
        for groups in ANSWERS
    },
    "samplers": samplers,
    "tuned": tuned,
    "controls": controls,
    "same task": same_task,
    "odd ones": odd_ones,
    "more members": more_members,
    "speed": speed,
}
