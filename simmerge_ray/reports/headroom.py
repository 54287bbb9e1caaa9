"""What the report of a run and that of a training have in common: whether there is anything to choose. A part of a
report is a list of blocks (`page`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simmerge_ray.base.markdown import number, percent, with_interval
from simmerge_ray.reports.page import table_block


def is_above_zero(interval: Sequence[float] | None) -> bool:
    """Whether a gain is more than noise."""
    return interval is not None and interval[0] > 0


def headroom_part(room: Mapping[str, Any]) -> list[str]:
    """What each arm taken everywhere closes of the gap, and what an oracle adds."""
    heading = "## Is there anything to choose?"
    if (reason := room.get("reason", room.get("undefined"))) is not None:
        return [heading, f"Not measured: {reason}."]
    merge, context = room["per_merge"], room["per_context"]
    ranked = sorted(room["arm_gap_closed"].items(), key=lambda entry: -entry[1])
    rows = [[arm, value, *(percent(part["arm_win_share"][arm]) for part in (merge, context))] for arm, value in ranked]
    shares = [percent(part["keep"]["win_share"]) for part in (merge, context)]
    rows.append(["the better parent, kept", merge["keep"]["better_parent"], *shares])
    gains = []
    for title, part in (("merge (the headline: it serves both parents' tasks)", merge), ("task", context)):
        clear = "" if is_above_zero(part["gain_interval"]) else ": within noise, so a selector has nothing to find"
        gains.append(
            f"- One arm per {title}: a split-half oracle reaches {number(part['split_half_oracle'])}, headroom over "
            f"the best fixed arm ({part['best_fixed_arm']}, {number(part['best_fixed'])}) "
            f"{with_interval(part['gain'], part['gain_interval'], True)}{clear}. Where it may keep a parent as well: "
            f"{number(part['keep']['split_half_oracle'])}, "
            f"{with_interval(part['keep']['gain'], part['keep']['gain_interval'], True)}."
        )
    return [
        heading,
        f"GapClosed is defined for {room['num_defined']} of {room['num_contexts']} contexts (pair, task), with "
        f"{room['min_items']} items or more. Each arm taken everywhere, and where it is clearly the best (by two "
        "paired standard errors); and, per merge, the parent that is better on one half of the items, measured on the "
        "other:",
        table_block(["arm", "GapClosed", "clearly best, per merge", "clearly best, per task"], rows),
        "\n".join(gains),
    ]
