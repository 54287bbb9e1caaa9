"""`report.md` of a run, with figures, from the files of its stages. A part whose files are missing is left out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import Manifest, Place, digest_file, name_below, read_json, versions, write_atomically
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.reports.figures import legend_below, new_figure, save_figure
from simmerge_ray.search.labels import LabeledPlan, LabelStore, single_items
from simmerge_ray.signals.table import SignalTable, read_signal_table

_HEAT_MAPS = (
    ("kl_lr_mean", "KL(row || column), nats"),
    ("activation_cosine_mean", "cosine of activations"),
    ("attention_cosine_mean", "cosine of attention"),
    ("weight_cosine_global", "cosine of weights"),
    ("task_vector_cosine_global", "cosine of task vectors"),
    ("weight_l2_global", "l2 of weights / |base|"),
)


def write_report(layout: RunLayout[Any]) -> Place:
    """Write `report/report.md` and its PNG files; returns the path of the former.

    Raises:
        ConfigError: the directory holds no run.
    """
    if not (layout.signals.exists() or layout.headroom.exists()):
        raise ConfigError(f"{layout.root} holds neither signals nor labels; run `simmerge demo` or the stages first")
    started = time.monotonic()
    parts: list[str] = ["# What this run found", ""]
    catalogue = load_catalogue(layout.catalogue) if layout.catalogue.exists() else None
    labels = LabelStore(layout.labels).read()
    if (layout.pick / "pick.json").exists():
        parts += _pick_part(read_json(layout.pick / "pick.json"), layout.report)
    if layout.crossval.exists():
        parts += _selector_part(read_json(layout.crossval), layout.report)
    if layout.headroom.exists():
        parts += _headroom_part(read_json(layout.headroom), layout.report)
    if labels and catalogue:
        parts += _zoo_part(labels, catalogue)
        if layout.headroom.exists() and (layout.zoo / "zoo.json").exists():
            parts += _demo_criteria_part(labels, catalogue, read_json(layout.headroom))
    if layout.signals.exists():
        parts += _signals_part(read_signal_table(layout.signals), catalogue, layout.report)
    parts += ["## Made with", "", ", ".join(f"{name} {version}" for name, version in versions().items()), ""]
    write_atomically(layout.report / "report.md", "\n".join(parts).encode())
    read = (layout.signals, layout.headroom, layout.crossval, layout.pick / "pick.json")
    inputs = {name_below(path, layout.root): digest_file(path) for path in read if path.exists()}
    Manifest("report", {}, inputs).write(layout.report / "report.json", time.monotonic() - started, {})
    return layout.report / "report.md"


def table_lines(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table; floats with three digits."""
    shown = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in shown), ""]


def _interval(interval: Sequence[float] | None) -> str:
    return "[no interval]" if interval is None else f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _sign(interval: Sequence[float] | None) -> int:
    """1 or -1 where the whole interval lies on that side of zero, else 0."""
    if interval is None:
        return 0
    return 1 if interval[0] > 0 else -1 if interval[1] < 0 else 0


def _pick_part(pick: Mapping[str, Any], directory: Place) -> list[str]:
    left, right = pick["pair"]
    tasks = sorted(pick["num_items"])
    measured, parents = pick["measured"]["arms"], pick["measured"]["parents"]
    means = {arm: float(np.mean([by_task[t] for t in tasks])) for arm, by_task in measured.items()}
    ranked = sorted(pick["predicted"], key=lambda arm: -pick["predicted"][arm]["utility"])
    best_parent = max(parents, key=lambda p: np.mean([parents[p][t] for t in tasks]))
    items = ", ".join(f"{pick['num_items'][task]} items of {task}" for task in tasks)
    lines = [
        f"## The pick: {pick['arm']} for {left} + {right}",
        "",
        f"This pair was left out of the search and of the training. The selector chose **{pick['arm']}** from the "
        f"signals alone; the merge was written, and only then was everything below measured ({items}).",
        "",
    ]
    rows: list[list[Any]] = []
    for arm in ranked:
        names = [
            arm,
            *(["picked"] if arm == pick["arm"] else []),
            *(["best fixed"] if arm == pick["best_fixed"] else []),
        ]
        predicted = pick["predicted"][arm]
        rows.append(
            [", ".join(names), f"{predicted['utility']:.3f} ± {predicted['sd']:.3f}", means[arm]]
            + [measured[arm][task] for task in tasks]
        )
    for parent in (left, right):
        values = [parents[parent][task] for task in tasks]
        rows.append([f"parent {parent}", "", float(np.mean(values)), *values])
    lines += table_lines(["", "predicted, both tasks", "measured, both tasks", *tasks], rows)
    lines += [
        f"Best single checkpoint on both tasks together: {best_parent}. From disk the written checkpoint scores "
        + "; ".join(
            f"{task} " + ", ".join(f"{value:.3f} ({library})" for library, value in pick["loaded"][task].items())
            for task in tasks
        )
        + ".",
        "",
    ]
    figure, axes = new_figure(6.4, 3.2)
    axis = axes[0][0]
    positions = np.arange(len(ranked))
    axis.errorbar(
        positions - 0.12,
        [pick["predicted"][arm]["utility"] for arm in ranked],
        yerr=[pick["predicted"][arm]["sd"] for arm in ranked],
        fmt="o",
        label="predicted (± sd of the ensemble)",
    )
    axis.plot(positions + 0.12, [means[arm] for arm in ranked], "s", label="measured afterwards")
    for parent, style in zip((left, right), ("--", ":"), strict=True):
        axis.axhline(np.mean([parents[parent][t] for t in tasks]), ls=style, c="grey", lw=1, label=f"parent {parent}")
    axis.set_xticks(positions, ranked, rotation=12)
    axis.set_ylabel("utility, both tasks")
    axis.set_title(items, fontsize=9)
    legend_below(axis)
    save_figure(figure, directory, "pick.png")
    return [*lines, "![Predicted and measured utility of the pick](pick.png)", ""]


