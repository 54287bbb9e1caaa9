"""The rows of "Must hold" that are about choosing: figure, target, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simmerge_ray.research.pair_sample import PairSample

Figures = Mapping[str, Any]
MAIN = "chosen, 64 probes"


def row(what: str, figure: Any, target: str, met: bool | None) -> dict[str, Any]:
    """met: None where nothing is asked but the figure."""
    return {"what": what, "figure": figure, "target": target, "met": met}


def _sample(pairs: Sequence[str]) -> PairSample:
    return PairSample(tuple((left, right) for left, right in (joined.split("+") for joined in pairs)))


def _utilities(chosen: Mapping[str, Any]) -> list[float]:
    return [one["utility"] for one in chosen.values()]


def _references(figures: Figures, pairs: Sequence[str]) -> dict[str, list[float]]:
    """Utilities of the grid's choosers of some pairs, in their order."""
    by_pair = figures["grid"]["by_pair"]
    places = [figures["grid"]["pairs"].index(pair) for pair in pairs]
    return {name: [values[place] for place in places] for name, values in by_pair.items()}


def choice_rows(figures: Figures) -> list[dict[str, Any]]:
    """The label-free choice against what one would have otherwise."""
    chosen = {pair: one for pair, one in figures[MAIN].items() if pair in figures["grid"]["pairs"]}
    sample, mine, others = _sample(list(chosen)), _utilities(chosen), _references(figures, list(chosen))
    mean = sample.mean(mine)
    rows = [row("label-free choice, 64 probes: utility", mean, ">= .855", mean["mean"] >= 0.855)]
    for name, least in (("better parent, in hindsight", 0.04), ("plain average", 0.09)):
        gain = sample.mean([a - b for a, b in zip(mine, others[name], strict=True)])
        met = gain["mean"] >= least and gain["interval"][0] > 0
        rows.append(row(f"... over {name}", gain, f">= +{least:.2f}, interval above 0", met))
    base = sample.mean([a - b for a, b in zip(mine, others["base"], strict=True)])
    rows.append(row("... over the base as it is", base, "reported", None))
    share = sample.ratio(mine, others["split-half oracle of the 48"])
    rows.append(row("... as a share of the split-half oracle of the 48", share, ">= .95", share["mean"] >= 0.95))
    return rows


def probe_rows(figures: Figures) -> list[dict[str, Any]]:
    """Fewer probes, general probes."""
    rows, main = [], figures[MAIN]
    for probes in ("16 probes", "4 probes", "general probes"):
        chosen = figures.get(f"chosen, {probes}", {})
        if not (pairs := [pair for pair in chosen if pair in main]):
            continue
        sample = _sample(pairs)
        difference = sample.mean([chosen[pair]["utility"] - main[pair]["utility"] for pair in pairs])
        asked = probes == "16 probes"
        met = difference["mean"] >= -0.01 if asked else None
        target = "within .01 of 64" if asked else "reported"
        rows.append(row(f"{probes}: utility", sample.mean([chosen[p]["utility"] for p in pairs]), "reported", None))
        rows.append(row(f"{probes}, less that of 64", difference, target, met))
    return rows


def tuned_rows(figures: Figures) -> list[dict[str, Any]]:
    """Every tuning from equal weights, and every control, on the pairs that it was run on; beside it tuning per tensor
    on the same pairs."""
    rows = []
    tuned = {**figures["tuned"], **figures.get("controls", {})}
    per_tensor = figures["tuned"].get("tensor", {})
    for name, by_pair in tuned.items():
        if not by_pair:
            continue
        mean = _sample(list(by_pair)).mean(_utilities(by_pair))
        asked = name in ("tensor", "layer")
        whole = len(by_pair) == len(per_tensor)  # a part of the pairs may be an easier or a harder one
        met = mean["mean"] >= 0.875 if asked and whole else None
        rows.append(row(f"tuned, {name}: utility", mean, ">= .875" if asked else "reported", met))
        both = [pair for pair in by_pair if pair in per_tensor]
        if name != "tensor" and both:
            gain = _sample(both).mean([per_tensor[pair]["utility"] - by_pair[pair]["utility"] for pair in both])
            rows.append(row(f"... per tensor, less {name}", gain, "reported", None))
    return rows


