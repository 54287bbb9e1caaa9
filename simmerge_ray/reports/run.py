"""`report.md` of a run, with figures, from the files of its stages. A part whose files are missing is left out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.markdown import number, with_interval
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import Manifest, Place, digest_file, name_below, read_json, versions, write_atomically
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.plans.keeping import keep_label
from simmerge_ray.reports.choices import choices_part
from simmerge_ray.reports.figures import grouped_bars, legend_below, new_figure, save_figure, write_overview
from simmerge_ray.reports.headroom import headroom_part, page, table_block
from simmerge_ray.search.labels import LabeledPlan, LabelStore, single_items
from simmerge_ray.signals.table import SignalTable, read_signal_table

_POLICIES = {
    "uniform": "arm drawn at random",
    "best_fixed": "best fixed arm of the training part",
    "selector": "selector",
    "oracle": "split-half oracle",
}


def write_report(layout: RunLayout[Any]) -> Place:
    """Write `report/report.md` and its PNG files; returns the path of the former. Raises ConfigError: the directory
    holds no run."""
    if not (layout.signals.exists() or layout.headroom.exists()):
        raise ConfigError(f"{layout.root} holds neither signals nor labels; run `simmerge demo` or the stages first")
    started = time.monotonic()
    parts: list[str] = ["# What this run found"]
    catalogue = load_catalogue(layout.catalogue) if layout.catalogue.exists() else None
    labels = LabelStore(layout.labels).read()
    pick = layout.pick / "pick.json"
    choices = layout.choices / "choices.json"
    told = (
        (choices, choices_part),
        (pick, _pick_part),
        (layout.crossval, _selector_part),
        (layout.headroom, _headroom_part),
    )
    for path, part in told:
        if path.exists():
            parts += part(read_json(path), layout.report)
    if labels and catalogue:
        parts += _zoo_part(labels, catalogue)
        if layout.headroom.exists() and (layout.zoo / "zoo.json").exists():
            parts += _demo_criteria_part(labels, catalogue, read_json(layout.headroom))
    if layout.signals.exists():
        parts += _signals_part(read_signal_table(layout.signals), layout.report)
    parts += ["## Made with", ", ".join(f"{name} {version}" for name, version in versions().items())]
    write_atomically(layout.report / "report.md", page(parts))
    read = (layout.signals, layout.headroom, layout.crossval, choices, pick)
    inputs = {name_below(path, layout.root): digest_file(path) for path in read if path.exists()}
    Manifest("report", {}, inputs).write(layout.report / "report.json", time.monotonic() - started, {})
    return layout.report / "report.md"


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
    _draw_pick(pick, ranked, items, directory)
    keeps = ", ".join(
        f"{number(100 * share, digits=0)} % of the answers of {own}" for own, share in pick["keeps"].items()
    )
    best = max(measured["checkpoints"], key=lambda name: _mean(measured["checkpoints"][name]))
    written = f" From disk the written checkpoint scores {loaded}." if loaded else " Nothing was merged."
    return [
        f"## The pick for {left} + {right}: {answer['label']}",
        "This pair was left out of the search and of the training. **The pick** is what `simmerge auto` answers from "
        f"checkpoints and probes, without any label; it keeps {keeps}. It was written, and only then was everything "
        f"below measured ({items}). The paper's selector, trained on the labels of the other pairs, predicts a utility "
        f"for each arm and picks **{pick['arm']}** ({pick['reason']}).",
        table_block(["", "predicted, both tasks", "measured, both tasks", *tasks], rows),
        f"Best single checkpoint on both tasks together: {best}.{written}",
        "![Predicted and measured utility of the pick](pick.png)",
    ]


def _mean(by_task: Mapping[str, float]) -> float:
    return float(np.mean([by_task[task] for task in sorted(by_task)]))


def _draw_pick(pick: Mapping[str, Any], ranked: Sequence[str], items: str, directory: Place) -> None:
    measured = pick["measured"]
    figure, ((axis,),) = new_figure(6.4, 3.2)
    places = np.arange(len(ranked))
    utilities, sds = ([pick["predicted"][arm][key] for arm in ranked] for key in ("utility", "sd"))
    axis.errorbar(places - 0.12, utilities, yerr=sds, fmt="o", label="predicted by the selector (± sd)")
    axis.plot(places + 0.12, [_mean(measured["arms"][arm]) for arm in ranked], "s", label="measured afterwards")
    for (name, by_task), style in zip(measured["checkpoints"].items(), ("--", ":", "-."), strict=False):
        axis.axhline(_mean(by_task), ls=style, c="grey", lw=1, label=name)
    for (name, by_task), colour in zip(measured["chosen"].items(), ("C2", "C3"), strict=False):
        axis.axhline(_mean(by_task), c=colour, lw=1.4, label=name)
    axis.set_xticks(places, ranked, rotation=12)
    axis.set_ylabel("utility, both tasks")
    axis.set_title(items, fontsize=9)
    legend_below(axis)
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
    figure, ((axis, scatter),) = new_figure(9.6, 3.4, columns=2)
    series = {f"one arm {title}": [part[key] for key in _POLICIES] for title, part in parts.items()}
    grouped_bars(axis, ["uniform", "best fixed", "selector", "oracle"], series)
    axis.set_ylabel("GapClosed")
    items = f"{crossval['num_defined']} contexts, at least {crossval['min_items']} items each"
    axis.set_title(f"unseen checkpoints: {items}", fontsize=9)
    legend_below(axis)
    for index, arm in enumerate(crossval["arms"]):
        both = ([row[key][index] for row in crossval["predictions"]] for key in ("predicted", "measured"))
        scatter.plot(*both, ".", ms=4, alpha=0.6, label=arm)
    scatter.plot([0, 1], [0, 1], c="grey", lw=0.8)
    scatter.set_title("each merge on each task, predicted without it", fontsize=9)
    scatter.set_xlabel("predicted utility")
    scatter.set_ylabel("measured utility")
    legend_below(scatter)
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
    figure, ((axis,),) = new_figure(9.6, 3.4)
    grouped_bars(axis, [f"{name}\n({task['num_contexts']} contexts)" for name, task in by_task.items()], series)
    axis.set_ylabel("GapClosed")
    axis.set_title(f"at least {room['min_items']} items per task", fontsize=9)
    legend_below(axis)
    save_figure(figure, directory, "operators.png")
    return [*blocks, "![GapClosed per operator and task](operators.png)"]


def _zoo_part(labels: Sequence[LabeledPlan], catalogue: Catalogue) -> list[str]:
    singles = single_items(labels)
    tasks = sorted({task for _, task in singles})
    rows = []
    for ref in catalogue.all_refs:
        cells: list[Any] = [ref.id]
        for task in tasks:
            items = singles.get((ref.id, task))
            shown = "" if items is None else f"{items.mean():.3f}"
            cells.append(f"**{shown}**" if task == catalogue.own_task.get(ref.id) else shown)
        rows.append(cells)
    utilities = table_block(["checkpoint", *tasks], rows)
    return ["## The checkpoints", "Utility on each task, the own one in bold.", utilities]


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
