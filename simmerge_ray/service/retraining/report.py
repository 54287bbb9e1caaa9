"""The report of a retraining, in Markdown."""

from __future__ import annotations

from collections import Counter

from simmerge_ray.service.log.fold import Setup
from simmerge_ray.service.retraining.material import Material
from simmerge_ray.service.retraining.promotion import Result
from simmerge_ray.service.retraining.shadow import OnLabels, OnLog
from simmerge_ray.service.retraining.training import Retrained


def report_text(material: Material, candidate: Retrained, present: Setup, result: Result, margin: float) -> str:
    """The retraining in Markdown."""
    counts = Counter(one.arm for one in material.logged.rewarded)
    num_plans = sum(len(one.plan.steps) > 1 for one in material.logged.rewarded)
    lines = [
        f"# Retraining of {present.version}: {result.done}",
        "",
        f"{result.reason[:1].upper()}{result.reason[1:]}.",
        "",
        f"- new selector: `{candidate.version}`; present one: `{present.version}` (encoder epoch {present.epoch})",
        f"- log of namespace `{material.namespace}`, events 1 to {material.logged.head}: "
        f"{len(material.logged.rewarded)} rewards that count ({num_plans} of plans of several steps), "
        f"{len(material.logged.infeasible)} merges closed as infeasible",
        f"- trained on {len(material.rewards)} rewards, up to event {material.last_seq} (the present one knew "
        f"{len(material.known)} of them), and on {len(material.labelled.contexts)} labelled contexts; "
        f"{len(material.held_out)} later rewards held out",
        "- rewards by arm: " + ", ".join(f"`{arm}` {count}" for arm, count in sorted(counts.items())),
    ]
    if material.later:
        lines.append(f"- arms known from rewards alone: {', '.join(f'`{arm}`' for arm in material.later)}")
    lines += ["", "## On the log", "", *_log_lines(candidate.log, margin)]
    lines += ["", "## On the labels", "", *_label_lines(candidate.labels, margin)]
    return "\n".join(lines) + "\n"


def _log_lines(log: OnLog | None, margin: float) -> list[str]:
    if log is None:
        return ["Not compared: fewer than two of the held-out rewards are of drawn decisions."]
    rows = [
        f"| {name} | {one.value:.4f} | {one.standard_error:.4f} | {one.effective:.1f} |"
        for name, one in (("present", log.present), ("new", log.candidate), ("new - present", log.gain))
    ]
    return [
        f"What the choices of either selector would have earned on {log.num} held-out decisions that were drawn "
        f"(doubly robust); in {log.num_differ} the two choose differently. What was played earned {log.observed:.4f}.",
        "",
        "| | utility | standard error | effective decisions |",
        "|---|---|---|---|",
        *rows,
        "",
        f"With 95 % the difference is above {log.low:+.4f}; to be promoted it has to be above {-margin:+.4f}.",
    ]


def _label_lines(labels: OnLabels | None, margin: float) -> list[str]:
    if labels is None:
        return ["Not compared: too few checkpoints to leave some out."]
    interval = "no interval" if labels.interval is None else "[{:+.4f}, {:+.4f}]".format(*labels.interval)
    return [
        f"The best predicted arm of each merge on checkpoints that were left out ({labels.num_contexts} contexts), "
        f"{labels.unit}: trained as the present one {labels.present:.4f}, as the new one {labels.candidate:.4f}; "
        f"difference {labels.gain:+.4f} {interval}; to be promoted it has to be above {-margin:+.4f}."
    ]
