"""From a selector and a signal table to an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.storage import Place
from simmerge_ray.selector.models.model import Prediction, Selector, read_selector
from simmerge_ray.selector.models.policy import Choice
from simmerge_ray.signals.table import SignalTable, read_signal_table

INTERVAL_LEVEL = 0.95


@dataclass(frozen=True)
class RankedArm:
    """One arm for a pair. utility, sd: averaged over the tasks. by_task: the prediction for each.

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
    def chosen(self) -> RankedArm:
        """The prediction for the arm to take."""
        return next(one for one in self.ranked if one.arm == self.choice.arm)


class Recommender:
    """Ranks the arms of a selector for pairs of a signal table."""

    def __init__(self, selector: Selector, table: SignalTable) -> None:
        self._selector = selector
        self._table = table

    @staticmethod
    def load(selector: Place, signals: Place) -> Recommender:
        """Read both artifacts.

        Raises:
            SelectorError, ConfigError: one of them is missing, damaged or of another version.
        """
        return Recommender(read_selector(selector), read_signal_table(signals))

    @property
    def model_version(self) -> str:
        """See `Selector.version`."""
        return self._selector.version

    @property
    def best_fixed(self) -> str:
        return self._selector.best_fixed

    def rank(self, left: str, right: str, tasks: Sequence[str] = ()) -> list[RankedArm]:
        """Arms from best to worst for all given tasks together; none given means the parents' own tasks.

        Raises:
            PlanError: an unknown checkpoint or task, or a pair of one checkpoint with itself.
        """
        names = list(tasks) or list(self._table.pair_tasks(left, right))
        predictions = self._selector.predict_pair(self._table, left, right, names)
        # Ranked by what the network says, which is not bounded; shown as utilities, which are in [0, 1].
        pooled = np.mean([prediction.utility for prediction in predictions.values()], axis=0)
        return [self._ranked(index, predictions) for index in np.argsort(-pooled, kind="stable")]

    def _ranked(self, index: int, predictions: Mapping[str, Prediction]) -> RankedArm:
        by_task = {t: (float(np.clip(p.utility[index], 0.0, 1.0)), float(p.sd[index])) for t, p in predictions.items()}
        utility, sd = (float(value) for value in np.mean(list(by_task.values()), axis=0))
        interval = None
        if self._selector.intervals is not None:
            half_width = float(self._selector.half_widths(INTERVAL_LEVEL)[index])
            interval = (max(0.0, utility - half_width), min(1.0, utility + half_width))
        return RankedArm(self._selector.arms[index], utility, sd, by_task, interval)

    def recommend(self, left: str, right: str, tasks: Sequence[str] = ()) -> Recommendation:
        """The arm to take for all given tasks together, and all that was predicted; tasks and errors as in `rank`.

        The best fixed arm, unless another is predicted to be better by more than what has paid, and never for
        checkpoints that are unlike those of the training.
        """
        names = list(tasks) or list(self._table.pair_tasks(left, right))
        choice = self._selector.choose_pair(self._table, left, right, names)
        return Recommendation(choice, tuple(self.rank(left, right, names)), self._selector.novelty.limit)
