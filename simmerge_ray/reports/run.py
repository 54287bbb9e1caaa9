"""`report.md` of a run, with figures, from the files of its stages. A part whose files are missing is left out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.markdown import number, with_interval
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import Manifest, Place, digest_file, name_below, read_json
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.plans.keeping import keep_label
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.reports.choices import choices_part
from simmerge_ray.reports.figures import (
    FIGURES,
    grouped_bars,
    legend_below,
    new_figure,
    save_figure,
    title_above,
    write_overview,
)
from simmerge_ray.reports.found import Estimate, auto_parts, draw_estimates, made_with
from simmerge_ray.reports.headroom import headroom_part
from simmerge_ray.reports.page import table_block, write_page
from simmerge_ray.search.labels import LabeledPlan, LabelStore, Measured, single_items
from simmerge_ray.search.objectives import MEAN, Objective
from simmerge_ray.search.winner import difference
from simmerge_ray.signals.table import SignalTable, read_signal_table
from simmerge_ray.signals.table_files import digest_table

_ANSWER = "auto.json"  # of `simmerge auto`, in its directory
_NUM_MERGES = 12  # shown of the measured ones
_POLICIES = {
    "uniform": "arm drawn at random",
    "best_fixed": "best fixed arm of the training part",
    "selector": "selector",
    "oracle": "split-half oracle",
}


def write_report(layout: RunLayout[Any]) -> Place:
    """Write `report/report.md` and its PNG files; returns the path of the former. Raises ConfigError: the directory
    holds no run."""
    answer = layout.root / _ANSWER
    labels = LabelStore(layout.labels).read() if layout.labels.exists() else []
    if not (layout.signals.exists() or layout.headroom.exists() or labels or answer.exists()):
        raise ConfigError(f"{layout.root} holds neither signals nor labels; run `simmerge demo` or the stages first")
    started = time.monotonic()
    parts: list[str] = [] if answer.exists() else ["# What this run found"]
    catalogue = load_catalogue(layout.catalogue) if layout.catalogue.exists() else None
    table = read_signal_table(layout.signals) if layout.signals.exists() else None
    pick = layout.pick / "pick.json"
    choices = layout.choices / "choices.json"
    told = (
        (answer, auto_parts),
        (pick, _pick_part),
        (choices, choices_part),
        (layout.crossval, _selector_part),
        (layout.headroom, _headroom_part),
    )
    for path, part in told:
        if path.exists():
            parts += part(read_json(path), layout.report)
    if labels:
        own_task = catalogue.own_task if catalogue else table.provenance["own_task"] if table else {}
        parts += [*_merges_part(labels, layout.report), *_checkpoints_part(labels, own_task)]
        if catalogue and layout.headroom.exists() and (layout.zoo / "zoo.json").exists():
            parts += _demo_criteria_part(labels, catalogue, read_json(layout.headroom))
    if table is not None:
        parts += _signals_part(table, layout.report)
    parts += made_with()
    path = write_page(layout.report, parts)
    read = (layout.headroom, layout.crossval, choices, pick, answer)
    inputs = {name_below(path, layout.root): digest_file(path) for path in read if path.exists()}
    if table is not None:
        inputs = {name_below(layout.signals, layout.root): digest_table(layout.signals)} | inputs
    Manifest("report", {}, inputs).write(layout.report / "report.json", time.monotonic() - started, {})
    return path


def _pick_part(pick: Mapping[str, Any], directory: Place) -> list[str]:
    left, right = pick["pair"]
    tasks = sorted(pick["num_items"])
    predicted, measured, answer = pick["predicted"], pick["measured"], pick["answer"]
    ranked = sorted(predicted, key=lambda arm: -predicted[arm]["utility"])
    items = ", ".join(f"{pick['num_items'][task]} items of {task}" for task in tasks)

    def row(name: str, by_task: Mapping[str, float], value: str = "") -> list[Any]:
        return [name, value, _mean(by_task), *(by_task[task] for task in tasks)]

    rows = [row(f"**{name}**", by_task) for name, by_task in measured["chosen"].items()]
    for arm in ranked:
        remarks = [
            said for said, key in (("the selector's pick", "arm"), ("best fixed", "best_fixed")) if arm == pick[key]
        ]
        value = f"{predicted[arm]['utility']:.3f} ± {predicted[arm]['sd']:.3f}"
        rows.append(row(", ".join([arm, *remarks]), measured["arms"][arm], value))
    for name, by_task in measured["checkpoints"].items():
        if keep_label(name) not in predicted:
            rows.append(row(f"parent {name}" if name in pick["pair"] else name, by_task))
    loaded = "; ".join(
        f"{task} " + ", ".join(f"{value:.3f} ({library})" for library, value in pick["loaded"][task].items())
        for task in sorted(pick["loaded"])
    )
    _draw_pick(pick, ranked, directory)
    keeps = ", ".join(
        f"{number(100 * share, digits=0)} % of the answers of {own}" for own, share in pick["keeps"].items()
    )
    best = max(measured["checkpoints"], key=lambda name: _mean(measured["checkpoints"][name]))
    written = f" From disk the written checkpoint scores {loaded}." if loaded else " Nothing was merged."
    worth = _mean(measured["chosen"][next(reversed(measured["chosen"]))])
    rival = _mean(measured["checkpoints"][best])
    verdict = f"merge: {answer['label']}" if worth > rival else f"keep {best}"
    # Of items that are right or wrong, taken to be independent: the pairs of items are not kept.
    errors = [
        sum(u * (1 - u) / pick["num_items"][task] for task, u in of.items()) / len(of) ** 2
        for of in (list(measured["chosen"].values())[-1], measured["checkpoints"][best])
    ]
    near = abs(worth - rival) <= 2 * float(np.sqrt(sum(errors)))
    told = " Within two standard errors: these items do not tell the two apart." if near else ""
    return [
        f"## The pick for {left} + {right}: {answer['label']}",
        f"**Measured on both tasks, verdict: {verdict}.** The answer measures {worth:.3f}, the best checkpoint as it "
        f"is, {best}, {rival:.3f}.{told}",
        "This pair was left out of the search and of the training. **The pick** is what `simmerge auto` answers from "
        f"checkpoints and probes, without any label; it keeps {keeps}. It was written, and only then was everything "
        f"below measured ({items}). The paper's selector, trained on the labels of the other pairs, predicts a utility "
        f"for each arm and picks **{pick['arm']}** ({pick['reason']}).",
        table_block(["", "predicted, both tasks", "measured, both tasks", *tasks], rows),
        written.strip(),
        "![Predicted and measured utility of the pick](pick.png)",
    ]


def _mean(by_task: Mapping[str, float]) -> float:
    return float(np.mean([by_task[task] for task in sorted(by_task)]))


def _draw_pick(pick: Mapping[str, Any], ranked: Sequence[str], directory: Place) -> None:
    measured = pick["measured"]
    figure, ((axis,),) = new_figure(8.6, 4.4)
    figure.set_layout_engine("constrained")
    places = np.arange(len(ranked))
    utilities, sds = ([pick["predicted"][arm][key] for arm in ranked] for key in ("utility", "sd"))
    values = [_mean(measured["arms"][arm]) for arm in ranked]
    axis.errorbar(places - 0.12, utilities, yerr=sds, fmt="o", ms=7, label="predicted by the selector (± sd)")
    axis.plot(places + 0.12, values, "s", ms=7, label="measured afterwards")
    for (name, by_task), style in zip(measured["checkpoints"].items(), ("--", ":", "-."), strict=False):
        axis.axhline(_mean(by_task), ls=style, c="grey", lw=1.2, label=name)
    for (name, by_task), colour in zip(measured["chosen"].items(), ("C2", "C5"), strict=False):
        axis.axhline(_mean(by_task), c=colour, lw=1.6, label=name)
    axis.set_xticks(places, ranked, rotation=12)
    axis.set_ylabel("utility, mean of both tasks")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    best = max(measured["checkpoints"], key=lambda name: _mean(measured["checkpoints"][name]))
    answer, pick_of = next(reversed(measured["chosen"].values())), measured["arms"][pick["arm"]]
    title_above(
        figure,
        f"Chosen without labels {_mean(answer):.3f}, the best checkpoint, {best}, "
        f"{_mean(measured['checkpoints'][best]):.3f}, the selector's pick {_mean(pick_of):.3f}",
    )
    save_figure(figure, directory, "pick.png")


def _selector_part(crossval: Mapping[str, Any], directory: Place) -> list[str]:
    heading = "## The selector on checkpoints it was not trained on"
    if "reason" in crossval:
        return [heading, f"Not measured: {crossval['reason']}."]
    parts, gains = {"per merge": crossval["per_merge"], "per task": crossval["per_context"]}, []
    for title, part in parts.items():
        low, high = part["gain_interval"] or (0.0, 0.0)
        verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
        gain = with_interval(part["gain"], part["gain_interval"], signed=True)
        gains.append(f"- One arm {title}: selector minus best fixed {gain}, 95 % interval over checkpoints: {verdict}.")
    figure, ((axis, scatter),) = new_figure(11.0, 4.8, columns=2)
    figure.set_layout_engine("constrained")
    known = {title: part for title, part in parts.items() if part["gain_interval"] is not None}
    for place, part in enumerate(known.values()):
        axis.plot(part["gain_interval"], [place, place], c="C0", lw=1.6)
        axis.plot(part["gain"], place, "o", c="C0", ms=8)
    axis.axvline(0, c="black", lw=0.8)
    axis.set_yticks(range(len(known)), [f"one arm {title}" for title in known])
    axis.set_ylim(max(1, len(known)) - 0.5, -0.5)
    axis.set_xlabel("GapClosed of the selector - best fixed arm (95 %)")
    items = f"{crossval['num_defined']} contexts, at least {crossval['min_items']} items each"
    axis.set_title(f"unseen checkpoints: {items}")
    for index, arm in enumerate(crossval["arms"]):
        both = ([row[key][index] for row in crossval["predictions"]] for key in ("predicted", "measured"))
        scatter.plot(*both, ".", ms=6, alpha=0.6, label=arm)
    scatter.plot([0, 1], [0, 1], c="grey", lw=0.8)
    scatter.set_title("each merge on each task, predicted without it")
    scatter.set_xlabel("predicted utility")
    scatter.set_ylabel("measured utility")
    legend_below(scatter)
    merge = parts["per merge"]
    said = with_interval(merge["gain"], merge["gain_interval"], signed=True)
    title_above(figure, f"One arm per merge: the selector closes {said} more of the gap than the best fixed arm")
    save_figure(figure, directory, "selector.png")
    return [
        heading,
        f"Each checkpoint is left out in turn with all its pairs; {crossval['num_contexts']} contexts (pair, task), "
        f"{crossval['num_defined']} with a defined GapClosed. *One arm per merge* serves both parents' tasks: the "
        "headline; *one arm per task* may take another arm for each.",
        table_block(
            ["GapClosed", *(f"one arm {title}" for title in parts)],
            [[shown, *(part[key] for part in parts.values())] for key, shown in _POLICIES.items()],
        ),
        "\n".join(gains),
        "![Selector against best fixed and oracle](selector.png)",
    ]


def _headroom_part(room: Mapping[str, Any], directory: Place) -> list[str]:
    blocks = headroom_part(room)
    if "undefined" in room:
        return blocks
    by_task = room["per_context"]["tasks"]
    series = {arm: [task["arm_gap_closed"][arm] for task in by_task.values()] for arm in room["arm_gap_closed"]}
    series["split-half oracle"] = [task["split_half_oracle"] for task in by_task.values()]
    figure, ((axis,),) = new_figure(11.0, 4.6)
    figure.set_layout_engine("constrained")
    bounds = None
    if all("intervals" in task for task in by_task.values()):  # runs of an earlier version have none
        names = dict(zip(series, [*room["arm_gap_closed"], ""], strict=True))  # of the oracle: ""
        none = [float("nan")] * 2
        bounds = {
            shown: [task["intervals"][name] or none for task in by_task.values()] for shown, name in names.items()
        }
    grouped_bars(axis, [f"{name}\n({task['num_contexts']} contexts)" for name, task in by_task.items()], series, bounds)
    axis.set_ylabel("GapClosed, 95 % intervals")
    legend_below(axis)
    context = room["per_context"]
    said = with_interval(context["gain"], context["gain_interval"], signed=True)
    title_above(figure, f"An oracle closes {said} more of the gap than the best fixed arm, {context['best_fixed_arm']}")
    save_figure(figure, directory, "operators.png")
    return [*blocks, "![GapClosed per operator and task](operators.png)"]


def _checkpoints_part(labels: Sequence[LabeledPlan], own_task: Mapping[str, str | None]) -> list[str]:
    """Every checkpoint as it is; own_task: of those that have one."""
    singles = single_items(labels)
    tasks, rows = sorted({task for _, task in singles}), []
    for name in dict.fromkeys(sorted(name for name, _ in singles)):
        cells: list[Any] = [name]
        for task in tasks:
            items = singles.get((name, task))
            shown = "" if items is None else f"{items.mean():.3f}"
            cells.append(f"**{shown}**" if task == own_task.get(name) else shown)
        rows.append(cells)
    utilities = table_block(["checkpoint", *tasks], rows)
    return ["## The checkpoints", "Utility on each task, the own one in bold.", utilities] if rows else []


def _merges_part(labels: Sequence[LabeledPlan], directory: Place) -> list[str]:
    """The merges that gain most, each beside the best checkpoint as it is on the same tasks and items."""
    singles = single_items(labels)
    merges: dict[MergePlan, dict[str, np.ndarray]] = {}
    for label in labels:
        if label.plan.is_merge and isinstance(label.outcome, Measured):
            merges.setdefault(label.plan, {})[label.task] = label.outcome.items
    found = []
    for plan, items in merges.items():
        rivals = {
            name: {task: singles[name, task] for task in items}
            for name in sorted({name for name, _ in singles})
            if all(len(singles.get((name, task), ())) == len(values) for task, values in items.items())
        }
        if rivals:
            best = max(rivals, key=lambda name: _mean_of(rivals[name]))
            gain = difference(items, rivals[best], Objective(MEAN))
            found.append((plan.label, items, best, _mean_of(rivals[best]), gain))
    if not found:
        return []
    found.sort(key=lambda one: -one[-1].value)
    shown = found[:_NUM_MERGES]
    clear = sum(gain.value > 0 and gain.is_clear for *_, gain in found)
    finding = f"{clear} of {len(found)} measured merges clearly beat the best checkpoint on their tasks"
    bars = [Estimate(label, gain.value, gain.se, gain.is_clear, True) for label, *_, gain in shown]
    unit = "utility of the merge - that of the best checkpoint on the same items"
    draw_estimates(bars, finding, unit, directory, "merges", zero=True)
    rows = [
        [label, ", ".join(sorted(items)), _mean_of(items), best, value, f"{gain.value:+.3f} ± {gain.se:.3f}"]
        for label, items, best, value, gain in shown
    ]
    return [
        "## The measured merges",
        f"{finding}, by more than two paired standard errors. Each merge stands beside the best checkpoint as it is, "
        f"the base among them, on the same tasks and items; the best of many is too good by chance. The first "
        f"{len(shown)}:",
        f"![{finding}]({FIGURES}/merges.png)",
        table_block(["merge", "tasks", "utility", "best checkpoint there", "its utility", "gain ± se"], rows),
    ]


def _mean_of(items: Mapping[str, np.ndarray]) -> float:
    return float(np.mean([values.mean() for values in items.values()]))


def _demo_criteria_part(labels: Sequence[LabeledPlan], catalogue: Catalogue, room: Mapping[str, Any]) -> list[str]:
    """What the recipe of the demo zoo was made to reach, and what this run measured."""
    if "undefined" in room:
        return []
    singles = single_items(labels)
    own = {
        ref.id: float(singles[ref.id, task].mean())
        for ref in catalogue.checkpoints
        if (task := catalogue.own_task[ref.id])
    }
    margins = {}
    for ref in catalogue.checkpoints:
        task = catalogue.own_task[ref.id]
        strong = [o for o in catalogue.ids if o.endswith("-strong") and catalogue.own_task[o] != task]
        if task and strong:
            margins[ref.id] = own[ref.id] - max(float(singles[other, task].mean()) for other in strong)
    context = room["per_context"]
    often = [arm for arm, share in context["arm_win_share"].items() if share >= 0.05]
    gain = with_interval(context["gain"], context["gain_interval"])
    weakest = min(own, key=lambda name: own[name])
    rows: list[list[Any]] = [
        ["lowest utility of an expert on its own task", ">= 0.8", f"{own[weakest]:.3f} ({weakest})"],
        ["items per task", ">= 400", room["min_items"]],
        ["GapClosed of the best fixed arm", ">= 0.4", context["best_fixed"]],
        ["split-half oracle minus best fixed", ">= 0.05, interval above 0", gain],
        ["arms clearly best in 5 % of the contexts", ">= 3", f"{len(often)}: {', '.join(often)}"],
    ]
    if margins:
        closest = min(margins, key=lambda name: margins[name])
        margin = f"{margins[closest]:.3f} ({closest})"
        rows.insert(1, ["smallest lead over other tasks' strong experts there", "well above 0", margin])
    return ["What the zoo was made to reach:", table_block(["", "asked", "measured"], rows)]


def _signals_part(signals: SignalTable, directory: Place) -> list[str]:
    write_overview(signals, directory, "signals.png")
    return [
        "## Signals",
        f"{len(signals.rows)} rows (ordered pair x task) of {len(signals.columns)} features; means over the "
        f"{len(signals.tasks)} tasks' probes:",
        "![Signals of all pairs](signals.png)",
    ]
