"""The blocks of docs/study-2.md, made from its figures: verdicts, tables, and what the labels say of the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simmerge_ray.base.markdown import percent, table_lines, with_interval
from simmerge_ray.research.second_study.analysis import (
    BASE,
    BY_SURENESS,
    CHOICE,
    ELSEWHERE,
    EXPERTS,
    ORACLE,
    PARENT,
    PLAIN,
    SCORED,
    TUNED,
)
from simmerge_ray.research.second_study.real_tasks import REAL_TASKS
from simmerge_ray.research.second_study.sets import ALWAYS

_SAID = {
    "H1": "choice minus plain average",
    "H2": "choice minus the best fixed candidate of the other pairs",
    "H3": "choice minus the better parent, in hindsight",
    "H4": "share of the oracle's way from the plain average",
}


def study_2_blocks(sections: Mapping[str, Any]) -> dict[str, list[str]]:
    """All blocks of the page."""
    of_zoos = real_blocks(sections["real"]) | small_blocks(sections["small"])
    return of_zoos | set_blocks(sections["sets"]) | transfer_blocks(sections["transfer"])


def real_blocks(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lines by block; `found` of `real_figures`."""
    first = {"real-verdict": _verdict(found), "real-hypotheses": _hypotheses(found["hypotheses"])}
    last = {"real-checkpoints": _checkpoints(found["singles"]), "real-chosen": _chosen(found["chosen"])}
    return first | _zoo_blocks("real", found) | last