def _selector_part(crossval: Mapping[str, Any], directory: Place) -> list[str]:
    lines = ["## The selector on checkpoints it was not trained on", ""]
    if "reason" in crossval:
        return [*lines, f"Not measured: {crossval['reason']}.", ""]
    names = {
        "uniform": "arm drawn at random",
        "best_fixed": "best fixed arm of the training part",
        "selector": "selector",
        "oracle": "split-half oracle",
    }
    lines += [
        f"Each checkpoint is left out in turn with all its pairs; {crossval['num_contexts']} contexts (pair, task), "
        f"{crossval['num_defined']} with a defined GapClosed. *One arm per merge* serves both parents' tasks: the "
        "headline; *one arm per task* may take another arm for each.",
        "",
    ]
    merge, context = crossval["per_merge"], crossval["per_context"]
    lines += table_lines(
        ["GapClosed", "one arm per merge", "one arm per task"],
        [[shown, merge[key], context[key]] for key, shown in names.items()],
    )
    for title, part in (("per merge", merge), ("per task", context)):
        verdict = {1: "better", -1: "worse", 0: "not distinguishable"}[_sign(part["gain_interval"])]
        lines += [
            f"- one arm {title}: selector minus best fixed {part['gain']:+.3f}, 95 % interval over checkpoints "
            f"{_interval(part['gain_interval'])}: {verdict}."
        ]
    figure, axes = new_figure(9.6, 3.4, columns=2)
    axis = axes[0][0]
    width = 0.38
    for offset, (title, part) in zip(
        (-width / 2, width / 2), (("per merge", merge), ("per task", context)), strict=True
    ):
        axis.bar(np.arange(4) + offset, [part[key] for key in names], width, label=f"one arm {title}")
    axis.set_xticks(np.arange(4), ["uniform", "best fixed", "selector", "oracle"])
    axis.set_ylabel("GapClosed")
    items = f"{crossval['num_defined']} contexts, at least {crossval['min_items']} items each"
    axis.set_title(f"unseen checkpoints: {items}", fontsize=9)
    legend_below(axis)
    axis = axes[0][1]
    for index, arm in enumerate(crossval["arms"]):
        predicted = [row["predicted"][index] for row in crossval["predictions"]]
        measured = [row["measured"][index] for row in crossval["predictions"]]
        axis.plot(predicted, measured, ".", ms=4, alpha=0.6, label=arm)
    axis.plot([0, 1], [0, 1], c="grey", lw=0.8)
    axis.set_title("each merge on each task, predicted without it", fontsize=9)
    axis.set_xlabel("predicted utility")
    axis.set_ylabel("measured utility")
    legend_below(axis)
    save_figure(figure, directory, "selector.png")
    return [*lines, "", "![Selector against best fixed and oracle](selector.png)", ""]


