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
    shortlist: int | None = option(
        None, "of them run over the probes; default: 4 for each member, 8 to 24", ge=2, panel=_CHOICE
    )
    max_tokens: int = option(16, "longest answer in tokens", ge=1, le=256, panel=_CHOICE)
    tune: Literal["none", "global", "layer", "block", "tensor"] = option(
        "tensor", "what shares a coefficient of a member when the best few are tuned by gradient", panel=_CHOICE
    )
    num_tuned: int = option(1, "merges that are tuned", flag="tuned", ge=1, le=8, panel=_CHOICE)
    seed: int = Field(default=0, description="of the proposed merges")

    def num_run(self, num_members: int) -> int:
        """Merges that are run over the probes."""
        return self.shortlist or shortlist_of(num_members)


def shortlist_of(num_members: int) -> int:
    """How many merges of these members are run over the probes where nobody says it. On the demo's pairs 8 that are
    scored with a look at the average find what 24 straight mixtures find (probed score -0.0002; 12: +0.0007)."""
    return min(24, max(8, 4 * num_members))


FEW_MEMBERS = 3  # the average of so many is looked at as a whole, before candidates are scored
FACTOR = 3  # of the candidates one in so many is run over the rest of the probes
_LEAST_PROBES = 16  # of a first round; fewer tell candidates apart too badly


def first_part(num_probes: int) -> int:
    """How many probes candidates are run over first; 0 where there are too few for two rounds."""
    first = max(_LEAST_PROBES, num_probes // FACTOR)
    return first if first < num_probes else 0


def first_round(num_probes: int, num_candidates: int) -> tuple[int, int]:
    """Of successive halving over probes: how many all candidates are run over first, and how many candidates then over
    the rest; (0, all of them) where there is one round only."""
    first = first_part(num_probes)
    if not first or num_candidates <= FACTOR:
        return 0, num_candidates
    return first, max(2, num_candidates // FACTOR)
