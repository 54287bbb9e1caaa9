"""The second study: experts of a pretrained model on real tasks, their merges, and small bases with experts.

Every stage keeps what is there, so an interrupted one goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Sequence

from simmerge_ray.pipelines.second_study.real import RealStages
from simmerge_ray.pipelines.second_study.run import StudyRun
from simmerge_ray.pipelines.second_study.small import SmallStages

_KINDS = {"real": RealStages, "small": SmallStages}
STAGES = (
    "real-pilot",
    "real-zoo",
    "real-held-out",
    "real-choices",
    "real-labels",
    "real-results",
    "real-four",
    "real-sets",
    "real-sets-results",
    "small-zoos",
    "small-choices",
    "small-labels",
    "small-results",
)


def run_stages(run: StudyRun, stages: Sequence[str]) -> None:
    """Run those of `STAGES`, in their order. Raises ConfigError: a real one, without tasks or base."""
    chosen = [stage for stage in STAGES if stage in stages]
    kinds = {kind: _KINDS[kind](run) for kind in dict.fromkeys(stage.partition("-")[0] for stage in chosen)}
    for stage in chosen:
        kind, _, name = stage.partition("-")
        getattr(kinds[kind], name.replace("-", "_"))()
