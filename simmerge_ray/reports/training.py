"""`report.md` of a training, with figures, from `assessment.json` alone. What could not be computed says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.markdown import number, percent, with_interval
from simmerge_ray.base.storage import Place
from simmerge_ray.plans.keeping import keeps, merge_arms
from simmerge_ray.reports.figures import (
    FIGURES,
    grouped_bars,
    hide_spare,
    legend_below,
    legend_outside,
    new_figure,
    save_figure,
    title_above,
)
from simmerge_ray.reports.headroom import headroom_part, is_above_zero
from simmerge_ray.reports.page import table_block, write_page

Content = Mapping[str, Any]

# What needs no model of the signals: a selector that does not beat these is not worth its signals. What follows then.
_TRIVIAL = {
    "uniform": "The arms hardly differ here, or the selector is no better than chance.",
    "best fixed": "Taking one arm for all merges costs nothing that these labels can show.",
    "best fixed per task": "Knowing the task may be enough; a table of arms by task needs no signals.",
    "better parent": "Keeping the better parent is as good, for whoever knows the measured utility of both parents.",
    "single-signal stump": "One signal and one threshold may do as well.",
    "equal-weight linear": "That fixed arm may do as well.",
    "scale-matched linear": "That fixed arm may do as well.",
}
_CONTROLS = ("single-checkpoint features", "parents' utilities", "signals permuted")
_BARS = ("selector", "selector, safe", "best fixed", "best fixed per task", "better parent", "uniform")
_AXES = {
    "kl_lr_mean": "KL of next tokens (log of nats)",
    "activation_cosine_mean": "cosine of activations",
    "attention_cosine_mean": "cosine of attention",
    "weight_cosine_global": "cosine of weights",
    "weight_l2_global": "l2 of weights / |base| (log)",
    "task_vector_cosine_global": "cosine of task vectors",
}
_SPLIT_MEANING = {
    "random pair": "pairs left out at random; their checkpoints were seen in other pairs",
    "one model unseen": "a checkpoint (or a group) left out with all its pairs",
    "unseen model and base": "all checkpoints of a base left out",
    "unseen domain": "a task left out, with every pair that was measured on it; without task encoding",
}
_NUM_QUANTILES = 5


def write_selector_report(assessment: Content, directory: Place) -> Place:
    """Write `report.md` and `figures/*.png` below a directory; the path of the former."""
    main = assessment["splits"][assessment["headline"]]
    about, figures = [*_data(assessment), *headroom_part(assessment["headroom"])], directory / FIGURES
    if "reason" in main:
        unseen = ["## On checkpoints it was not trained on", f"Not measured: {main['reason']}."]
        parts = [*about, *unseen, *_splits(assessment)]
    else:
        parts = [*_in_short(assessment, main), *about, *_selection(assessment, main), *_domains(main, figures)]
        parts += [*_splits(assessment), *_calibration(assessment, main, figures)]
        parts += [*_importance(assessment, figures), *_ablations(assessment)]
    title = "# The selector and what it can do"
    return write_page(directory, [title, *parts, *_signals(assessment, figures)])


def _in_short(assessment: Content, main: Content) -> list[str]:
    figures = main["policies"]["per_merge"]["policies"]
    selector, safe, permuted = (figures[name] for name in ("selector", "selector, safe", "signals permuted"))
    thresholds = main["override"]["thresholds"]
    blocks = [
        f"On the split *{assessment['headline']}* the selector closes {number(selector['gap_closed'])} of the gap "
        f"between the parents, the best fixed arm {number(figures['best fixed']['gap_closed'])}; the gain is "
        f"{_gain(selector)}.\n{_verdict(selector['gain_interval'])}\n"
        f"The safe policy (the default of `simmerge plan`) gains {_gain(safe)}; in "
        f"{thresholds.count(None)} of {len(thresholds)} folds it never left the best fixed arm.",
        *_leads(main["policies"]["per_merge"]["lead"]),
    ]
    if is_above_zero(permuted["gain_interval"]):
        blocks.append(
            f"**The negative control gains as well** (the same model trained on signals of other pairs: "
            f"{_gain(permuted)}), so the gain does not show that the signals matter."
        )
    return blocks


def _gain(figures: Content) -> str:
    return with_interval(figures["gain"], figures["gain_interval"], signed=True)


def _verdict(interval: Sequence[float] | None) -> str:
    if is_above_zero(interval):
        return "The interval lies above zero: on such checkpoints the choice by signals pays."
    if interval is not None and interval[1] < 0:
        return (
            "The interval lies below zero: the selector is **worse** than always taking the best fixed arm. Take that."
        )
    return (
        "The interval holds zero: these labels **do not show** that choosing by signals is better than always taking "
        "the best fixed arm. Take the safe policy, which leaves that arm only where it has paid, or measure more pairs "
        "of more checkpoints."
    )


def _leads(leads: Content) -> list[str]:
    """Over what needs no model of the signals, and over a model of each checkpoint alone."""
    blocks = ["It beats every trivial baseline below, each lead with its whole interval above zero."]
    not_beaten = [name for name in _TRIVIAL if name in leads and not is_above_zero(leads[name]["gain_interval"])]
    if not_beaten:
        told = (f"- {name}: lead {_gain(leads[name])}. {_TRIVIAL[name]}" for name in not_beaten)
        blocks = ["**Trivial baselines that the selector does not clearly beat:**", "\n".join(told)]
    alone = leads.get("single-checkpoint features")
    if alone and not is_above_zero(alone["gain_interval"]):
        blocks.append(
            f"The lead over the same model on single-checkpoint features is {_gain(alone)}: these labels do not show "
            "that comparing the two checkpoints adds anything to what is known of each alone."
        )
    return blocks


def _data(assessment: Content) -> list[str]:
    bases = assessment["bases"]
    shown = ", ".join(f"{base or 'unnamed'} ({count} checkpoints)" for base, count in bases.items())
    unused = assessment.get("unused")
    return [
        "## What it was trained on",
        f"{assessment['num_contexts']} contexts (pair, task): {assessment['num_pairs']} pairs of "
        f"{assessment['num_checkpoints']} checkpoints of {len(bases)} base{'s' if len(bases) > 1 else ''}: {shown}. "
        f"Tasks: {', '.join(assessment['tasks'])}. Arms: {', '.join(assessment['arms'])}. Model: "
        f"{assessment['model']}, task encoding {assessment['task_encoding']}.",
        f"Signals without labels, not used: {', '.join(unused)}." if unused else "",
    ]


def _selection(assessment: Content, main: Content) -> list[str]:
    of_merge = main["policies"]["per_merge"]
    figures = of_merge["policies"]
    accuracy = of_merge["arm_accuracy"]
    below = "" if keeps(assessment["arms"]) else "; below zero where a parent is better than every arm"
    header = ["", "GapClosed", "over best fixed", "within noise", "regret", "worst decile", "negative"]
    rows = [
        [
            name + (" (control)" if name in _CONTROLS else ""),
            with_interval(one["gap_closed"], one["interval"]),
            _gain(one),
            percent(one["in_noise_set"]),
            one["mean_regret"],
            one["worst_decile_regret"],
            percent(one["negative"]),
        ]
        for name, one in figures.items()
    ]
    return [
        "## Selection",
        f"Split *{assessment['headline']}*: {_SPLIT_MEANING[assessment['headline']]}. One arm per merge, in brackets "
        "95 % intervals over bases and checkpoints. *Within noise*: picks not significantly worse than the best arm of "
        f"the merge; the operator that is most often one reaches {percent(of_merge['majority_in_noise_set'])}. "
        f"*Regret*: utility lost to the best arm, mean over merges, and over the worst tenth of them{below}. "
        "*Negative*: contexts where GapClosed is below zero, the choice worse than the weaker parent.",
        table_block(header, rows),
        _missing(main["missing"]),
        'How often the selector answers "is this the best arm of the merge?" rightly:',
        table_block(
            ["arm", "accuracy", "a constant answer", "it is the best in"],
            [[arm, *map(percent, (a["accuracy"], a["base_rate"], a["best_share"]))] for arm, a in accuracy.items()],
        ),
    ]


def _missing(reasons: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: not measured; {reason}." for name, reason in reasons.items())


def _domains(main: Content, directory: Place) -> list[str]:
    figures = main["policies"]["per_merge"]["policies"]
    shown = [name for name in _BARS if name in figures and figures[name]["tasks"]]
    tasks = list(figures["selector"]["tasks"])
    figure, ((axis,),) = new_figure(max(9.0, 2.4 * len(tasks)), 5.0)
    figure.set_layout_engine("constrained")
    series, bounds = {}, {}
    for name in shown:
        by_task = [figures[name]["tasks"][task] for task in tasks]
        series[name] = [np.nan if one["gap_closed"] is None else one["gap_closed"] for one in by_task]
        bounds[name] = [one["interval"] or [value] * 2 for one, value in zip(by_task, series[name], strict=True)]
    counts = {task: figures["selector"]["tasks"][task]["num_contexts"] for task in tasks}
    grouped_bars(axis, [f"{task}\n({count} contexts)" for task, count in counts.items()], series, bounds)
    axis.set_ylabel("GapClosed (1: the better parent)")
    legend_below(axis)
    selector = figures["selector"]
    title_above(
        figure,
        f"One arm per merge, unseen checkpoints: the selector closes {_gain(selector)} more of the gap than the best "
        "fixed arm (95 % intervals)",
    )
    save_figure(figure, directory, "domains.png")
    return ["By domain:", f"![GapClosed per domain and method]({FIGURES}/domains.png)"]


def _splits(assessment: Content) -> list[str]:
    small = assessment["small"]
    rows, missing = [], {}
    for name, one in assessment["splits"].items():
        if "reason" in one:
            missing[name] = one["reason"]
            continue
        figures = one["policies"]["per_merge"]["policies"]
        selector, safe = figures["selector"], figures["selector, safe"]
        rows.append(
            [
                name + (" (headline)" if name == assessment["headline"] else ""),
                _SPLIT_MEANING[name],
                selector["gap_closed"],
                _gain(selector),
                _gain(safe),
                percent(one["abstained"]),
            ]
        )
    blocks = ["## How far it generalises"]
    if rows:
        header = ["split", "left out", "GapClosed", "selector over best fixed", "safe policy over it", "abstained"]
        blocks += [
            table_block(header, rows),
            "*Abstained*: pairs too far from the training data, where the safe policy falls back. All but the headline "
            f"use smaller ensembles ({small['num_members']} networks, {small['num_trees']} trees) and fewer folds "
            "inside the folds.",
        ]
    return [*blocks, _missing(missing)]


def _calibration(assessment: Content, main: Content, directory: Place) -> list[str]:
    intervals = ["No intervals: too few checkpoints to leave some out inside the folds."]
    if main["intervals"]:
        covered = [
            [percent(float(level)), percent(one["coverage"]), one["half_width"]]
            for level, one in main["intervals"].items()
        ]
        intervals = ["Intervals on the left-out checkpoints, of one utility:"]
        intervals.append(table_block(["asked", "covered", "half-width"], covered))
    bins, keys = assessment["calibration"], ("predicted", "measured")
    tenths = [
        [i, *(level[key] for key in keys), *(number(contrast[key], True) for key in keys)]
        for i, (level, contrast) in enumerate(zip(bins["utility"], bins["advantage"], strict=True), 1)
    ]
    predicted, measured = (np.array([row[key] for row in main["predictions"]]) for key in keys)
    num_merges = len(merge_arms(assessment["arms"]))
    figure, axes = new_figure(11.0, 5.6, columns=2)
    figure.set_layout_engine("constrained")
    panels = (
        ("utility", predicted, measured),
        ("advantage", *(v - v[:, :num_merges].mean(1, keepdims=True) for v in (predicted, measured))),
    )
    for axis, (name, said, true) in zip(axes[0], panels, strict=True):
        for k, arm in enumerate(assessment["arms"]):
            axis.plot(said[:, k], true[:, k], ".", ms=6, alpha=0.6, label=arm)
        found = bins[name]
        axis.plot([b["predicted"] for b in found], [b["measured"] for b in found], "k.-", lw=1, label="means of tenths")
        ends = [min(said.min(), true.min()), max(said.max(), true.max())]
        axis.plot(ends, ends, c="grey", lw=0.8)
        axis.set_xlabel(f"predicted {name}")
        axis.set_ylabel(f"measured {name}")
    error = float(np.sqrt(np.nanmean((predicted - measured) ** 2)))
    title_above(figure, f"Predicted without its checkpoints, an arm's utility is off by {error:.3f} (root mean square)")
    legend_outside(figure, axes)
    save_figure(figure, directory, "calibration.png")
    return [
        "## Are the predicted utilities right?",
        *intervals,
        "Tenths of the predictions. *Advantage* is over the mean of the operators on the same context, which a choice "
        "rests on; a selector can predict the level well and the advantage badly.",
        table_block(["tenth", "predicted utility", "measured", "predicted advantage", "measured"], tenths),
        f"![Predicted against measured]({FIGURES}/calibration.png)",
    ]


def _importance(assessment: Content, directory: Place) -> list[str]:
    found = assessment["importance"]
    rows = sorted(found["rows"], key=lambda row: row["change"])
    shown = [
        [row["family"], row["num_columns"], *(number(row[key], True) for key in ("change", "low", "high"))]
        for row in rows
    ]
    blocks = [
        "## Which signals matter",
        f"Each family's columns are taken from another pair, in the tested rows alone, {found['num_permutations']} "
        "times; the model stays. Change of the headline gain "
        f"({number(found['gain'], True)} with the smaller ensembles), mean and range. Families hold much of the same "
        "information, so one that costs nothing may still be used.",
        table_block(["family", "columns", "change of the gain", "from", "to"], shown),
    ]
    figure, ((axis,),) = new_figure(8.6, 1.4 + 0.42 * len(rows))
    figure.set_layout_engine("constrained")
    change = np.array([row["change"] for row in rows])
    errors = [change - [row["low"] for row in rows], np.array([row["high"] for row in rows]) - change]
    axis.barh(range(len(rows)), change, xerr=np.maximum(errors, 0), height=0.7, error_kw={"lw": 0.8, "capsize": 2})
    axis.set_yticks(range(len(rows)), [f"{row['family']} ({row['num_columns']})" for row in rows])
    axis.invert_yaxis()
    axis.axvline(0, c="black", lw=0.6)
    axis.set_xlabel("change of the gain in GapClosed when the family is permuted (mean and range)")
    first = rows[0]
    title_above(figure, f"Without {first['family']} the gain changes most: {first['change']:+.3f}")
    save_figure(figure, directory, "importance.png")
    return [*blocks, f"![Feature importance]({FIGURES}/importance.png)"]


def _ablations(assessment: Content) -> list[str]:
    found, small = assessment["ablations"], assessment["small"]
    rows = [
        [
            f"{row['group']}: {row['name']}",
            row["num_columns"],
            _gain(row),
            "" if row["name"] == "all signals" else with_interval(row["change"], row["change_interval"], True),
        ]
        for row in found["rows"]
    ]
    return [
        "## Ablations",
        f"Trained anew on less, or otherwise, on the headline split; {small['num_members']} networks, "
        f"{small['num_trees']} trees. *No probes* leaves weights and norms of task vectors, *no weights* what the "
        "probes say. The change is against all signals, on the same samples.",
        table_block(["", "features", "over best fixed", "change"], rows),
        _missing(found["missing"]),
    ]


def _crossing(signals: Mapping[str, Sequence[float]], utilities: np.ndarray) -> str:
    """For how many signals another arm is the best in their lowest fifth than in their highest."""
    count = 0
    for values in signals.values():
        parts = np.array_split(np.argsort(values, kind="stable"), min(_NUM_QUANTILES, len(values)))
        low, high = (utilities[part].mean(0).argmax() for part in (parts[0], parts[-1]))
        count += int(low != high)
    return (
        f"For {count} of {len(signals)} signals the best arm where the signal is low is another than where it is high"
    )


def _signals(assessment: Content, directory: Place) -> list[str]:
    signals, heading = assessment["signals"], "## Signals and utility"
    if not signals:
        return [heading, "Not shown: the tables have none of the signals of a pair."]
    utilities, arms = np.array(assessment["utilities"]), assessment["arms"]
    columns = min(3, len(signals))
    rows = -(-len(signals) // columns)
    figure, axes = new_figure(4.0 * columns, 3.2 * rows + 0.9, columns, rows)
    figure.set_layout_engine("constrained")
    for axis, (column, values) in zip(axes.flat, signals.items(), strict=False):
        parts = np.array_split(np.argsort(values, kind="stable"), min(_NUM_QUANTILES, len(values)))
        places = [float(np.mean(np.array(values)[part])) for part in parts]
        for k, arm in enumerate(arms):
            axis.plot(places, [utilities[part, k].mean() for part in parts], ".-", lw=1, label=arm)
        axis.set_xlabel(_AXES[column])
        axis.locator_params(axis="x", nbins=5)
    for axis in axes[:, 0]:
        axis.set_ylabel("measured utility")
    hide_spare(axes, len(signals))
    legend_outside(figure, axes)
    title_above(figure, _crossing(signals, utilities))
    save_figure(figure, directory, "signals.png")
    return [
        heading,
        "Mean utility of each arm over fifths of the contexts, by the signal of the pair (mean of both orders). A "
        "choice by a signal can pay where lines cross; where all lines rise together, it says how good the merge will "
        "be and not which arm.",
        f"![Signal against utility per operator]({FIGURES}/signals.png)",
    ]
