"""Rewards as training data: the utility of a merge by the one arm that was made, nothing of the other arms.

Which arm was made was drawn given the features and nothing else, so among the merges that an arm was made of, the
utility has the same mean given the features as among all: a regression on what was observed needs no weights by
propensities. These would help only where the model cannot follow the truth, and would cost most of the data: weights
are for comparing policies (`bandit.off_policy`), not for fitting. Decisions that were not drawn serve here as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.storage import digest_bytes, digest_json
from simmerge_ray.plans.keeping import KEEP
from simmerge_ray.selector.data.orders import heads_of


@dataclass(frozen=True)
class RewardedMerge:
    """members: checkpoints of the pair or plan. tasks: that `utility` is the mean over. arm: an operator, or `keep`,
    which is about the first checkpoint of the first order. features: (T, 2, F), of the (last) step."""

    members: tuple[str, ...]
    tasks: tuple[str, ...]
    arm: str
    utility: float
    features: np.ndarray


@dataclass(frozen=True)
class SingleArms:
    """G rewarded merges as a model sees them.

    inputs: (G, 2, T, D), standardised, both orders, T the largest number of tasks; of keep the first order twice, which
    is the one that it is about. shares: (G, T), the weight of each task in the mean, 0 where a merge has fewer. heads:
    (G,) of the arms. utility: (G,). merges: (G,), equal where the same checkpoints were merged.
    """

    inputs: np.ndarray
    shares: np.ndarray
    heads: np.ndarray
    utility: np.ndarray
    merges: np.ndarray

    def drawn_counts(self, generator: np.random.Generator) -> np.ndarray:
        """(G,): how often each counts in a bootstrap of the merges, in which all rewards of a merge stay together."""
        num_merges = int(self.merges.max()) + 1
        drawn = np.bincount(generator.integers(num_merges, size=num_merges), minlength=num_merges)
        result: np.ndarray = drawn[self.merges]
        return result


def single_arms(
    rewards: Sequence[RewardedMerge], arms: Sequence[str], inputs: Sequence[np.ndarray]
) -> SingleArms | None:
    """From rewards and their (T, 2, D) inputs; None without any."""
    if not rewards:
        return None
    most, num_inputs = max(map(len, inputs)), inputs[0].shape[-1]
    padded, shares = np.zeros((len(rewards), 2, most, num_inputs)), np.zeros((len(rewards), most))
    for row, (reward, one) in enumerate(zip(rewards, inputs, strict=True)):
        orders = [0, 0] if reward.arm == KEEP else [0, 1]
        padded[row, :, : len(one)] = one.transpose(1, 0, 2)[orders]
        shares[row, : len(one)] = 1 / len(one)
    names = [tuple(sorted(one.members)) for one in rewards]
    unique = sorted(set(names))
    heads = heads_of(arms)
    chosen, utility = [heads.index(one.arm) for one in rewards], [one.utility for one in rewards]
    merges = [unique.index(name) for name in names]
    return SingleArms(padded, shares, np.array(chosen), np.array(utility), np.array(merges))


def rewards_digest(rewards: Sequence[RewardedMerge]) -> str:
    """Digest of all rewards, in their order."""
    texts = [digest_json([one.members, one.tasks, one.arm, one.utility]).encode() for one in rewards]
    return digest_bytes(*texts, *(np.ascontiguousarray(one.features).tobytes() for one in rewards))


def without(rewards: Sequence[RewardedMerge], left_out: Collection[str]) -> list[RewardedMerge]:
    """The rewards of merges that hold none of these checkpoints, in their order."""
    return [one for one in rewards if not set(left_out).intersection(one.members)]