def answer_rows(figures: Figures) -> list[dict[str, Any]]:
    """The choice, tuned from its own weights."""
    rows = []
    for name in ("layer", "tensor"):
        if not (by_pair := figures.get(f"answer, {name}")):
            continue
        sample = _sample(list(by_pair))
        mean = sample.mean(_utilities(by_pair))
        gain = sample.mean([one["utility"] - one["chosen"] for one in by_pair.values()])
        always = sample.mean([one["tuned"] for one in by_pair.values()])
        rows += [
            row(f"the choice, tuned per {name} where held-out probes say so: utility", mean, ">= .875",
                mean["mean"] >= 0.875 if len(by_pair) == len(figures[MAIN]) else None),
            row("... less the choice", gain, "reported", None),
            row("... tuned in any case", always, "reported", None),
        ]  # fmt: skip
    return rows


def signal_rows(figures: Figures) -> list[dict[str, Any]]:
    """Rank correlations."""
    rows = []
    for name, value in figures["grid"]["spearman_over_candidates_and_tasks"].items():
        asked = name == "retention"
        rows.append(
            row(f"Spearman of probed {name} and utility, all candidates and tasks", value,
                ">= .95" if asked else "reported", value["mean"] >= 0.95 if asked else None)
        )  # fmt: skip
    for kind, found in figures.get("virtual", {}).items():
        value = found["spearman_over_candidates_and_tasks"]["retention"]
        rows.append(row(f"Spearman of virtual retention, {kind}", value, ">= .90", value["mean"] >= 0.90))
        rows.append(
            row(f"regret of the virtual best, {kind}", found["regret_to_the_best_in_hindsight"], "reported", None)
        )
    return rows


def worth_rows(figures: Figures) -> list[dict[str, Any]]:
    """The choice with no evaluation against samplers with 16."""
    rows, main = [], figures[MAIN]
    for name, by_pair in figures["samplers"].items():
        if not (pairs := [pair for pair in by_pair if pair in main]):
            continue
        place = by_pair[pairs[0]]["budgets"].index(16.0)
        for kind, text in (("best", ""), ("with_kept", ", parents and base measured too")):
            gain = _sample(pairs).mean([main[pair]["utility"] - by_pair[pair][kind][place] for pair in pairs])
            asked = kind == "best"
            rows.append(
                row(f"label-free with 0 evaluations, less {name} with 16{text}", gain,
                    "not below 0" if asked else "reported", gain["mean"] >= 0 if asked else None)
            )  # fmt: skip
    return rows


def situation_rows(figures: Figures) -> list[dict[str, Any]]:
    """Members of one task, odd ones, more than two."""
    rows = []
    named = {"pairs of one task": figures.get("same task"), **figures.get("odd ones", {})}
    named |= {f"{size} members": found for size, found in figures.get("more members", {}).items()}
    for name, found in named.items():
        if not found or not found["mean"]:
            continue
        mean = found["mean"]
        least = min(mean["utility"] - mean[other] for other in ("plain average", "best member, in hindsight"))
        rows.append(row(f"{name}: choice, and what else there is", mean, "above average and best member", least >= 0))
        if name == "a broken member":
            weights = [one["weights"][1] for one in found["rows"]]
            rows.append(row("weights of the broken member", weights, "all 0", not any(weights)))
    return rows


def speed_rows(figures: Figures) -> list[dict[str, Any]]:
    """Choice against one evaluation."""
    ratio = figures["speed"]["median_ratio"]
    return [row("seconds of a choice / of one full evaluation, signatures there", ratio, "<= 1.5", ratio["cpu"] <= 1.5)]


GROUPS: Mapping[str, tuple[tuple[str, ...], Callable[[Figures], list[dict[str, Any]]]]] = {
    "The choice without labels": (("grid", MAIN), choice_rows),
    "Fewer probes": ((MAIN,), probe_rows),
    "Tuning": (("tuned",), tuned_rows),
    "The choice, tuned": ((MAIN,), answer_rows),
    "Signals": (("grid",), signal_rows),
    "What it is worth": (("samplers", MAIN), worth_rows),
    "Other members": ((), situation_rows),
    "Speed": (("speed",), speed_rows),
}


def all_rows(figures: Figures) -> dict[str, list[dict[str, Any]]]:
    """By group; a group whose parts have not been run is left out."""
    found = {
        name: make(figures) for name, (needed, make) in GROUPS.items() if all(figures.get(part) for part in needed)
    }
    return {name: rows for name, rows in found.items() if rows}
