"""Pairs of checkpoints as one published selector sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from simmerge_ray.base.errors import SelectorError
from simmerge_ray.plans.keeping import keep_label, named_arms
from simmerge_ray.selector.data.dataset import pair_features
from simmerge_ray.selector.data.orders import heads_of
from simmerge_ray.selector.models.influence import influences
from simmerge_ray.selector.planning.recommender import Recommendation, Recommender
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.warm_start import COLD_NOISE, EncodedPairs, cold_ridge, contexts_of
from simmerge_ray.service.registry import Published
from simmerge_ray.service.schemas import Influence
from simmerge_ray.signals.features import both_orders
from simmerge_ray.signals.table import SignalTable

_KEPT_CONTEXTS = 20_000
_MAX_AVERAGED = 200  # pairs that the average pair is taken of


@dataclass(frozen=True, eq=False)
class PairContext:
    """A pair on its tasks together.

    features: raw (T, 2, F). z (d,), level: mean over the tasks. kept: contexts (d,) of keeping left and right, by what
    that is called. answer: of the selector alone. classes: of arms that make the same merge of it.
    """

    left: str
    right: str
    tasks: tuple[str, ...]
    features: np.ndarray
    z: np.ndarray
    level: float
    kept: Mapping[str, np.ndarray]
    answer: Recommendation
    classes: tuple[tuple[str, ...], ...]

    def features_of(self, arm: str) -> np.ndarray:
        """(T, 2, F), as the log has them: of a kept parent the order in which it comes first stands first."""
        return self.features[:, ::-1] if arm == keep_label(self.right) else self.features

    @property
    def novel(self) -> bool:
        """Whether the selector was not trained for such checkpoints."""
        return self.answer.choice.distance > self.answer.limit


class Contexts:
    """Pairs of a table as one selector sees them; the same request is computed once.
    Raises BanditError: a selector without an encoder. SelectorError: one with a task encoding; the log has features
    alone, and a new epoch could not encode them again.
    """

    def __init__(self, published: Published, table: SignalTable) -> None:
        selector = published.selector
        if (kind := selector.fitted.encoding.kind) != "none":
            raise SelectorError(f"the service needs a selector with the task encoding none, this one has {kind}")
        self.published, self._table = published, table
        self._recommender = Recommender(selector, table)
        self._averages: dict[str, np.ndarray] = {}
        self.of = lru_cache(_KEPT_CONTEXTS)(self._of)
        z, _ = self.encode(np.zeros((1, 2, len(selector.columns))))
        self.num_dimensions = len(z)

    def encode(self, features: np.ndarray, keep: bool = False) -> tuple[np.ndarray, float]:
        """Raw features (T, 2, F) of a decision -> z (d,) and level, means over the tasks. keep: z of keeping the first
        checkpoint of the first order."""
        encoded = self._encoded(features)
        z = encoded.z_by_order[:, 0] if keep else encoded.z
        return z.mean(0), float(encoded.level.mean())

    def _encoded(self, features: np.ndarray) -> EncodedPairs:
        return contexts_of(self.published.selector.fitted, features, None)

    def _of(self, left: str, right: str, task: str | None) -> PairContext:
        """Raises PlanError: an unknown checkpoint or task, or twice the same checkpoint."""
        tasks = (task,) if task is not None else self._table.pair_tasks(left, right)
        features = np.array([pair_features(self._table, left, right, one) for one in tasks])
        features = features.reshape(len(tasks), 2, len(self.published.selector.columns))
        encoded = self._encoded(features)
        z, level = encoded.z.mean(0), float(encoded.level.mean())
        kept = dict(zip(map(keep_label, (left, right)), encoded.z_by_order.mean(0), strict=True))
        answer = self._recommender.recommend(left, right, tasks)
        identical = self.published.warm.identical if self.published.warm else {}
        first, second = sorted((left, right))
        return PairContext(left, right, tasks, features, z, level, kept, answer, identical.get((first, second), ()))

    def priors(self) -> tuple[dict[str, GaussianPosterior], Noise]:
        """What the arms start from, and the noise: posteriors from the labels, or priors that know nothing."""
        warm = self.published.warm
        if warm is not None:
            return dict(warm.posteriors), warm.noise
        cold = GaussianPosterior.prior(self.num_dimensions, cold_ridge(COLD_NOISE))
        return dict.fromkeys(heads_of(self.published.selector.arms), cold), COLD_NOISE

    def why(self, context: PairContext) -> list[Influence]:
        """Groups of signals, and how far each moves the prediction of the chosen arm from that of the average pair."""
        selector = self.published.selector
        arm = named_arms(selector.arms, context.left, context.right).index(context.answer.choice.arm)
        average = np.array([self._average(task) for task in context.tasks])

        def predict(features: np.ndarray) -> np.ndarray:
            utility, _ = selector.predict(features, list(context.tasks) * (len(features) // len(context.tasks)))
            return utility[:, arm].reshape(-1, len(context.tasks)).mean(1)

        found = influences(predict, context.features, average, selector.columns)
        return [Influence(signal=name, effect=effect) for name, effect in found]

    def _average(self, task: str) -> np.ndarray:
        """(2, F): of pairs of the table, evenly spread."""
        if task not in self._averages:
            ids = self._table.checkpoint_ids
            pairs = [(a, b) for a in ids for b in ids if a < b]
            some = pairs[:: max(1, len(pairs) // _MAX_AVERAGED)]
            values = self._table.values_of(some, task, self._table.columns)
            self._averages[task] = both_orders(values, self._table.columns).mean(0)
        return self._averages[task]
