"""The numbers of `docs/study.md` and the passages that they stand in.

What rests on trained networks may be `NOISE` units of the last digit apart: 300 steps carry the last bit of a float32,
which differs between processors, up to the second digit of a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from simmerge_ray.base.markdown import number, percent, with_interval
from simmerge_ray.research.said import Said

NOISE = 5
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TITLES = {
    "selector (mlp)": "selector", "selector, safe": "selector, safe",
    "single-checkpoint features alone": "single-checkpoint features", "parents' utilities alone": "parents' utilities",
    "signals permuted": "signals permuted", "best fixed per task": "best fixed per task",
    "single-signal stump": "single-signal stump", "equal-weight linear": "equal-weight linear", "uniform": "uniform",
    "**keep the better parent, no merge**": "better parent",
}  # fmt: skip
_NO_NETWORKS = ("best fixed per task", "single-signal stump", "equal-weight linear", "uniform", "better parent")
_LONGER = {
    "random plan": "random plan", "best fixed arm, random order": "best fixed arm, random order",
    "best fixed arm, expert last": "best fixed arm, expert last", "equal-weight linear": "equal-weight linear",
    "best of the candidates, in hindsight": "best of the candidates",
}  # fmt: skip


def statements(found: Mapping[str, Any]) -> list[Said]:
    """From the sections of `published.SECTIONS`."""
    parts: Iterable[list[Said]] = (
        _counts(found["counts"]),
        _primary(found["unseen bases"]["primary"], found["arm sets"]["the study's"]),
        _arm_sets(found["arm sets"]),
        _controls(found["controls"]),
        _longer(found["longer"]),
        _subsets(found["subsets"]),
        _evaluations(found["unseen bases"]["evaluations"]),
        _transfer(found["transfer"]),
        _later(found["unseen bases"]["later"]),
    )
    return list(chain.from_iterable(parts))


def _points(value: float, interval: Sequence[float] | None = None) -> str:
    """A difference in points, with its interval where there is one."""
    if interval is None:
        return number(100 * value, True, 1)
    return with_interval(100 * value, [100 * end for end in interval], signed=True, digits=1)


def _gain(one: Mapping[str, Any], interval: str = "interval") -> str:
    return _points(one["gain"], one[interval])


def _counts(found: Mapping[str, Any]) -> list[Said]:
    rows = found["rows"]
    merges, labels = (
        sum(values) for values in ((sum(r["merges"].values()) for r in rows), (r["labels"] for r in rows))
    )
    hours = sum(row["seconds"] for row in rows) / 3600
    return [
        Said("everything is labelled ({} merges of two to six checkpoints on", (str(merges),)),
        Said("a larger one, {} labels, {} hours of evaluation)", (f"{labels:,}", f"{hours:.1f}")),
    ]


def _primary(found: Mapping[str, Any], room: Mapping[str, Any]) -> list[Said]:
    by_base, domains, oracle = found["by_base"], found["domains"], room["per_merge"]
    gains = sorted(by_base["gains"].values())
    winners = sum(gain > 0 for gain in gains)
    counts = tuple(_WORDS[one].capitalize() if i == 0 else _WORDS[one] for i, one in enumerate((winners, len(gains))))
    return [
        Said("unseen base), {} merges, {} contexts with", (str(found["num_merges"]), str(found["num_defined"]))),
        Said("in every fold | **{}**; target", (_gain(found),), NOISE),
        Said("(Student's t over {}) |", (str(len(gains)),)),
        Said("(Student's t over 12) | {} |", (_points(by_base["mean"], by_base["interval"]),), NOISE),
        Said("split-half oracle over the best fixed arm | {}; the", (_gain(oracle),)),
        Said("the selector has {} of it |", (percent(found["oracle"]["share"]),), NOISE),
        *(Said(f"{task} {{}}{end}", (_gain(domains[task]),), NOISE) for task, end in _DOMAIN_ENDS.items()),
        Said("(Holm over the four, largest p {}).", (f"{max(one['p'] for one in domains.values()):.4f}",), 100),
        Said("). {} of {} bases gain,", counts),
        Said("lose, between {} and {}. !", (_points(gains[0]), _points(gains[-1])), NOISE),
    ]


_DOMAIN_ENDS = {"code": ", math", "math": ", multilingual", "multilingual": ", rag", "rag": "; not worse"}


def _arm_sets(found: Mapping[str, Any]) -> list[Said]:
    titles = {
        "the paper's kinds": "| linear, nuslerp, ties (0.5): the paper's kinds",
        "these and task_arithmetic": "| these and task_arithmetic",
        "the study's and task_arithmetic": "| the study's and task_arithmetic",
        "all six": "| all six, with scale_matched_linear",
    }
    claims = [Said("ties at 0.1 and 0.5 | ties(density=0.1), {} | {} |", _shown_room(found["the study's"]))]
    for name, title in titles.items():
        one = found[name]
        row = f"{title} | {'**' if name == 'all six' else ''}{one['best_fixed']}, {{}} | {{}} | {{}} |"
        claims.append(Said(row, (*_shown_room(one), None)))
        claims.append(Said(row, (None, None, _gain(one)), NOISE))
    study = found["the study's"]
    matched, best = found["all six"]["gap_closed"], study["gap_closed"]
    worst = found["the study's and task_arithmetic"]["arms"]["task_arithmetic"]
    return [
        *claims,
        Said(
            "scaled to the same norm closes {} of the gap, {} points more than",
            (_fixed(found["all six"]), f"{100 * (matched - best):.1f}"),
        ),
        Said(
            "(instead of one per merge) has {} points of headroom",
            (f"{100 * study['per_context']:.1f}",),
        ),
        Said("The planned one is the worst arm ({}), so", (number(worst),)),
        Said("as good as any arm ({}): ten", (number(matched),)),
    ]


def _fixed(one: Mapping[str, Any]) -> str:
    return number(one["gap_closed"])


def _shown_room(one: Mapping[str, Any]) -> tuple[str, str]:
    return _fixed(one), _gain(one["per_merge"])


def _controls(found: Mapping[str, Any]) -> list[Said]:
    main = found["splits"][found["headline"]]["policies"]["per_merge"]
    policies, claims = main["policies"], []
    for title, name in _TITLES.items():
        one, apart = policies[name], 0 if name in _NO_NETWORKS else NOISE
        closed = with_interval(one["gap_closed"], one["interval"])
        gain, regret = _points(one["gain"], one["gain_interval"]), number(one["mean_regret"])
        if name in ("best fixed per task", "single-signal stump", "equal-weight linear", "uniform"):
            closed = number(one["gap_closed"])  # without its interval there
        if name == "better parent":  # it has no arm that could be in a noise set
            claims.append(Said(f"| {title} | {{}} | {{}} | | {{}} |", (closed, gain, regret)))
        else:
            shown = (closed, gain, percent(one["in_noise_set"]), regret)
            row = f"| {title} | {{}} | {{}} | {{}} | {{}} |"
            if name == "equal-weight linear":  # the tables of longer plans have such a row, too
                row += " | uniform |"
            claims.append(Said(row, shown, apart))
    others = [policies[name] for name in ("ridge", "knn", "forest")]
    closed, gain = ", ".join(number(one["gap_closed"]) for one in others), ", ".join(_points(o["gain"]) for o in others)
    claims.append(Said("| ridge, nearest neighbours, forest | {} | {} |", (closed, gain), NOISE))
    fixed = policies["best fixed"]
    closed, within = with_interval(fixed["gap_closed"], fixed["interval"]), percent(fixed["in_noise_set"])
    claims.append(Said("best fixed, `ties(density=0.1)` | {} | 0 | {} |", (closed, within)))
    return claims + _on_controls(found, main)


def _on_controls(found: Mapping[str, Any], main: Mapping[str, Any]) -> list[Said]:
    """What is said below the table."""
    splits, policies, accuracy = found["splits"], main["policies"], main["arm_accuracy"]
    coverage = splits[found["headline"]]["intervals"]
    unseen = splits["unseen domain"]["policies"]["per_merge"]["policies"]
    of_domain = (unseen[name] for name in ("selector", "selector, safe"))
    arms = ("linear", "ties(density=0.1)", "nuslerp", "ties")
    shown = (percent(accuracy[arm][key]) for arm in arms for key in ("accuracy", "base_rate"))
    arm_passage = "linear in {} (a constant answer: {}), ties at 0.1 {} ({}), nuslerp {} ({}), ties {} ({}): the"
    changes = {row["name"]: row["change"] for row in found["ablations"]["rows"]}
    in_noise = {name: percent(policies[name]["in_noise_set"]) for name in ("selector", "best fixed")}
    model, pair = (_gain(splits[name]["per_merge"], "gain_interval") for name in ("one model unseen", "random pair"))
    return [
        Said(
            "each checkpoint alone ({}), nor",
            (_gain(main["lead"]["single-checkpoint features"], "gain_interval"),),
            NOISE,
        ),
        Said("noise set in {} of the merges", (in_noise["selector"],), NOISE),
        Said('always taking `ties(density=0.1)`, in {}. "Is', (in_noise["best fixed"],)),
        Said(arm_passage, tuple(shown), NOISE),
        Said("encoding off: {}, safe {}. One", tuple(_gain(one, "gain_interval") for one in of_domain), NOISE),
        Said("One model unseen {}, random pair {}. Knowing", (model, pair), NOISE),
        Said(
            "95 % intervals cover {}, 80 % intervals {}: a",
            tuple(percent(coverage[level]["coverage"]) for level in ("0.95", "0.8")),
            NOISE,
        ),
        Said(
            "no probes {}, no weights {}, task", (_points(changes["no probes"]), _points(changes["no weights"])), NOISE
        ),
    ]


def _longer(found: Mapping[str, Any]) -> list[Said]:
    tables, tau = found["tables"], found["tau"]
    rows = {row["policy"]: row for row in tables["second_order, all, both"]}
    claims = [Said("so it has seen no longer plan; there are {} groups", (str(rows["random plan"]["num_groups"]),))]
    for title, name in _LONGER.items():
        row = rows[name]
        sums = (f"{row[key]:+.1f}" for key in ("degradation", "auxiliary_gain"))
        claims.append(Said(f"| {title} | {{}} | {{}} | {{}} % | {{}} % |", (number(row["pooled"]), None, *sums)))
    first = rows["predicted"]
    shown = number(first["pooled"]), *(f"{first[key]:+.1f} %" for key in ("degradation", "auxiliary_gain"))
    claims.append(Said("| predicted plan, `second_order` | {} | | {} | {} |", shown, NOISE))
    for name, title in (("bound", "`bound`"), ("second_order", "`second_order`")):
        values = sorted(row["tau"] for row in tau[name].values())
        ends = tuple(f"{value:.2f}".removeprefix("0") for value in (values[0], values[-1]))
        claims.append(Said(f"{title} {{}} to {{}},", ends, NOISE))
    return claims


def _subsets(rows: Sequence[Mapping[str, Any]]) -> list[Said]:
    titles = {
        "any": "any (the mean)",
        "most similar": "most similar task vectors",
        "individually best": "individually best",
    }
    regret = {(row["policy"], row["size"]): number(row["regret"]) for row in rows}
    return [
        Said(
            f"| {title} | {{}} | {{}} | {{}} | {{}} | {{}} |", tuple(regret[name, size] for size in (2, 3, 4, 5, "any"))
        )
        for name, title in titles.items()
    ]


def _evaluations(found: Mapping[str, Any]) -> list[Said]:
    def utility(strategy: str, evaluations: float | None = None, items: int | None = None) -> str:
        rows = (row for row in found["rows"] if row["strategy"] == strategy and row["items"] == items)
        return number(next(row["utility"] for row in rows if evaluations is None or row["evaluations"] == evaluations))

    few = [row for row in found["rows"] if row["strategy"] == "few items"]
    costs = " / ".join(f"{row['evaluations']:.2f}" for row in few)
    by_items = " / ".join(number(row["utility"]) for row in few)
    seconds = found["costs"]
    return [
        Said("| predicted arm | 0 | {} |", (utility("predicted", 0.0),), NOISE),
        Said("on 8 / 16 / 32 items | {} | {} |", (costs, by_items)),
        *(
            Said(
                f"| random order / Optuna, best of {n} | {n} | {{}} |",
                (f"{utility('random', n)} / {utility('Optuna', n)}",),
            )
            for n in (2, 3)
        ),
        Said("| predicted, best of 2 | 2 | {} |", (utility("predicted", 2.0),), NOISE),
        Said("| all four | 4 | {} |", (utility("predicted", 4.0),)),
        Said("evaluation took {} s, signals", (f"{seconds['evaluation']:.1f}",)),
        Said("all labels {} hours:", (f"{seconds['labels'] / 3600:.1f}",)),
    ]


def _transfer(found: Mapping[str, Any]) -> list[Said]:
    closed, gains = found["gap_closed"], found["gains"]
    fixed = "best fixed of the small bases"
    titles = {
        "selector of the small bases, unmodified": "transferred",
        "the same, abstaining as the product does": "abstaining",
        "selector trained on the large base, each checkpoint left out": "own",
    }
    claims = [
        Said(f"| {title} | {{}} | {{}} |", (number(closed[name]), _gain(gains[f"{name} - {fixed}"])), NOISE)
        for title, name in titles.items()
    ]
    return [
        *claims,
        Said("| best fixed arm | {} | |", (number(closed[fixed]),)),
        Said(
            "eight experts, {} cross-domain merges, {} of them with a gap",
            (str(found["num_merges"]), str(found["num_defined"])),
        ),
        Said("works for {} of the merges, whose distance", (percent(found["unlike"]),)),
    ]


def _later(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Said]:
    rows = found["scale_matched_linear"]
    chosen = tuple(percent(row["chosen"]) for row in rows)
    planned = tuple(_points(row["gain"]).lstrip("+") for row in found["task_arithmetic"])
    gains = tuple(_gain(row, "gain_interval") for row in rows[1:])
    places = " | ".join(["{}"] * len(rows))
    return [
        Said(f"| `task_arithmetic`, as planned: gain in points | {places} |", planned, NOISE),
        Said("`scale_matched_linear`, not planned: gain in points | 0.0 | {} | {} | {} | {} |", gains, NOISE),
        Said(f"| chosen | {places} | The", chosen, NOISE),
    ]
