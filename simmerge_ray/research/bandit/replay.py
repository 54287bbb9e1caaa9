"""Replay of full-information labels: what each policy would have reached, round by round.

Every merge has the measured utility of every arm, so any policy can be played on it. A reward is what one half of the
items shows, the regret is counted on the other half, and the oracle chooses on the first: else noise would be learned,
and the best of many arms would be inflated by it (split-half oracle).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from simmerge_ray.base.errors import BanditError
from simmerge_ray.search.headroom import Context
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.service.bandit.policy import NeuralLinearTS


@dataclass(frozen=True)
class Rounds:
    """T rounds with K arms.

    z: (T, d). level: (T,). reward: (T, K), utility on one half of the items, which a policy learns of the arm that it
    played. truth: (T, K), on the other half. available: (T, K) bool, the arms that exist in a round. gap: (T,), by
    which a difference of utilities is divided to give GapClosed; NaN where that is not defined.
    """

    arms: tuple[str, ...]
    z: np.ndarray
    level: np.ndarray
    reward: np.ndarray
    truth: np.ndarray
    available: np.ndarray
    gap: np.ndarray

    def __post_init__(self) -> None:
        if not self.available.any(1).all():
            raise BanditError("a round has no arm that may be played")

    def ordered(self, order: Sequence[int] | np.ndarray) -> Rounds:
        """The same rounds in another order; an index may be left out or occur twice."""
        index = np.asarray(order, dtype=np.int64)
        return Rounds(self.arms, *(getattr(self, name)[index] for name in _ARRAYS))


_ARRAYS = ("z", "level", "reward", "truth", "available", "gap")


@dataclass
class Highest:
    """The arm with the highest of given scores (T, K), in the order of the rounds: a static selector."""

    scores: np.ndarray

    def play(self, number: int, rounds: Rounds) -> int:
        """The column of the arm to play in round `number`; looks at its context, not at its rewards."""
        return int(np.where(rounds.available[number], self.scores[number], -np.inf).argmax())

    def learn(self, number: int, column: int, reward: float, rounds: Rounds) -> None:
        """The reward (raw utility) of a round that was played, maybe some rounds ago."""


def always(column: int, rounds: Rounds) -> Highest:
    """One arm where it may be played, else the first that may."""
    return Highest(np.tile(np.eye(len(rounds.arms))[column], (len(rounds.z), 1)))


@dataclass
class Bandit:
    """`NeuralLinearTS` in a replay; without `explore` it is greedy. key: of its draws."""

    policy: NeuralLinearTS
    key: str
    explore: bool = True

    def play(self, number: int, rounds: Rounds) -> int:
        allowed = [arm for arm, may in zip(rounds.arms, rounds.available[number], strict=True) if may]
        known = [arm for arm in allowed if arm in self.policy.arms]
        suggestion = self.policy.suggest(rounds.z[number], f"{self.key}/{number}", self.explore, among=known)
        return rounds.arms.index(suggestion.arm)

    def learn(self, number: int, column: int, reward: float, rounds: Rounds) -> None:
        self.policy.update([(rounds.arms[column], rounds.z[number], reward - float(rounds.level[number]))])


Player: TypeAlias = Highest | Bandit


def replay(player: Player, rounds: Rounds, delay: int = 0, on_round: Callable[[int], None] | None = None) -> np.ndarray:
    """(T,) columns played, one round after the other.

    Args:
        delay: rounds after which a reward is learned (0: at once); those due after the end are not.
        on_round: called before each round, e.g. to add an arm to the player's policy.
    """
    played = np.zeros(len(rounds.z), dtype=np.int64)
    for number in range(len(rounds.z)):
        if on_round is not None:
            on_round(number)
        if (known := number - delay - 1) >= 0:
            player.learn(known, int(played[known]), float(rounds.reward[known, played[known]]), rounds)
        column = player.play(number, rounds)
        if not rounds.available[number, column]:
            raise BanditError(f"round {number}: {rounds.arms[column]!r} may not be played")
        played[number] = column
    return played


def expected_uniform(rounds: Rounds) -> np.ndarray:
    """(T,) mean truth of an arm drawn at random."""
    result: np.ndarray = np.where(rounds.available, rounds.truth, 0.0).sum(1) / rounds.available.sum(1)
    return result


def obtained(played: np.ndarray, rounds: Rounds) -> np.ndarray:
    """(T,) truth of what was played."""
    result: np.ndarray = rounds.truth[np.arange(len(played)), played]
    return result


def oracle(rounds: Rounds) -> np.ndarray:
    """(T,) truth of the arm whose reward is highest: chosen on one half, scored on the other."""
    return obtained(np.where(rounds.available, rounds.reward, -np.inf).argmax(1), rounds)


def regret(value: np.ndarray, rounds: Rounds, as_gap_closed: bool = False) -> np.ndarray:
    """(T,) oracle minus value; in GapClosed where asked, NaN where that is not defined. May be negative in a round."""
    result: np.ndarray = oracle(rounds) - value
    return result / rounds.gap if as_gap_closed else result


def rounds_of(
    dataset: SelectionDataset,
    merges: Sequence[Sequence[int]],
    z: np.ndarray,
    level: np.ndarray,
    gaps: Mapping[int, float],
    first_half: bool = True,
) -> Rounds:
    """Rounds of merges, each on all of its tasks together, in their order.

    Args:
        merges: rows of the dataset, by merge. gaps: by row, where GapClosed is defined (`Scoring.gap`). first_half:
            rewards come from the first half of the items; False exchanges the halves.
    """
    reward, truth, gap = [], [], []
    for rows in merges:
        both = np.mean([_halves(dataset.contexts[row], dataset.arms) for row in rows], axis=0)
        reward.append(both[int(not first_half)])
        truth.append(both[int(first_half)])
        known = [gaps[row] for row in rows if row in gaps]
        gap.append(float(np.mean(known)) if known else np.nan)
    available = np.ones((len(merges), len(dataset.arms)), dtype=bool)
    return Rounds(dataset.arms, z, level, np.array(reward), np.array(truth), available, np.array(gap))


def _halves(context: Context, arms: Sequence[str]) -> np.ndarray:
    """(2, K) mean utility on the two halves of the items."""
    items = np.array([context.arms[arm] for arm in arms])
    half = items.shape[1] // 2
    return np.array([items[:, :half].mean(1), items[:, half : 2 * half].mean(1)])
