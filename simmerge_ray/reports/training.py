"""`report.md` of a training, with figures, from `assessment.json` alone. What could not be computed says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.storage import Place, write_atomically
from simmerge_ray.reports.figures import new_figure, save_figure

Content = Mapping[str, Any]

FIGURES = "figures"
# What needs no model of the signals: a selector that does not beat these is not worth its signals.
_TRIVIAL = (
    "uniform", "best fixed", "best fixed per task", "better parent", "single-signal stump", "equal-weight linear",
    "scale-matched linear",
)  # fmt: skip
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
    parts = ["# The selector and what it can do", "", *_data(assessment), *_headroom(assessment["headroom"])]
    figures = directory / FIGURES
    if "reason" in main:
        parts += ["## On checkpoints it was not trained on", "", f"Not measured: {main['reason']}.", ""]
    else:
        parts[2:2] = _in_short(assessment, main)
        parts += [*_selection(assessment, main), *_domains(main, figures)]
    parts += _splits(assessment)
    if "reason" not in main:
        parts += [*_calibration(assessment, main, figures), *_importance(assessment, figures), *_ablations(assessment)]
    parts += _signals(assessment, figures)
    write_atomically(directory / "report.md", "\n".join(parts).encode())
    return directory / "report.md"


def _number(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.3f}" if signed else f"{value:.3f}"


def _with_interval(value: float | None, interval: Sequence[float] | None, signed: bool = False) -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{_number(value, signed)} [no interval]"
    return f"{_number(value, signed)} [{_number(interval[0], signed)}, {_number(interval[1], signed)}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _in_short(assessment: Content, main: Content) -> list[str]:
    of_merge = main["policies"]["per_merge"]
    figures, leads = of_merge["policies"], of_merge["lead"]
    selector, safe = figures["selector"], figures["selector, safe"]
    interval = selector["gain_interval"]
    lines = [
        f"On the split *{assessment['headline']}* the selector closes {_number(selector['gap_closed'])} of the gap "
        f"between the parents, the best fixed arm {_number(figures['best fixed']['gap_closed'])}; the gain is "
        f"{_with_interval(selector['gain'], interval, True)}.",
    ]
    if interval is not None and interval[0] > 0:
        lines += ["The interval lies above zero: on such checkpoints the choice by signals pays."]
    elif interval is not None and interval[1] < 0:
        lines += [
            "The interval lies below zero: the selector is **worse** than always taking the best fixed arm. Take that."
        ]
    else:
        lines += [
            "The interval holds zero: these labels **do not show** that choosing by signals is better than always "
            "taking the best fixed arm. Take the safe policy, which leaves that arm only where it has paid, or measure "
            "more pairs of more checkpoints."
        ]
    safe_gain = _with_interval(safe["gain"], safe["gain_interval"], True)
    never = sum(threshold is None for threshold in main["override"]["thresholds"])
    lines += [
        f"The safe policy (the default of `simmerge plan`) gains {safe_gain}; in {never} of "
        f"{len(main['override']['thresholds'])} folds it never left the best fixed arm.",
        "",
    ]
    not_beaten = [name for name in _TRIVIAL if name in leads and not _above_zero(leads[name]["gain_interval"])]
    if not_beaten:
        lines += ["**Trivial baselines that the selector does not clearly beat:**", ""]
        for name in not_beaten:
            lead = _with_interval(leads[name]["gain"], leads[name]["gain_interval"], True)
            lines += [f"- {name}: lead {lead}. {_consequence(name)}"]
        lines += [""]
    else:
        lines += ["It beats every trivial baseline below, each lead with its whole interval above zero.", ""]
    alone = leads.get("single-checkpoint features")
    if alone and not _above_zero(alone["gain_interval"]):
        lead = _with_interval(alone["gain"], alone["gain_interval"], True)
        lines += [
            f"The lead over the same model on single-checkpoint features is {lead}: these labels do not show that "
            "comparing the two checkpoints adds anything to what is known of each alone.",
            "",
        ]
    permuted = figures["signals permuted"]
    if _above_zero(permuted["gain_interval"]):
        lines += [
            "**The negative control gains as well** (the same model trained on signals of other pairs: "
            f"{_with_interval(permuted['gain'], permuted['gain_interval'], True)}), so the gain does not show that the "
            "signals matter.",
            "",
        ]
    return lines


def _above_zero(interval: Sequence[float] | None) -> bool:
    return interval is not None and interval[0] > 0


def _consequence(name: str) -> str:
    return {
        "uniform": "The arms hardly differ here, or the selector is no better than chance.",
        "best fixed": "Taking one arm for all merges costs nothing that these labels can show.",
        "best fixed per task": "Knowing the task may be enough; a table of arms by task needs no signals.",
        "better parent": "Keeping the better parent may be as good, but it needs the measured utility of both parents.",
        "single-signal stump": "One signal and one threshold may do as well.",
    }.get(name, "That fixed arm may do as well.")


def _data(assessment: Content) -> list[str]:
    bases = assessment["bases"]
    shown = ", ".join(f"{base or 'unnamed'} ({count} checkpoints)" for base, count in bases.items())
    lines = [
        "## What it was trained on",
        "",
        f"{assessment['num_contexts']} contexts (pair, task): {assessment['num_pairs']} pairs of "
        f"{assessment['num_checkpoints']} checkpoints of {len(bases)} base{'s' if len(bases) > 1 else ''}: {shown}. "
        f"Tasks: {', '.join(assessment['tasks'])}. Arms: {', '.join(assessment['arms'])}. Model: "
        f"{assessment['model']}, task encoding {assessment['task_encoding']}.",
        "",
    ]
    if assessment.get("unused"):
        lines += [f"Signals without labels, not used: {', '.join(assessment['unused'])}.", ""]
    return lines


def _headroom(room: Content) -> list[str]:
    lines = ["## Is there anything to choose?", ""]
    if "reason" in room:
        return [*lines, f"Not measured: {room['reason']}.", ""]
    lines += [
        f"GapClosed is defined for {room['num_defined']} of {room['num_contexts']} contexts, with "
        f"{room['min_items']} items or more. Each arm taken everywhere, and where it is clearly the best (by two "
        "paired standard errors):",
        "",
    ]
    ranked = sorted(room["arm_gap_closed"].items(), key=lambda entry: -entry[1])
    merge, context = room["per_merge"], room["per_context"]
    lines += _table(
        ["arm", "GapClosed", "clearly best, per merge", "clearly best, per task"],
        [
            [arm, _number(value), _percent(merge["arm_win_share"][arm]), _percent(context["arm_win_share"][arm])]
            for arm, value in ranked
        ],
    )
    for title, part in (("merge (the headline: it serves both parents' tasks)", merge), ("task", context)):
        clear = "" if _above_zero(part["gain_interval"]) else ": within noise, so a selector has nothing to find"
        lines += [
            f"- One arm per {title}: a split-half oracle reaches {_number(part['split_half_oracle'])}, headroom over "
            f"the best fixed arm {_with_interval(part['gain'], part['gain_interval'], True)}{clear}."
        ]
    return [*lines, ""]


def _selection(assessment: Content, main: Content) -> list[str]:
    of_merge = main["policies"]["per_merge"]
    figures = of_merge["policies"]
    lines = [
        "## Selection",
        "",
        f"Split *{assessment['headline']}*: {_SPLIT_MEANING[assessment['headline']]}. One arm per merge, in brackets "
        "95 % intervals over bases and checkpoints. *Within noise*: picks not significantly worse than the best arm of "
        f"the merge; the most frequent such arm reaches {_percent(of_merge['majority_in_noise_set'])}. *Regret*: "
        "utility lost to the best arm, mean over merges, and over the worst tenth of them; below zero where a parent "
        "is better than every arm. *Negative*: contexts where GapClosed is below zero, the merge worse than the "
        "weaker parent.",
        "",
    ]
    rows = []
    for name, one in figures.items():
        rows.append(
            [
                name + (" (control)" if name in _CONTROLS else ""),
                _with_interval(one["gap_closed"], one["interval"]),
                _with_interval(one["gain"], one["gain_interval"], True),
                _percent(one["in_noise_set"]),
                _number(one["mean_regret"]),
                _number(one["worst_decile_regret"]),
                _percent(one["negative"]),
            ]
        )
    header = ["", "GapClosed", "over best fixed", "within noise", "regret", "worst decile", "negative"]
    lines += _table(header, rows)
    lines += [f"- {name}: not measured; {reason}." for name, reason in main["missing"].items()]
    accuracy = of_merge["arm_accuracy"]
    lines += ["", 'How often the selector answers "is this the best arm of the merge?" rightly:', ""]
    return lines + _table(
        ["arm", "accuracy", "a constant answer", "it is the best in"],
        [[arm, *map(_percent, (a["accuracy"], a["base_rate"], a["best_share"]))] for arm, a in accuracy.items()],
    )


def _domains(main: Content, directory: Place) -> list[str]:
    figures = main["policies"]["per_merge"]["policies"]
    shown = [name for name in _BARS if name in figures and figures[name]["tasks"]]
    tasks = list(figures["selector"]["tasks"])
    figure, axes = new_figure(max(7.0, 1.9 * len(tasks)), 3.6)
    axis, width = axes[0][0], 0.84 / len(shown)
    for index, name in enumerate(shown):
        found = [figures[name]["tasks"][task] for task in tasks]
        values = np.array([one["gap_closed"] if one["gap_closed"] is not None else np.nan for one in found])
        bounds = np.array([one["interval"] or [value] * 2 for one, value in zip(found, values, strict=True)])
        # A percentile interval need not hold the estimate; a bar of errors cannot be negative.
        errors = np.maximum([values - bounds[:, 0], bounds[:, 1] - values], 0)
        places = np.arange(len(tasks)) + (index - (len(shown) - 1) / 2) * width
        axis.bar(places, values, width, yerr=errors, label=name, error_kw={"lw": 0.8, "capsize": 1.5})
    counts = [figures["selector"]["tasks"][task]["num_contexts"] for task in tasks]
    axis.set_xticks(range(len(tasks)), [f"{task}\n({n} contexts)" for task, n in zip(tasks, counts, strict=True)])
    axis.axhline(0, c="black", lw=0.6)
    axis.set_ylabel("GapClosed")
    axis.set_title("one arm per merge, unseen checkpoints, 95 % intervals", fontsize=9)
    axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    save_figure(figure, directory, "domains.png")
    return ["By domain:", "", f"![GapClosed per domain and method]({FIGURES}/domains.png)", ""]


def _splits(assessment: Content) -> list[str]:
    small = assessment["small"]
    lines = ["## How far it generalises", ""]
    rows, missing = [], []
    for name, one in assessment["splits"].items():
        if "reason" in one:
            missing.append(f"- {name}: not measured; {one['reason']}.")
            continue
        figures = one["policies"]["per_merge"]["policies"]
        selector, safe = figures["selector"], figures["selector, safe"]
        rows.append(
            [
                name + (" (headline)" if name == assessment["headline"] else ""),
                _SPLIT_MEANING[name],
                _number(selector["gap_closed"]),
                _with_interval(selector["gain"], selector["gain_interval"], True),
                _with_interval(safe["gain"], safe["gain_interval"], True),
                _percent(one["abstained"]),
            ]
        )
    if rows:
        header = ["split", "left out", "GapClosed", "selector over best fixed", "safe policy over it", "abstained"]
        lines += _table(header, rows)
        lines += [
            "*Abstained*: pairs too far from the training data, where the safe policy falls back. All but the headline "
            f"use smaller ensembles ({small['num_members']} networks, {small['num_trees']} trees) and fewer folds "
            "inside the folds.",
            "",
        ]
    return [*lines, *missing, *([""] if missing else [])]


def _calibration(assessment: Content, main: Content, directory: Place) -> list[str]:
    lines = ["## Are the predicted utilities right?", ""]
    if main["intervals"]:
        lines += ["Intervals on the left-out checkpoints, of one utility:", ""]
        lines += _table(
            ["asked", "covered", "half-width"],
            [
                [_percent(float(level)), _percent(one["coverage"]), _number(one["half_width"])]
                for level, one in main["intervals"].items()
            ],
        )
    else:
        lines += ["No intervals: too few checkpoints to leave some out inside the folds.", ""]
    bins = assessment["calibration"]
    lines += [
        "Tenths of the predictions. *Advantage* is over the mean of the arms on the same context, which a choice rests "
        "on; a selector can predict the level well and the advantage badly.",
        "",
    ]
    both = zip(bins["utility"], bins["advantage"], strict=True)
    lines += _table(
        ["tenth", "predicted utility", "measured", "predicted advantage", "measured"],
        [
            [str(i), *(_number(level[k]) for k in keys), *(_number(contrast[k], True) for k in keys)]
            for keys in [("predicted", "measured")]
            for i, (level, contrast) in enumerate(both, 1)
        ],
    )
    predicted = np.array([row["predicted"] for row in main["predictions"]])
    measured = np.array([row["measured"] for row in main["predictions"]])
    figure, axes = new_figure(9.6, 4.0, columns=2)
    figure.set_layout_engine("constrained")
    panels = (
        ("utility", predicted, measured),
        ("advantage", *(v - v.mean(1, keepdims=True) for v in (predicted, measured))),
    )
    for axis, (name, said, true) in zip(axes[0], panels, strict=True):
        for k, arm in enumerate(assessment["arms"]):
            axis.plot(said[:, k], true[:, k], ".", ms=3, alpha=0.5, label=arm)
        found = bins[name]
        axis.plot([b["predicted"] for b in found], [b["measured"] for b in found], "k.-", lw=1, label="means of tenths")
        ends = [min(said.min(), true.min()), max(said.max(), true.max())]
        axis.plot(ends, ends, c="grey", lw=0.8)
        axis.set_xlabel(f"predicted {name}")
        axis.set_ylabel(f"measured {name}")
    figure.suptitle("each arm on each context, predicted without its checkpoints", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=4, loc="outside lower center", frameon=False)
    save_figure(figure, directory, "calibration.png")
    return [*lines, f"![Predicted against measured]({FIGURES}/calibration.png)", ""]


def _importance(assessment: Content, directory: Place) -> list[str]:
    found = assessment["importance"]
    rows = sorted(found["rows"], key=lambda row: row["change"])
    lines = [
        "## Which signals matter",
        "",
        f"Each family's columns are taken from another pair, in the tested rows alone, {found['num_permutations']} "
        "times; the model stays. Change of the headline gain "
        f"({_number(found['gain'], True)} with the smaller ensembles), mean and range. Families hold much of the same "
        "information, so one that costs nothing may still be used.",
        "",
    ]
    lines += _table(
        ["family", "columns", "change of the gain", "from", "to"],
        [
            [row["family"], str(row["num_columns"]), *(_number(row[key], True) for key in ("change", "low", "high"))]
            for row in rows
        ],
    )
    figure, axes = new_figure(6.4, 0.5 + 0.38 * len(rows))
    axis = axes[0][0]
    change = np.array([row["change"] for row in rows])
    errors = [change - [row["low"] for row in rows], np.array([row["high"] for row in rows]) - change]
    axis.barh(range(len(rows)), change, xerr=np.maximum(errors, 0), height=0.7, error_kw={"lw": 0.8, "capsize": 2})
    axis.set_yticks(range(len(rows)), [f"{row['family']} ({row['num_columns']})" for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, c="black", lw=0.6)
    axis.set_xlabel("change of the gain when the family is permuted", fontsize=8)
    save_figure(figure, directory, "importance.png")
    return [*lines, f"![Feature importance]({FIGURES}/importance.png)", ""]


def _ablations(assessment: Content) -> list[str]:
    found, small = assessment["ablations"], assessment["small"]
    lines = [
        "## Ablations",
        "",
        f"Trained anew on less, or otherwise, on the headline split; {small['num_members']} networks, "
        f"{small['num_trees']} trees. *No probes* leaves weights and norms of task vectors, *no weights* what the "
        "probes say. The change is against all signals, on the same samples.",
        "",
    ]
    lines += _table(
        ["", "features", "over best fixed", "change"],
        [
            [
                f"{row['group']}: {row['name']}",
                str(row["num_columns"]),
                _with_interval(row["gain"], row["gain_interval"], True),
                "" if row["name"] == "all signals" else _with_interval(row["change"], row["change_interval"], True),
            ]
            for row in found["rows"]
        ],
    )
    lines += [f"- {name}: not measured; {reason}." for name, reason in found["missing"].items()]
    return [*lines, *([""] if found["missing"] else [])]


def _signals(assessment: Content, directory: Place) -> list[str]:
    signals = assessment["signals"]
    lines = ["## Signals and utility", ""]
    if not signals:
        return [*lines, "Not shown: the tables have none of the signals of a pair.", ""]
    utilities, arms = np.array(assessment["utilities"]), assessment["arms"]
    columns = min(3, len(signals))
    rows = -(-len(signals) // columns)
    figure, axes = new_figure(3.4 * columns, 2.7 * rows + 0.4, columns, rows)
    figure.set_layout_engine("constrained")
    for axis, (column, values) in zip(axes.flat, signals.items(), strict=False):
        parts = np.array_split(np.argsort(values, kind="stable"), min(_NUM_QUANTILES, len(values)))
        places = [float(np.mean(np.array(values)[part])) for part in parts]
        for k, arm in enumerate(arms):
            axis.plot(places, [utilities[part, k].mean() for part in parts], ".-", lw=1, label=arm)
        axis.set_xlabel(_AXES[column], fontsize=8)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=5)
    for axis in axes[:, 0]:
        axis.set_ylabel("measured utility", fontsize=8)
    for axis in list(axes.flat)[len(signals) :]:
        axis.set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=4, loc="outside lower center", frameon=False)
    save_figure(figure, directory, "signals.png")
    return [
        *lines,
        "Mean utility of each arm over fifths of the contexts, by the signal of the pair (mean of both orders). A "
        "choice by a signal can pay where lines cross; where all lines rise together, it says how good the merge will "
        "be and not which arm.",
        "",
        f"![Signal against utility per operator]({FIGURES}/signals.png)",
        "",
    ]
