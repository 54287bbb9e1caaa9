"""What `simmerge auto` is asked, and its answer without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.evaluation import EvaluationTask
from simmerge_ray.selector.finding.choice import Finding
from simmerge_ray.selector.finding.probed import ProbedPlan
from simmerge_ray.selector.finding.sources import FindRequest
from simmerge_ray.selector.predictor.model import UtilityPredictor

LABELS = "labels"


@dataclass(frozen=True)
class AutoRun:
    """What is asked, and where the answer goes.

    engine: what runs candidates. tasks, evaluate: labels, and how many merges are measured by them; 0 for none.
    signatures: URI of their store. write: whether a merge that is the answer is made. here: without Ray. predictor:
    says what utility to expect of the answer.
    """

    request: FindRequest
    engine: SearchConfig
    out: Path
    signatures: str
    tasks: Mapping[str, EvaluationTask]
    evaluate: int = 0
    write: bool = True
    here: bool = False
    predictor: UtilityPredictor | None = None

    @property
    def labels(self) -> str:
        return str((self.out / LABELS).resolve())


@dataclass(frozen=True)
class Tuned:
    """A merge whose coefficients were tuned, beside the best that was not, on the probes that only decided when to
    stop. whole: what it keeps of all probes; those that it was tuned on are among them."""

    whole: ProbedPlan
    held_out: ProbedPlan
    rival: ProbedPlan

    @property
    def is_better(self) -> bool:
        """By score, and it keeps as many answers. Where members pull apart, tuning finds merges that give a part of
        every answer and few whole ones, which the score alone likes better than a checkpoint as it is."""
        return self.held_out.score > self.rival.score and self.held_out.kept >= self.rival.kept


@dataclass(frozen=True)
class LabelFree:
    """The answer without labels, and what it was chosen from. tuned: the best first."""

    best: ProbedPlan
    finding: Finding
    tuned: tuple[Tuned, ...]

    @property
    def lines(self) -> list[ProbedPlan]:
        """The answer, the best merge that was not tuned, the plain average, the checkpoints as they are; each once."""
        average = [one for one in self.finding.ranked if one.plan == self.finding.average]
        found = [self.best, *self.finding.merges[:1], *average, *self.finding.checkpoints]
        return list({one.plan.id: one for one in found}.values())

    @property
    def ranking(self) -> list[MergePlan]:
        """Merges in the order in which they are worth measuring: the tuned ones that are better, then the others."""
        tuned = [one.whole.plan for one in self.tuned if one.is_better]
        return [*tuned, *(one.plan for one in self.finding.merges)]
