"""Candidates that nobody has merged: their log-probabilities at answers as mixtures of the checkpoints'.

`l_m = l_0 + sum_i c_i (l_i - l_0)` with the base's logits l_0 and one coefficient for each checkpoint (cross-task
linearity, arXiv:2402.03660); log-probabilities differ from logits by a number for each position, which normalising
takes out. Without a base the coefficients add up to 1 and l_0 is left out. `curved` adds what is known at one more
point, the plain average of a group of members: there the mixture is off by a residual r, and everywhere else by
`r sum_{i<j} c_i c_j / (the same at the average)`, the part of a second-order expansion that two members share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.signals.candidates.scores import mixed_scores

LogProbs = tuple[np.ndarray, np.ndarray]  # (S, K) of kept tokens, and (S,) of all others together


@dataclass(frozen=True)
class KeptAnswers:
    """What signatures hold of one checkpoint's answers: log-probabilities of all checkpoints at their positions.

    ids: of the checkpoints, in order. likely: (M, S, K), rest: (M, S), log-probabilities of the kept tokens, the
    answer's first, and of all others; `base_likely`, `base_rest` those of the base, None without one. owner: id of the
    answering checkpoint, the base's where it is not among `ids`. answer: (S,) which answer a position belongs to.
    """

    ids: tuple[str, ...]
    likely: np.ndarray
    rest: np.ndarray
    base_likely: np.ndarray | None
    base_rest: np.ndarray | None
    owner: str
    answer: np.ndarray

    @property
    def own(self) -> LogProbs:
        """(S, K) and (S,) of the answering checkpoint."""
        return self.of(self.owner)

    def of(self, checkpoint: str) -> LogProbs:
        """(S, K) and (S,) of one of `ids`, or else of the base."""
        if checkpoint in self.ids:
            place = self.ids.index(checkpoint)
            return self.likely[place], self.rest[place]
        assert self.base_likely is not None and self.base_rest is not None
        return self.base_likely, self.base_rest

    def kept_and_nll(self, found: LogProbs) -> tuple[float, float] | None:
        """Retention, and nll in nats a token, of whoever gives these log-probabilities; None where they leave open
        whether an answer is kept: a token that is not among the kept ones may be the likeliest."""
        likely, rest = found
        is_lost = likely[:, 0] < likely.max(1)
        is_first = ~is_lost & (likely[:, 0] >= rest)  # as likely as all others together
        starts = self.starts[:-1]
        lost, first = np.logical_or.reduceat(is_lost, starts), np.logical_and.reduceat(is_first, starts)
        if not (lost | first).all():
            return None
        return float(first.mean()), -float(likely[:, 0].astype(np.float64).mean())

    @property
    def starts(self) -> np.ndarray:
        """(A + 1,) first position of every answer, and the end."""
        return np.flatnonzero(np.r_[True, self.answer[1:] != self.answer[:-1], True])

    @property
    def num_tokens(self) -> int:
        return len(self.answer)


@dataclass(frozen=True)
class CandidateSignals:
    """Of N candidates for one member's answers, (N,) float64 each: retention in [0, 1]; nll, kl, entropy in nats a
    token."""

    retention: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray


class VirtualAnswers:
    """Scores mixtures on one member's answers.

    Args:
        average: log-probabilities (S, K) and (S,) of the plain average of `averaged`, for `curved`; None for a straight
            mixture.
    """

    def __init__(
        self,
        kept: KeptAnswers,
        averaged: Sequence[str] = (),
        average: LogProbs | None = None,
    ) -> None:
        self._kept = kept
        all_likely = _with_rest(kept.likely, kept.rest)
        if kept.base_likely is not None and kept.base_rest is not None:
            base = _with_rest(kept.base_likely[None], kept.base_rest[None])
            self._parts = np.concatenate([base, all_likely - base])
            self._has_base = True
        else:
            self._parts, self._has_base = all_likely, False
        self._pairs: list[tuple[int, int]] = []
        if average is not None:
            places = [kept.ids.index(name) + self._has_base for name in averaged]
            self._pairs = [(i, j) for number, i in enumerate(places) for j in places[number + 1 :]]
            at_average = np.zeros(len(self._parts))
            at_average[places] = 1.0 / len(places)
            at_average[0] = 1.0 if self._has_base else at_average[0]
            straight = np.tensordot(at_average, self._parts, 1)
            real = _with_rest(average[0][None], average[1][None])[0]
            # Both up to a number for each position: the answer's token stands first.
            residual = (real - real[:, :1]) - (straight - straight[:, :1])
            self._parts = np.concatenate([self._parts, residual[None]])
            self._at_average = len(self._pairs) / len(places) ** 2
        self._parts = np.ascontiguousarray(self._parts, dtype=np.float32)
        likely, rest = kept.own
        own = _with_rest(likely[None], rest[None])[0].astype(np.float64)
        self._own = np.ascontiguousarray(np.exp(own), dtype=np.float32)
        self._own_entropy = float(-(np.exp(own) * own).sum())

    def scores(self, coefficients: np.ndarray) -> CandidateSignals:
        """Signals of N candidates.

        Args:
            coefficients: (N, M), of the task vectors of the checkpoints in the order of `KeptAnswers.ids`; without a
                base of the checkpoints themselves.
        """
        given = np.asarray(coefficients, dtype=np.float64)
        full = np.concatenate([np.ones((len(given), 1)), given], 1) if self._has_base else given
        if self._pairs:
            shared = sum(full[:, i] * full[:, j] for i, j in self._pairs) / self._at_average
            full = np.concatenate([full, np.asarray(shared)[:, None]], 1)
        found = np.empty((len(full), 4))
        num_kept = self._kept.likely.shape[-1]
        mixed_scores(self._own, self._parts, num_kept, np.ascontiguousarray(full), self._kept.starts, found)
        tokens = self._kept.num_tokens
        return CandidateSignals(
            found[:, 0] / (len(self._kept.starts) - 1),
            found[:, 1] / tokens,
            np.maximum(found[:, 2] - self._own_entropy, 0.0) / tokens,
            found[:, 3] / tokens,
        )


def _with_rest(likely: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """(C, S, K + 1), or (C, S, K) where the kept tokens are the whole vocabulary."""
    return likely if np.isneginf(rest).all() else np.concatenate([likely, rest[..., None]], -1)