def small_blocks(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lines by block; `found` of `small_figures`."""
    first = {"small-verdict": _small_verdict(found), "small-gaps": _gaps(found["gaps"])}
    return first | _zoo_blocks("small", found) | {"small-bases": _bases(found["bases"], found["gaps"]["by_base"])}


def _zoo_blocks(kind: str, found: Mapping[str, Any]) -> dict[str, list[str]]:
    return {
        f"{kind}-ways": _ways(found["ways"]),
        f"{kind}-tasks": _tasks(found["tasks"]),
        f"{kind}-scores": _scores(found["scores"]),
        f"{kind}-evaluations": _evaluations(found["evaluations"]),
    }


def set_blocks(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lines by block; `found` of `set_figures`. Sets of more members first."""
    sizes = sorted(found["sizes"].items(), reverse=True)
    ways, chosen = [], []
    for size, one in sizes:
        counts, within = one["counts"], one["within_a_set"]
        ways += [
            f"{size} members, {counts['sets']} of {counts['of']} sets; Spearman of score and utility within a set "
            f"{with_interval(within['mean'], within['interval'])}:",
            "",
            *_ways(one["ways"]),
        ]
        if one["tuned"][ALWAYS]["mean"] is not None:
            gains = "; ".join(f"{name}: {_points(gain)}" for name, gain in one["tuned"].items())
            taken = f"The tuned merge is the answer for {one['num_taken']}."
            ways += [f"Points over the choice by scalars, where it was tuned: {gains}. {taken}", ""]
        chosen += [(", ".join(names), label, value) for *names, label, value in one["chosen"]]
    chosen_lines = table_lines(("members", "chosen", "utility"), chosen)
    verdict = [*_set_verdict(found), *_tuning(found["sizes"])]
    return {"sets-verdict": verdict, "sets-ways": ways, "sets-chosen": chosen_lines}


def _tuning(sizes: Mapping[str, Any]) -> list[str]:
    """What tuning is worth, where anything was tuned."""
    lines = []
    for size, one in sizes.items():
        ways = {row["way"]: row["over"] for row in one["ways"]}
        over = ways[TUNED][PLAIN]
        if one["tuned"][ALWAYS]["mean"] is not None:
            lines.append(
                f"- **Tuned per tensor**, {size} members, {one['counts']['sets']} sets: what `auto` answers is worth "
                f"{_points(one['tuned'][TUNED])} points more than its choice by scalars, "
                f"{_points({'mean': over['value'], **over})} more than the plain average."
            )
    return lines


def _set_verdict(figures: Mapping[str, Any]) -> list[str]:
    found, of_four = figures["hypotheses"], figures["sizes"].get("4")
    first, sure = found["H11"], found["H12"]
    if not first["over"]:
        num = of_four["counts"]["sets"] if of_four else 0
        return [f"- **H11** and **H12** are not tested yet: sets of four that are labelled: {num}."]
    words = _verdict_words(first["is_whole"])
    gains = [f"minus {name}, {_points({'mean': one['value'], **one})}" for name, one in first["over"].items()]
    return [
        f"- **H11 {words[bool(first['holds'])]}**: choice {'; '.join(gains)} points "
        "(asked: >= +8, lower end > 0; > 0).",
        f"- **H12 {words[bool(sure['holds'])]}**: {BY_SURENESS}, minus that by the product's score, {_points(sure)} "
        "points (asked: lower end > 0).",
    ]


def transfer_blocks(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lines by block; `found` of `transfer_figures`."""
    words = ("is not earned", "is earned")
    verdicts = {name: words[bool(one["holds"])] for name, one in found["hypotheses"].items()}
    ratio, over = found["ratio"], _lost(found["minus_rule"])
    said = [
        f"- **H9 {verdicts['H9']}**: mean regret of the predictor of the small bases over that of one fitted on the "
        f"real zoo's other pairs, {'undefined' if ratio is None else f'{ratio:.2f}'} (asked: <= 1.25); minus the plain "
        f"mean's, {over} points (asked: < 0).",
        f"- **H10 {verdicts['H10']}**: regret where a family of operators is left out of the training (asked: <= 2 "
        "points), below.",
        "",
    ]
    rows = [(way, _lost(one), one["pairs"]) for way, one in found["real"].items()]
    families = [
        (
            one["zoo"],
            one["family"],
            *(_lost(one[where] and one[where]["predicted"]) for where in ("within", "among")),
        )
        for one in found["families"]
    ]
    return {
        "transfer-verdict": said,
        "transfer-real": table_lines(("real zoo, chosen by", "regret, points", "pairs"), rows),
        "transfer-families": table_lines(("zoo", "left out", "regret within it", "regret among all"), families),
    }


def _lost(one: Mapping[str, Any] | None) -> str:
    return _points(one) if one else "nothing to choose"


def _small_verdict(found: Mapping[str, Any]) -> list[str]:
    counts, first, gaps = found["counts"], found["hypotheses"]["H6"], found["gaps"]
    over, asked = first["over_paper"], first["asked"]
    word = "is earned" if first["holds"] else "is not earned"
    return [
        f"Labelled: **{counts['pairs']} pairs** across tasks of **{counts['bases']} bases**, drawn at random from "
        f"{counts['of']}, {counts['candidates']} candidates each, and what was chosen; GapClosed is defined for "
        f"{gaps['contexts']} of {gaps['of']} pairs and tasks.",
        "",
        f"- **H6 {word}**: GapClosed of the label-free choice {_shown(first['choice'])} (asked: >= {asked[0]:.2f}); "
        f"minus the best of the paper's operators in hindsight ({over['best']}) {_points(over)} points (asked: >= "
        f"{100 * asked[1]:+.0f}, lower end > 0).",
        f"- Answers of `auto`: {', '.join(f'{count} {kind}' for kind, count in sorted(found['answers'].items()))}.",
    ]


def _shown(one: Mapping[str, Any]) -> str:
    return with_interval(one["mean"], one["interval"])


def _gaps(found: Mapping[str, Any]) -> list[str]:
    rows = sorted(found["ways"], key=lambda one: -(one["mean"] or 0.0))
    return table_lines(
        ("", "GapClosed"),
        [(f"**{row['way']}**" if row["way"] == CHOICE else row["way"], _shown(row)) for row in rows],
    )


def _bases(rows: Sequence[Mapping[str, Any]], by_base: Mapping[str, float]) -> list[str]:
    names = ("best_task", "least_expert", "best_parent", "pairs")
    header = (
        "base",
        "its best task",
        "least expert, own task",
        "best parent, both tasks",
        "pairs",
        "GapClosed, choice",
    )
    return table_lines(
        header, [(row["base"], *(row[name] for name in names), by_base.get(row["base"])) for row in rows]
    )


def _verdict(found: Mapping[str, Any]) -> list[str]:
    """Those that fail first."""
    counts, verdicts = found["counts"], found["hypotheses"]
    extent = (
        f"Labelled so far: **{counts['pairs']} of {counts['of']}** pairs across tasks, drawn at random, "
        f"{counts['candidates']} candidates each, and what was chosen."
    )
    is_whole = counts["pairs"] == counts["of"]
    if not is_whole:
        extent += " A hypothesis is of all of them, so none is decided."
    ordered = sorted(verdicts.items(), key=lambda one: bool(one[1]["holds"]))
    room = next(row for row in found["ways"] if row["way"] == EXPERTS)["over"][PLAIN]
    most = (
        "- **What there is to have**: a merge that lost nothing, each expert's utility on its own task, would have "
        f"{_points({'mean': room['value'], **room})} points more than the plain average."
    )
    return [extent, "", most, *(f"- {_sentence(name, one, is_whole)}" for name, one in ordered)]


def _verdict_words(is_whole: bool) -> tuple[str, str]:
    """No and yes."""
    return ("is not earned", "is earned") if is_whole else ("does not hold so far", "holds so far")


def _sentence(name: str, one: Mapping[str, Any], is_whole: bool) -> str:
    word = _verdict_words(is_whole)[bool(one["holds"])]
    return f"**{name} {word}**: {_SAID[name]}, {_figure(name, one)} (asked: {_asked(name, one)})."


def _figure(name: str, one: Mapping[str, Any]) -> str:
    if name == "H4":
        if one["mean"] is None:
            return f"undefined, since the oracle gains only {_points(one['room'])} points there"
        return f"{percent(one['mean'])} [{', '.join(percent(end) for end in one['interval'])}]"
    return _points(one)


def _asked(name: str, one: Mapping[str, Any]) -> str:
    return f">= {percent(one['asked'])}" if name == "H4" else f">= {100 * one['asked']:+.0f} points, lower end > 0"


def _points(one: Mapping[str, Any]) -> str:
    """In hundredths of utility."""
    if one["mean"] is None:
        return "unknown"
    interval = None if one["interval"] is None else [100 * end for end in one["interval"]]
    return with_interval(100 * one["mean"], interval, signed=True, digits=1)


def _hypotheses(verdicts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [
        (name, _SAID[name], _figure(name, one), _asked(name, one), "yes" if one["holds"] else "**no**")
        for name, one in verdicts.items()
    ]
    return table_lines(("", "what", "figure", "asked", "holds"), rows)


def _ways(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    against = list(dict.fromkeys(name for row in ways for name in row["over"]))
    rows = []
    for row in sorted(ways, key=lambda one: -(one["utility"] or 0.0)):
        gains = [row["over"].get(name) for name in against]
        shown = ["" if one is None else _points({"mean": one["value"], **one}) for one in gains]
        name = f"**{row['way']}**" if row["way"] == CHOICE else row["way"]
        rows.append((name, with_interval(row["utility"], row["interval"]), *shown))
    return table_lines(("", "utility", *(f"minus {name}, points" for name in against)), rows)


def _tasks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = (CHOICE, PLAIN, ELSEWHERE, PARENT, BASE, ORACLE)
    shown = [(row["tasks"].replace("+", " + "), row["pairs"], *(row[name] for name in names)) for row in rows]
    return table_lines(("tasks", "pairs", *names), shown)


def _scores(found: Mapping[str, Any]) -> list[str]:
    both = {name: with_interval(found[name]["mean"], found[name]["interval"]) for name in ("all", "within_a_pair")}
    return [
        f"Spearman of score and utility: {both['all']} over all candidates and tasks, {both['within_a_pair']} within a "
        f"pair (least {found['least_within_a_pair']:.3f}). Of the fixed candidates, parents and base, the one with the "
        f"best score ({SCORED}) falls short of the best by {_points(found['regret'])} points, both on the same items. "
        f"Where retention weighs half of the members' own likelihood instead of a half ({BY_SURENESS}), what is taken "
        f"is worth {_points(found['by_sureness'])} points more; this was looked at on these very labels.",
    ]


def _evaluations(found: Mapping[str, Any]) -> list[str]:
    numbers, reached = found["utility"], found["reached"]
    best = max(numbers, key=numbers.__getitem__)
    choice = f"the choice's {found['choice']:.3f}"
    said = (
        f"Random search over the fixed candidates reaches {choice} with {reached} labelled evaluations."
        if reached
        else f"Random search over the fixed candidates does not reach {choice} with any number up to {found['of']} "
        f"(best: {numbers[best]:.3f}, with {best})."
    )
    return [*table_lines(("evaluations", *numbers), [("utility", *numbers.values())]), said]


def _checkpoints(singles: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [(name, *(values.get(task) for task in REAL_TASKS)) for name, values in singles.items()]
    return table_lines(("checkpoint", *REAL_TASKS), rows)


def _chosen(rows: Sequence[Sequence[Any]]) -> list[str]:
    return table_lines(("pair", "chosen", "utility"), [(f"{a}, {b}", label, value) for a, b, label, value in rows])
