"""Reports on an answer: what `simmerge auto` and `simmerge search` found, from their JSON files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simmerge_ray.base.markdown import percent
from simmerge_ray.base.storage import Place, versions
from simmerge_ray.reports.figures import FIGURES, PALETTE, new_figure, save_figure, title_above, wrapped
from simmerge_ray.reports.page import table_block, write_page

Content = Mapping[str, Any]

_Z95 = 1.96
_MOST_SHOWN = 12  # merges of a figure
_MOST_KEPT = 6  # of the figure of what is kept, beside the checkpoints


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error. strong: the answer. is_merge: or a checkpoint as it is."""

    label: str
    value: float
    se: float
    strong: bool
    is_merge: bool


def write_auto_report(content: Content, directory: Place) -> Place:
    """`report.md`, `report.html` and their figures of what `auto.json` holds; the path of the former."""
    return write_page(directory, [*auto_parts(content, directory), *made_with()])


def write_search_report(content: Content, directory: Place) -> Place:
    """The same of what `best.json` holds."""
    return write_page(directory, ["# What the search found", *search_parts(content, directory), *made_with()])


def made_with() -> list[str]:
    """Versions, as the last part of a report."""
    return ["## Made with", ", ".join(f"{name} {version}" for name, version in versions().items())]


def auto_parts(content: Content, directory: Place) -> list[str]:
    """The answer, what was measured, what is kept of the members, and how it was chosen."""
    winner, measured = content["winner"], content.get("measured")
    answer = (measured or {}).get("answer") or f"{content['answer']} {winner}"
    parts = [f"# {answer[0].upper()}{answer[1:]}"]
    if measured:
        parts += [_lines(measured["lines"]), *_measured_parts(content, measured, directory)]
    rows = {row["label"]: row for row in [content["best"], *content["tuned"], *content["candidates"]]}
    best, owners = content["best"], list(content["keeps"])
    shown = [best, *(row for row in rows.values() if row["label"] != best["label"])]
    heading = f"The choice without labels keeps {_range(list(content['keeps'].values()))} of its members' own answers"
    _draw_kept(heading, shown, owners, directory)
    cells = [
        [_marked(row["label"], row is best), row["score"], *(percent(row["retention"][owner]) for owner in owners)]
        for row in shown
    ]
    return [
        *parts,
        "## Kept of the members' own answers, without labels",
        f"{heading}, which they give to unlabeled probes: {best['label']}. *Score*: {content['score']}; the objective "
        f"over tasks is {content['objective']}. Checkpoints as they are stand beside the merges.",
        f"![{heading}]({FIGURES}/kept.png)",
        table_block(["merge or checkpoint", "score", *(f"kept of {owner}" for owner in owners)], cells),
        f"{content['num_scored']} merges were scored from signatures; {len(content['candidates'])} of them, the "
        f"checkpoints among these, were run over all probes; {len(content['tuned'])} were tuned.",
    ]


def _measured_parts(content: Content, measured: Content, directory: Place) -> list[str]:
    tasks = sorted(measured["num_items"])
    rows, estimates, failed = [], [], []
    for row in measured["candidates"]:
        if "infeasible" in row:
            failed.append(f"{row['label']}: {row['infeasible']}")
            continue
        told, strong = row["reporting"], row["plan"] == content["plan"]
        by_task = [told["by_task"][task]["value"] for task in tasks]
        rows.append([_marked(row["label"], strong), told["value"], told["se"], *by_task, row["score"]])
        estimates.append(Estimate(row["label"], told["value"], told["se"], strong, not _is_source(row["plan"])))
    items = ", ".join(f"{count} of {task}" for task, count in sorted(measured["num_items"].items()))
    finding = _finding(measured["best_merge"], measured["best_single"], measured["merge_minus_single"]["reporting"])
    draw_estimates(estimates, finding, f"utility, {content['objective']} of {', '.join(tasks)}", directory, "measured")
    return [
        "## Measured",
        f"{finding}. All on the same items ({items}): one half chose, the other, which is shown, had no part in it.",
        f"![{finding}]({FIGURES}/measured.png)",
        table_block(["merge or checkpoint", "measured", "se", *tasks, "score without labels"], rows),
        _lines(f"not measured: {one}" for one in failed),
    ]


def search_parts(content: Content, directory: Place) -> list[str]:
    """Merges and checkpoints on the same tasks, the verdict first; one part for each objective or set of tasks."""
    parts: list[str] = []
    for index, verdict in enumerate(content["verdicts"], 1):
        tasks = verdict["tasks"]
        title = f"## {verdict['objective']} of {', '.join(tasks)}"
        if verdict["answer"] is None:
            parts += [title, "Too few items, or nothing was measured, so there is no verdict."]
            continue
        estimates, rows = [], []
        for kind, most in (("merges", _MOST_SHOWN), ("singles", None)):
            same = [row for row in content[kind] if set(tasks) <= set(row["utilities"])]
            pooled = sorted((_pooled(row, tasks, verdict["winner"]) for row in same), key=lambda one: -one.value)
            estimates += pooled[:most]
            by_label = {row["label"]: row for row in same}
            rows += [
                [_marked(one.label, one.strong), one.value, one.se]
                + [by_label[one.label]["utilities"][task]["utility"] for task in tasks]
                for one in pooled[:most]
            ]
        finding = _finding(verdict["best_merge"], verdict["best_single"], verdict["merge_minus_single"])
        draw_estimates(estimates, finding, f"utility, mean of {', '.join(tasks)}", directory, f"found-{index}")
        parts += [
            title,
            _lines(verdict["lines"]),
            f"![{finding}]({FIGURES}/found-{index}.png)",
            table_block(["merge or checkpoint", "mean", "se", *tasks], rows),
        ]
    return parts


