"""Whether there is anything to choose: the part that the report of a run and that of a training have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simmerge_ray.base.markdown import number, percent, table_lines, with_interval


def is_above_zero(interval: Sequence[float] | None) -> bool:
    """Whether a gain is more than noise."""
    return interval is not None and interval[0] > 0


def headroom_lines(room: Mapping[str, Any]) -> list[str]:
    """What each arm taken everywhere closes of the gap, and what an oracle adds."""
    lines = ["## Is there anything to choose?", ""]
    if (reason := room.get("reason", room.get("undefined"))) is not None:
        return [*lines, f"Not measured: {reason}.", ""]
    lines += [
        f"GapClosed is defined for {room['num_defined']} of {room['num_contexts']} contexts (pair, task), with "
        f"{room['min_items']} items or more. Each arm taken everywhere, and where it is clearly the best (by two "
        "paired standard errors):",
        "",
    ]
    ranked = sorted(room["arm_gap_closed"].items(), key=lambda entry: -entry[1])
    merge, context = room["per_merge"], room["per_context"]
    lines += table_lines(
        ["arm", "GapClosed", "clearly best, per merge", "clearly best, per task"],
        [
            [arm, number(value), percent(merge["arm_win_share"][arm]), percent(context["arm_win_share"][arm])]
            for arm, value in ranked
        ],
    )
    for title, part in (("merge (the headline: it serves both parents' tasks)", merge), ("task", context)):
        clear = "" if is_above_zero(part["gain_interval"]) else ": within noise, so a selector has nothing to find"
        lines += [
            f"- One arm per {title}: a split-half oracle reaches {number(part['split_half_oracle'])}, headroom over "
            f"the best fixed arm ({part['best_fixed_arm']}, {number(part['best_fixed'])}) "
            f"{with_interval(part['gain'], part['gain_interval'], True)}{clear}."
        ]
    return [*lines, ""]
