"""What a merge is expected to be worth, from what it keeps: a word beside the answer, without a part in the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.pipelines.auto.request import AutoRun, LabelFree
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.selector.finding.probed import ProbedPlan
from simmerge_ray.selector.predictor.model import PredictedUtilities
from simmerge_ray.selector.predictor.signals import SingleValues


@dataclass(frozen=True)
class Expected:
    """Predicted utilities of `plans`, (N, T). bases: how many the predictor was trained on."""

    plans: tuple[MergePlan, ...]
    predicted: PredictedUtilities
    num_bases: int

    def lines(self, answer: MergePlan) -> list[str]:
        """What is expected of the answer, in words; of a task of which nothing is known no number is said."""
        place, of = self.plans.index(answer), self.predicted
        trained = f"the predictor, trained on {self.num_bases} base{'s' * (self.num_bases > 1)},"
        told = [(task, of.utility[place, t]) for t, task in enumerate(of.tasks) if of.known[place, t]]
        untold = [task for t, task in enumerate(of.tasks) if not of.known[place, t]]
        said = []
        if told:
            width = "" if of.half_width is None else f" ± {of.half_width:.2f} at {100 * of.level:.0f} %"
            values = ", ".join(f"{task} {value:.2f}" for task, value in told)
            said.append(f"expected utility: {values}{width}; {trained} has no part in the choice")
        if untold:
            said.append(f"no utility is predicted on {', '.join(untold)}: {trained} has seen no merge like this one")
        return said

    def to_json(self) -> dict[str, Any]:
        """JSON value; utilities by plan and task, null where nothing is known."""
        of = self.predicted
        rows = [
            {
                "label": plan.label,
                "plan": plan.to_json(),
                "utility": {
                    task: round(float(of.utility[n, t]), 4) if of.known[n, t] else None
                    for t, task in enumerate(of.tasks)
                },
            }
            for n, plan in enumerate(self.plans)
        ]
        return {"half_width": of.half_width, "level": of.level, "num_bases": self.num_bases, "candidates": rows}


def expect(run: AutoRun, found: LabelFree) -> Expected | None:
    """Of the lines of the answer's table. None without a predictor, and where the base or a member could not be run
    over the probes: what a candidate keeps is then compared with nothing."""
    predictor = run.predictor
    aim, probed = found.finding.aim, found.lines
    owners = [place for place, owner in enumerate(aim.owners) if owner.checkpoint != aim.base]
    whole = {one.plan: one for one in found.finding.checkpoints}
    base = whole.get(MergePlan(source=aim.base))
    own = [whole.get(MergePlan(source=aim.owners[place].checkpoint)) for place in owners]
    if predictor is None or base is None or not all(own):
        return None
    own_nll = np.array([one.nll[place] for one, place in zip(own, owners, strict=True) if one is not None])
    singles = SingleValues(base.retention[owners], base.nll[owners], own_nll)
    tasks = [aim.owners[place].task for place in owners]
    predicted = predictor.predict(tasks, *_kept(probed, owners), singles)
    return Expected(tuple(one.plan for one in probed), predicted, len(predictor.provenance["bases"]))


def _kept(probed: Sequence[ProbedPlan], owners: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Retention and nll, (N, owners) each."""
    return np.stack([one.retention[owners] for one in probed]), np.stack([one.nll[owners] for one in probed])