def _pooled(row: Content, tasks: Sequence[str], winner: str) -> Estimate:
    told = [row["utilities"][task] for task in tasks]
    value = sum(one["utility"] for one in told) / len(told)
    error = sum(one["se"] ** 2 for one in told) ** 0.5 / len(told)
    return Estimate(row["label"], value, error, row["label"] == winner, not _is_source(row["plan"]))


def _is_source(plan: Content) -> bool:
    return "source" in plan


def _finding(merge: str | None, single: str | None, gain: Content | None) -> str:
    """The title of a figure: the best merge beside the best checkpoint, by the paired difference on the same items."""
    if merge is None or single is None or gain is None:
        return "No merge could be measured beside a checkpoint"
    value, error = gain["value"], gain["se"]
    if abs(value) <= _Z95 * error:
        return f"These items do not tell the best merge from the best checkpoint, {single}: {value:+.3f} ± {error:.3f}"
    word = "beats" if value > 0 else "is worse than"
    return f"The best merge {word} the best checkpoint, {single}: {value:+.3f} ± {error:.3f}"


def _range(shares: Sequence[float]) -> str:
    low, high = min(shares), max(shares)
    return percent(high) if low == high else f"{100 * low:.0f} to {percent(high)}"


def _marked(label: str, strong: bool) -> str:
    return f"**{label}**" if strong else label


def _lines(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def draw_estimates(
    rows: Sequence[Estimate], title: str, unit: str, directory: Place, name: str, zero: bool = False
) -> None:
    """Points with 95 % intervals, the best first: merges and checkpoints in two colours, the answer filled; or (zero)
    differences, the clear ones filled."""
    known = sorted(rows, key=lambda one: -one.value)
    figure, axis = _of_labels([one.label for one in known], 0.24)
    for is_merge, colour, word in ((True, PALETTE[0], "merge"), (False, PALETTE[5], "checkpoint as it is")):
        for place, one in enumerate(known):
            if one.is_merge is is_merge:
                fill = colour if one.strong else "white"
                axis.errorbar(one.value, place, xerr=_Z95 * one.se, fmt="o", c=colour, mfc=fill, ms=8, capsize=3)
        if any(one.is_merge is is_merge for one in known):
            axis.plot([], [], "o", c=colour, label=word)
    axis.plot([], [], "o", c="grey", label="filled: more than two standard errors" if zero else "filled: the answer")
    if zero:
        axis.axvline(0, c="black", lw=0.8)
    axis.set_xlabel(f"{unit} (95 % intervals)")
    axis.grid(axis="x", lw=0.4)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    title_above(figure, title)
    save_figure(figure, directory / FIGURES, f"{name}.png")


def _draw_kept(title: str, rows: Sequence[Content], owners: Sequence[str], directory: Place) -> None:
    """Shares of answers kept: a group of bars a merge or checkpoint, a bar an owner, with 95 % intervals (Wilson)."""
    merges = [row for row in rows if not _is_source(row["plan"])]
    shown = [*merges[:_MOST_KEPT], *(row for row in rows if _is_source(row["plan"]))]
    figure, axis = _of_labels([row["label"] for row in shown], 0.13 * max(2, len(owners)))
    height = 0.8 / len(owners)
    for index, owner in enumerate(owners):
        shares = [row["retention"][owner] for row in shown]
        bounds = [_wilson(share, row["num_probes"]) for share, row in zip(shares, shown, strict=True)]
        errors = [[100 * (s - low) for s, (low, _) in zip(shares, bounds, strict=True)],
                  [100 * (high - s) for s, (_, high) in zip(shares, bounds, strict=True)]]  # fmt: skip
        places = [place + (index - (len(owners) - 1) / 2) * height for place in range(len(shown))]
        axis.barh(places, [100 * share for share in shares], height, xerr=errors, label=owner,
                  error_kw={"lw": 0.8, "capsize": 2})  # fmt: skip
    axis.set_xlim(0, 105)
    axis.set_xlabel("% of a member's own answers that are kept (95 % intervals)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    title_above(figure, title)
    save_figure(figure, directory / FIGURES, "kept.png")


def _of_labels(labels: Sequence[str], line: float) -> tuple[Any, Any]:
    """A figure with a row for each label, whole, from the top; line: inches of a line of text at least."""
    texts = [wrapped(label) for label in labels]
    lines = max(text.count("\n") + 1 for text in texts)
    figure, ((axis,),) = new_figure(8.6, 1.7 + len(texts) * max(0.1 + line, 0.1 + 0.2 * lines))
    figure.set_layout_engine("constrained")
    axis.set_yticks(range(len(texts)), texts)
    axis.set_ylim(len(texts) - 0.5, -0.5)
    return figure, axis


def _wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of so many. Wilson 1927."""
    middle = share + _Z95**2 / (2 * count)
    half = _Z95 * (share * (1 - share) / count + _Z95**2 / (4 * count**2)) ** 0.5
    scale = 1 + _Z95**2 / count
    return min(share, (middle - half) / scale), max(share, (middle + half) / scale)
