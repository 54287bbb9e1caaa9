"""What `simmerge auto` is asked for: which merges, by what objective, and how hard it looks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simmerge_ray.base.config import FrozenConfig, Ways, option

_SPACE, _CHOICE = "Which merges", "How they are chosen"


class FindConfig(FrozenConfig):
    """The choice of a merge without labels."""

    members: tuple[str, ...] = option((), "checkpoint to merge; repeatable; default: all", flag="member", panel=_SPACE)
    ways: Ways = option((1, 4), "checkpoints of a merge: 2, or 1-4; 1 is a scaled one", panel=_SPACE, shown="1-4")
    arms: tuple[str, ...] = option(
        ("linear", "ties(density=0.1)", "ties(density=0.3)", "ties(density=0.5)", "scale_matched_linear"),
        "merge operator to try, e.g. linear or 'ties(density=0.2)'; repeatable",
        flag="arm",
        panel=_SPACE,
        min_length=1,
    )
    objective: str = option("mean", "of the members' tasks: mean, worst, or math=2,code=1", panel=_CHOICE)
    forget: float | None = option(
        None, "share of the base's answers to the general probes that may be lost, e.g. 0.02", ge=0, le=1, panel=_CHOICE
    )
    num_recipes: int = option(10_000, "merges scored from signatures", flag="recipes", ge=100, panel=_CHOICE)
    shortlist: int = option(24, "of them run over the probes", ge=2, panel=_CHOICE)
    max_tokens: int = option(16, "longest answer in tokens", ge=1, le=256, panel=_CHOICE)
    tune: Literal["none", "global", "layer", "block", "tensor"] = option(
        "layer", "what shares a coefficient of a member when the best few are tuned by gradient", panel=_CHOICE
    )
    num_tuned: int = option(1, "merges that are tuned", flag="tuned", ge=1, le=8, panel=_CHOICE)
    seed: int = Field(0, description="of the proposed merges")
