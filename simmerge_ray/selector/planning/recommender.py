"""From a selector and a signal table to an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.storage import Place
from simmerge_ray.plans.keeping import named_arms
from simmerge_ray.selector.data.dataset import pair_features
from simmerge_ray.selector.data.encoding import statistics_of
from simmerge_ray.selector.models.model import Selector, read_selector
from simmerge_ray.selector.models.policy import Choice
from simmerge_ray.signals.table import SignalTable, read_signal_table

INTERVAL_LEVEL = 0.95


@dataclass(frozen=True)
class RankedArm:
    """One arm for a pair, `keep(ID)` where a parent may be kept. utility, sd: averaged over the tasks. by_task: the
    prediction for each.

    interval: utility plus and minus the selector's half-width of one task, within [0, 1]; None where it has none.
    """

    arm: str
    utility: float
    sd: float
    by_task: Mapping[str, tuple[float, float]]
    interval: tuple[float, float] | None = None

    @property
    def predicted(self) -> dict[str, dict[str, float]]:
        """By task, as plan files and model cards have it."""
        return {task: {"utility": utility, "sd": sd} for task, (utility, sd) in self.by_task.items()}


@dataclass(frozen=True)
class Recommendation:
    """What to do with a pair.

    choice: the arm to take, by the selector's safe policy, and why; it need not be the first of `ranked`. ranked: every
    arm from best to worst predicted. limit: distance to the training data beyond which no prediction is acted on.
    level: of the intervals.
    """

    choice: Choice
    ranked: tuple[RankedArm, ...]
    limit: float
    level: float = INTERVAL_LEVEL

    @property
    def known(self) -> bool:
        """Whether the selector knows such checkpoints; where it does not, its numbers say nothing and are not shown."""
        return self.choice.distance <= self.limit

    @property
    def predicted(self) -> dict[str, dict[str, float]]:
        """Of the arm to take, as plan files have it; nothing where it would say nothing."""
        return self.chosen.predicted if self.known else {}

    @property
    def chosen(self) -> RankedArm:
        """The prediction for the arm to take."""
        return next(one for one in self.ranked if one.arm == self.choice.arm)


@dataclass(frozen=True)
class Recommender:
    """Ranks the arms of a selector for pairs of a signal table."""

    selector: Selector
    table: SignalTable

    @staticmethod
    def load(selector: Place, signals: Place) -> Recommender:
        """Read both artifacts. Raises SelectorError, ConfigError: one is missing, damaged or of another version."""
        return Recommender(read_selector(selector), read_signal_table(signals))

    def recommend(self, left: str, right: str, tasks: Sequence[str] = ()) -> Recommendation:
        """The arm to take for all given tasks together, and all that was predicted; no task means the parents' own.

        The best fixed arm, unless another is predicted to be better by more than what has paid, and never for
        checkpoints that are unlike those of the training. Raises PlanError: an unknown checkpoint or task, or a pair of
        one checkpoint with itself. SelectorError: the table lacks features of the training."""
        names = list(tasks) or list(self.table.pair_tasks(left, right))
        self.selector.check_table(self.table)
        features = np.array([pair_features(self.table, left, right, task) for task in names])
        features = features.reshape(len(names), 2, len(self.selector.columns))
        told = self.selector.fitted.encoding.kind == "probe_stats"
        statistics = statistics_of(self.table, names) if told else None
        utility, sd = self.selector.predict(features, names, statistics)
        choice = self.selector.choose(features, names, statistics, (left, right))
        arms = named_arms(self.selector.arms, left, right)
        # Ranked by what the network says, which is not bounded; shown as utilities, which are in [0, 1].
        order = np.argsort(-utility.mean(0), kind="stable")
        shown = utility.clip(0.0, 1.0)
        half_widths = self._half_widths()
        ranked = tuple(_ranked(arms[k], names, shown[:, k], sd[:, k], half_widths[k]) for k in order)
        return Recommendation(choice, ranked, self.selector.novelty.limit)

    def _half_widths(self) -> list[float | None]:
        """Of the interval of each arm, where the selector has them."""
        selector = self.selector
        return list(selector.half_widths(INTERVAL_LEVEL)) if selector.intervals else [None] * len(selector.arms)


def _ranked(
    arm: str, tasks: Sequence[str], utilities: np.ndarray, sds: np.ndarray, half_width: float | None
) -> RankedArm:
    by_task = dict(zip(tasks, zip(utilities.tolist(), sds.tolist(), strict=True), strict=True))
    utility, interval = float(utilities.mean()), None
    if half_width is not None:
        interval = (max(0.0, utility - float(half_width)), min(1.0, utility + float(half_width)))
    return RankedArm(arm, utility, float(sds.mean()), by_task, interval)
