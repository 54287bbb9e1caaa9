"""`report.md` of a run, with figures, from the files of its stages. A part whose files are missing is left out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.markdown import with_interval
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import Manifest, Place, digest_file, name_below, read_json, versions, write_atomically
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.plans.keeping import keep_label
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
    told = ((pick, _pick_part), (layout.crossval, _selector_part), (layout.headroom, _headroom_part))
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
    read = (layout.signals, layout.headroom, layout.crossval, pick)
    inputs = {name_below(path, layout.root): digest_file(path) for path in read if path.exists()}
    Manifest("report", {}, inputs).write(layout.report / "report.json", time.monotonic() - started, {})
    return layout.report / "report.md"


def _pick_part(pick: Mapping[str, Any], directory: Place) -> list[str]:
    left, right = pick["pair"]
    tasks = sorted(pick["num_items"])
    predicted, measured, parents = pick["predicted"], pick["measured"]["arms"], pick["measured"]["parents"]
    ranked = sorted(predicted, key=lambda arm: -predicted[arm]["utility"])
    items = ", ".join(f"{pick['num_items'][task]} items of {task}" for task in tasks)

    def mean(by_task: Mapping[str, float]) -> float:
        return float(np.mean([by_task[task] for task in tasks]))

    rows: list[list[Any]] = []
    for arm in ranked:
        remarks = [word for word, key in (("picked", "arm"), ("best fixed", "best_fixed")) if arm == pick[key]]
        value = f"{predicted[arm]['utility']:.3f} ± {predicted[arm]['sd']:.3f}"
        rows.append([", ".join([arm, *remarks]), value, mean(measured[arm]), *(measured[arm][task] for task in tasks)])
    for parent in (left, right):
        if keep_label(parent) in predicted:
            continue
        by_task = parents[parent]
        rows.append([f"parent {parent}", "", mean(by_task), *(by_task[task] for task in tasks)])
    loaded = "; ".join(
        f"{task} " + ", ".join(f"{value:.3f} ({library})" for library, value in pick["loaded"][task].items())
        for task in tasks
    )
    means = {name: mean(by_task) for name, by_task in (measured | parents).items()}
    _draw_pick(pick, ranked, means, items, directory)
    return [
        f"## The pick: {pick['arm']} for {left} + {right}",
        f"This pair was left out of the search and of the training. The selector chose **{pick['arm']}** from the "
        f"signals alone; the checkpoint was written, and only then was everything below measured ({items}).",
        table_block(["", "predicted, both tasks", "measured, both tasks", *tasks], rows),
        f"Best single checkpoint on both tasks together: {max(parents, key=lambda name: means[name])}. From disk the "
        f"written checkpoint scores {loaded}.",
        "![Predicted and measured utility of the pick](pick.png)",
    ]


def _draw_pick(
    pick: Mapping[str, Any], ranked: Sequence[str], means: Mapping[str, float], items: str, directory: Place
) -> None:
    figure, ((axis,),) = new_figure(6.4, 3.2)
    places = np.arange(len(ranked))
    utilities, sds = ([pick["predicted"][arm][key] for arm in ranked] for key in ("utility", "sd"))
    axis.errorbar(places - 0.12, utilities, yerr=sds, fmt="o", label="predicted (± sd of the ensemble)")
    axis.plot(places + 0.12, [means[arm] for arm in ranked], "s", label="measured afterwards")
    for parent, style in zip(pick["pair"], ("--", ":"), strict=True):
        axis.axhline(means[parent], ls=style, c="grey", lw=1, label=f"parent {parent}")
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
