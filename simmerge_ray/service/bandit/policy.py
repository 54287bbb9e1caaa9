"""Neural-linear Thompson sampling: which arm for a merge, and learning from its reward.

The context z is the output of the selector's frozen encoder (Riquelme et al. 2018, arXiv:1802.09127), with one Bayesian
linear model for each arm on it. Where there is a posterior of `keep`, the parents of a pair are two choices, each with
a context of its own (`warm_start`), whose draws are independent. `suggest` learns nothing, `update` takes what is new;
rewards may come late, in any order, or never. A decision's draw is a function of its id and of the arm's name alone: it
can be replayed from the log.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from simmerge_ray.base.errors import BanditError, unknown_name
from simmerge_ray.plans.keeping import KEEP
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.propensities import Draws, safe_propensities, thompson_propensities, with_floor


@dataclass(frozen=True)
class SafeRule:
    """Leave the arm `fixed` only for a draw that exceeds its own by `threshold` (utility; infinity: never)."""

    fixed: str
    threshold: float


@dataclass(frozen=True)
class Noise:
    """Spread of the rewards around the model."""

    variance: float

    def __post_init__(self) -> None:
        if not (self.variance > 0 and math.isfinite(self.variance)):
            raise BanditError(f"the noise variance is {self.variance}; it must be a finite number above 0")


@dataclass(frozen=True)
class Suggestion:
    """What was decided for one context, and how.

    arm: to play. propensities: probability of each arm under the policy, all that the log needs for off-policy
    evaluation; 1 for `arm` without exploration. means: of the arms' rewards given what is known. draws: that were
    compared. explored: whether it was drawn at all.
    """

    arms: tuple[str, ...]
    arm: str
    propensities: np.ndarray
    means: np.ndarray
    draws: np.ndarray
    explored: bool


class NeuralLinearTS:
    """Posteriors of the arms and the rule that plays them.

    Args:
        posteriors: by arm, of equal dimensions; a prior for an arm that was never played. noise: of the rewards. safe:
            None plays plain Thompson sampling. floor: probability that every arm is played with at least, mixed in
            before the draw. A discount leaves `posteriors` whole.

    Raises BanditError: no arms, dimensions that differ, a fixed arm that is none of them or `keep`, or a floor that
    leaves nothing (K floor > 1), or is 0 where the threshold is infinite and exploration would never happen.
    """

    def __init__(
        self,
        posteriors: Mapping[str, GaussianPosterior],
        noise: Noise,
        safe: SafeRule | None = None,
        floor: float = 0.0,
    ) -> None:
        if not posteriors:
            raise BanditError("a policy needs an arm at least")
        if len({posterior.num_dimensions for posterior in posteriors.values()}) > 1:
            raise BanditError("the arms' posteriors have different dimensions")
        if safe is not None and safe.fixed not in (merges := [arm for arm in posteriors if arm != KEEP]):
            raise BanditError(unknown_name("fixed arm", safe.fixed, merges))
        if not 0 <= floor * (count := num_choices(posteriors)) <= 1:
            raise BanditError(f"the floor is {floor}; with {count} arms it must be in [0, 1/{count}]")
        if safe is not None and math.isinf(safe.threshold) and floor == 0:
            raise BanditError("a policy that never leaves its fixed arm needs a floor above 0, or it never learns")
        self._posteriors = dict(posteriors)
        self._priors = dict(posteriors)
        self.noise, self.safe, self.floor = noise, safe, floor

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self._posteriors)

    def posterior(self, arm: str) -> GaussianPosterior:
        """Raises BanditError for an unknown arm."""
        if arm not in self._posteriors:
            raise BanditError(unknown_name("arm", arm, self._posteriors))
        return self._posteriors[arm]

    def suggest(
        self,
        z: np.ndarray,
        decision_id: str,
        explore: bool = True,
        classes: Iterable[Sequence[str]] = (),
        among: Sequence[str] | None = None,
        kept: Mapping[str, np.ndarray] | None = None,
    ) -> Suggestion:
        """Choose an arm for a context z (d,). Nothing is learned, and the same call gives the same answer.

        Args:
            explore: False plays the arm of the highest mean (under the safe rule, with its means in place of draws);
                its propensity is logged as 1, and such decisions are left out of off-policy estimates. classes: arms
                whose merge is one and the same here; a class is played as one arm, the one that is known best (the
                fixed arm in its own class), and has one propensity, shown at that arm. among: arms that may be played;
                None takes all. kept: what keeping each parent is called, and its context (d,); None keeps none.

        Raises BanditError: an unknown arm, or none that may be played.
        """
        marginals = self._marginals(z, among, kept or {})
        arms, fixed = self._representatives({arm: spread for arm, (_, spread) in marginals.items()}, classes)
        location, spread = np.array([marginals[arm] for arm in arms]).T
        draws = Draws(location, math.sqrt(self.noise.variance) * spread)
        if explore:
            values = sampled(draws, np.array([keyed_uniform(decision_id, arm) for arm in arms]))
            propensities = with_floor(self._propensities(draws, fixed), min(self.floor, 1 / len(arms)))
            chosen = self._chosen(values, fixed)
            if self.floor and keyed_uniform(decision_id, "", "floor") < len(arms) * self.floor:
                chosen = int(keyed_uniform(decision_id, "", "floor arm") * len(arms))
        else:
            values = draws.location
            chosen = self._chosen(values, fixed)
            propensities = np.eye(len(arms))[chosen]
        return Suggestion(tuple(arms), arms[chosen], propensities, draws.location, values, explore)

    def update(self, observations: Iterable[tuple[str, np.ndarray, float]]) -> None:
        """Learn rewards, in the given order: (arm, z, r) each, r the utility less the level of the decision; arms whose
        merges were identical share a reward.
        Raises BanditError: an unknown arm, or numbers that are not finite.
        """
        for arm, z, reward in observations:
            self._posteriors[arm] = self.posterior(arm).updated(z, reward)

    def discount(self, factor: float) -> None:
        """All that was observed counts `factor` of what it did. An explicit event of the log, never a side effect."""
        self._posteriors = {arm: one.discounted(factor, self._priors[arm]) for arm, one in self._posteriors.items()}

    def add_arm(self, arm: str, prior: GaussianPosterior) -> None:
        """An arm that may be played from now on. Raises BanditError: it exists, or the prior has other dimensions."""
        if arm in self._posteriors:
            raise BanditError(f"arm {arm!r} exists already")
        dimensions = next(iter(self._posteriors.values())).num_dimensions
        if prior.num_dimensions != dimensions:
            raise BanditError(f"the prior of {arm!r} has {prior.num_dimensions} dimensions, the others {dimensions}")
        self._posteriors[arm] = self._priors[arm] = prior

    def _marginals(
        self, z: np.ndarray, among: Sequence[str] | None, kept: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[float, float]]:
        """Mean and spread of what may be played, each at its context."""
        contexts = {arm: (arm, z) for arm in self._posteriors if arm != KEEP}
        if KEEP in self._posteriors:
            contexts |= {name: (KEEP, own) for name, own in kept.items()}
        allowed = list(contexts if among is None else dict.fromkeys(among))
        for arm in allowed:
            if arm not in contexts:
                raise BanditError(unknown_name("arm", arm, contexts))
        if not allowed:
            raise BanditError("no arm may be played")
        return {name: self._posteriors[arm].marginal(at) for name in allowed for arm, at in (contexts[name],)}

    def _representatives(
        self, spreads: Mapping[str, float], classes: Iterable[Sequence[str]]
    ) -> tuple[list[str], int | None]:
        """Of what may be played, of each class of identical arms that with the smallest spread, and which of them is
        the fixed arm or the same merge."""
        allowed, fixed = list(spreads), self.safe.fixed if self.safe else None
        for members in classes:
            same = [arm for arm in allowed if arm in members]
            if len(same) > 1:
                kept = min(same, key=lambda arm: (arm != fixed, spreads[arm], arm))
                allowed = [arm for arm in allowed if arm not in same or arm == kept]
            if same and fixed in members and fixed not in allowed:
                fixed = next(arm for arm in same if arm in allowed)
        return allowed, allowed.index(fixed) if fixed in allowed else None

    def _propensities(self, draws: Draws, fixed: int | None) -> np.ndarray:
        if self.safe is None or fixed is None:
            return thompson_propensities(draws)
        return safe_propensities(draws, fixed, self.safe.threshold)

    def _chosen(self, values: np.ndarray, fixed: int | None) -> int:
        if self.safe is None or fixed is None:
            return int(values.argmax())
        others = values.copy()
        others[fixed] = -np.inf
        best = int(others.argmax())
        return best if others[best] - values[fixed] > self.safe.threshold else fixed


def num_choices(arms: Collection[str]) -> int:
    """How many arms a pair has: `keep` stands for both parents."""
    return len(arms) + (KEEP in arms)


def keyed_uniform(decision_id: str, name: str, purpose: str = "draw") -> float:
    """In (0, 1), from a keyed hash: the same on every machine, and adding an arm changes no other arm's draw."""
    text = f"{decision_id}\0{name}\0{purpose}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 12
    return (number + 0.5) / (1 << 52)


def sampled(draws: Draws, uniforms: np.ndarray) -> np.ndarray:
    """(K,) draws by inversion."""
    return draws.location + draws.scale * ndtri(uniforms)
