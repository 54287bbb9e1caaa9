"""Inputs of the predictor: what a candidate keeps of a task's owners, of all others, and what is known of both before.

Nothing here knows how a candidate was made. Owners of one task are averaged, so that neither their order nor their
number counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.selector.finding.virtual import VirtualScorer

COLUMNS = (
    "retention", "nll", "likelihood", "others_retention", "others_least", "base_retention", "base_likelihood",
    "own_likelihood",
)  # fmt: skip
_MOST_NATS = 5.0  # a token; what is worse is as bad


@dataclass(frozen=True)
class SingleValues:
    """What single checkpoints make of O owners' answers, (O,) each: the base's retention and nll, and each owner's nll
    on its own answers, in nats a token."""

    base_retention: np.ndarray
    base_nll: np.ndarray
    own_nll: np.ndarray

    def of(self, owners: Sequence[int]) -> SingleValues:
        """Of some owners."""
        chosen = list(owners)
        return SingleValues(self.base_retention[chosen], self.base_nll[chosen], self.own_nll[chosen])


def candidate_features(
    tasks: Sequence[str], retention: np.ndarray, nll: np.ndarray, singles: SingleValues
) -> tuple[tuple[str, ...], np.ndarray]:
    """The tasks, sorted, and the inputs (N, T, F) of N candidates, in the order of `COLUMNS`.

    Of a task's owners: retention, nll (at most 5 nats a token), likelihood `exp(-nll)`, the base's retention and
    likelihood, the owners' own likelihood; of the owners of all other tasks (of the same where there is no other) mean
    and least retention.

    Args:
        tasks: (O,) of each owner. retention, nll: (N, O), probed or virtual.
    """
    names = tuple(sorted(set(tasks)))
    found = np.empty((len(retention), len(names), len(COLUMNS)))
    for place, name in enumerate(names):
        own = [index for index, task in enumerate(tasks) if task == name]
        others = [index for index, task in enumerate(tasks) if task != name] or own
        of_task = singles.of(own)
        found[:, place] = np.column_stack(
            [
                retention[:, own].mean(1),
                np.minimum(nll[:, own], _MOST_NATS).mean(1),
                np.exp(-nll[:, own]).mean(1),
                retention[:, others].mean(1),
                retention[:, others].min(1),
                *np.broadcast_to(
                    [
                        [of_task.base_retention.mean()],
                        [np.exp(-of_task.base_nll).mean()],
                        [np.exp(-of_task.own_nll).mean()],
                    ],
                    (3, len(retention)),
                ),
            ]
        )
    return names, found


def single_values(checkpoints: Sequence[str], owners: Sequence[str], scorer: VirtualScorer) -> SingleValues:
    """From signatures, where they are exact: a checkpoint as it is is no mixture.

    Args:
        checkpoints: of the scorer, in the order of its coefficients. owners: checkpoints of the scorer's owners.
    """
    count = len(checkpoints)
    scores = scorer.of_sums(np.concatenate([np.zeros((1, count)), np.eye(count)]))
    own = [scores.nll[1 + checkpoints.index(name), place] for place, name in enumerate(owners)]
    return SingleValues(scores.retention[0], scores.nll[0], np.array(own))