def _headroom_part(room: Mapping[str, Any], directory: Place) -> list[str]:
    lines = ["## Is there anything to choose?", ""]
    if "undefined" in room:
        return [*lines, f"GapClosed is not defined: {room['undefined']}.", ""]
    context, merge = room["per_context"], room["per_merge"]
    lines += [
        f"{room['num_defined']} of {room['num_contexts']} contexts (pair, task) have parents that differ enough; "
        f"at least {room['min_items']} items per task. GapClosed of each arm taken everywhere, and the share of "
        "contexts in which it beats every other arm by two paired standard errors:",
        "",
    ]
    rows = [
        [arm, value, context["arm_win_share"][arm], merge["arm_win_share"][arm]]
        for arm, value in sorted(room["arm_gap_closed"].items(), key=lambda entry: -entry[1])
    ]
    lines += table_lines(["arm", "GapClosed", "clearly best per task", "clearly best per merge"], rows)
    for title, part in (("per task", context), ("per merge", merge)):
        lines += [
            f"- one arm {title}: best fixed ({part['best_fixed_arm']}) {part['best_fixed']:.3f}, split-half oracle "
            f"{part['split_half_oracle']:.3f}, headroom {part['gain']:+.3f} {_interval(part['gain_interval'])}"
            + ("." if _sign(part["gain_interval"]) > 0 else ", within noise.")
        ]
    tasks = list(context["tasks"])
    arms = list(room["arm_gap_closed"])
    figure, axes = new_figure(9.6, 3.4)
    axis = axes[0][0]
    width = 0.8 / (len(arms) + 1)
    for index, arm in enumerate([*arms, "split-half oracle"]):
        values = [
            context["tasks"][t]["split_half_oracle"]
            if index == len(arms)
            else context["tasks"][t]["arm_gap_closed"][arm]
            for t in tasks
        ]
        axis.bar(np.arange(len(tasks)) + (index - len(arms) / 2) * width, values, width, label=arm)
    axis.axhline(0, c="black", lw=0.6)
    axis.set_xticks(np.arange(len(tasks)), [f"{t}\n({context['tasks'][t]['num_contexts']} contexts)" for t in tasks])
    axis.set_ylabel("GapClosed")
    axis.set_title(f"at least {room['min_items']} items per task", fontsize=9)
    legend_below(axis)
    save_figure(figure, directory, "operators.png")
    return [*lines, "", "![GapClosed per operator and task](operators.png)", ""]


def _zoo_part(labels: Sequence[LabeledPlan], catalogue: Catalogue) -> list[str]:
    singles = single_items(labels)
    tasks = sorted({task for _, task in singles})
    lines = ["## The checkpoints", "", "Utility on each task, the own one in bold.", ""]
    rows = []
    for ref in catalogue.all_refs:
        cells: list[Any] = [ref.id]
        for task in tasks:
            items = singles.get((ref.id, task))
            shown = "" if items is None else f"{items.mean():.3f}"
            cells.append(f"**{shown}**" if task == catalogue.own_task.get(ref.id) else shown)
        rows.append(cells)
    return lines + table_lines(["checkpoint", *tasks], rows)


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
    low, high = context["gain_interval"] or (float("nan"), float("nan"))
    weakest = min(own, key=lambda name: own[name])
    rows: list[list[Any]] = [
        ["lowest utility of an expert on its own task", ">= 0.8", f"{own[weakest]:.3f} ({weakest})"],
        ["items per task", ">= 400", room["min_items"]],
        ["GapClosed of the best fixed arm", ">= 0.4", context["best_fixed"]],
        [
            "split-half oracle minus best fixed",
            ">= 0.05, interval above 0",
            f"{context['gain']:.3f} [{low:.3f}, {high:.3f}]",
        ],
        ["arms clearly best in 5 % of the contexts", ">= 3", f"{len(often)}: {', '.join(often)}"],
    ]
    if margins:
        closest = min(margins, key=lambda name: margins[name])
        margin = f"{margins[closest]:.3f} ({closest})"
        rows.insert(1, ["smallest lead over other tasks' strong experts there", "well above 0", margin])
    return ["What the zoo was made to reach:", "", *table_lines(["", "asked", "measured"], rows)]


def _signals_part(table: SignalTable, catalogue: Catalogue | None, directory: Place) -> list[str]:
    ids = [name for name in catalogue.ids if name in table.checkpoint_ids] if catalogue else list(table.checkpoint_ids)
    shown = [(column, title) for column, title in _HEAT_MAPS if column in table.columns]
    num_columns = 3
    num_rows = -(-len(shown) // num_columns)
    figure, axes = new_figure(4.4 * num_columns, 3.9 * num_rows, num_columns, num_rows)
    for axis, (column, title) in zip(axes.flat, shown, strict=False):
        values = np.full((len(ids), len(ids)), np.nan)
        for i, left in enumerate(ids):
            for j, right in enumerate(ids):
                if i != j:
                    values[i, j] = np.mean([table.get(left, right, task).features[column] for task in table.tasks])
        image = axis.imshow(values, cmap="viridis")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(ids)), ids, rotation=90, fontsize=6)
        axis.set_yticks(range(len(ids)), ids, fontsize=6)
        figure.colorbar(image, ax=axis, shrink=0.8)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    figure.tight_layout()
    save_figure(figure, directory, "signals.png")
    return [
        "## Signals",
        "",
        f"{len(table.rows)} rows (ordered pair x task) of {len(table.columns)} features; means over the "
        f"{len(table.tasks)} tasks' probes:",
        "",
        "![Signals of all pairs](signals.png)",
        "",
    ]
