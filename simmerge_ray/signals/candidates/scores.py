"""What is kept of answers: the one function of log-probabilities at the answers' positions that all prices share.

For an answer with tokens y_1..y_n of checkpoint i and a candidate m, teacher-forced: *kept* when every y_t is the
candidate's likeliest token; `nll = -sum_t log P_m(y_t)`; `kl = sum_t KL(P_i || P_m)`; `entropy = sum_t H(P_m)`. Values
are kept for each answer, so that sums add, parts can be compared, and intervals drawn. With fewer kept tokens than the
vocabulary has, all others count as one token: KL and entropy are then lower bounds (data-processing inequality), and a
token outside that would be the likeliest is seen as such by `probed`, not by `virtual`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numba import njit


@dataclass(frozen=True)
class AnswerScores:
    """Of each of A answers: kept (A,) bool; nll, kl, entropy (A,) float64, sums over its tokens in nats; num_tokens
    (A,) int64. kl is NaN where the answering checkpoint's distribution is not at hand."""

    kept: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray
    num_tokens: np.ndarray

    @property
    def retention(self) -> float:
        """Share of the answers that are kept, in [0, 1]."""
        return float(self.kept.mean())

    @property
    def mean_nll(self) -> float:
        """Nats a token."""
        return float(self.nll.sum() / self.num_tokens.sum())

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return float(self.kl.sum() / self.num_tokens.sum())

    @property
    def mean_entropy(self) -> float:
        """Nats a token."""
        return float(self.entropy.sum() / self.num_tokens.sum())


def join_scores(parts: Iterable[AnswerScores]) -> AnswerScores:
    """Scores of micro-batches in their order: the same bits whoever computed them."""
    listed = list(parts)
    return AnswerScores(*(np.concatenate([getattr(part, f.name) for part in listed]) for f in fields(AnswerScores)))


def score_answers(
    likely: np.ndarray, rest: np.ndarray, best: np.ndarray, own: np.ndarray, own_rest: np.ndarray, answer: np.ndarray
) -> AnswerScores:
    """Scores of one candidate.

    Args:
        likely, rest: (S, K) and (S,) log-probabilities of the candidate, the answer's token first.
        best: (S,) bool, whether the answer's token is the candidate's likeliest of the whole vocabulary.
        own, own_rest: the same as `likely` and `rest`, of the checkpoint whose answers they are.
        answer: (S,) which answer a position belongs to; ascending.
    """
    p, q = own.astype(np.float64), likely.astype(np.float64)
    with np.errstate(invalid="ignore"):
        kl = (np.exp(p) * (p - q)).sum(1) + _times(own_rest, own_rest.astype(np.float64) - rest)
        entropy = -(np.exp(q) * q).sum(1) - _times(rest, rest)
    starts = np.flatnonzero(np.r_[True, answer[1:] != answer[:-1]])
    return AnswerScores(
        np.logical_and.reduceat(best, starts),
        np.add.reduceat(-q[:, 0], starts),
        np.add.reduceat(np.maximum(kl, 0.0), starts),
        np.add.reduceat(np.maximum(entropy, 0.0), starts),
        np.diff(np.r_[starts, len(answer)]),
    )


def _times(log_share: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`exp(log_share) values`, 0 where the share is 0."""
    shares = np.exp(log_share.astype(np.float64))
    return np.where(shares > 0, shares * np.where(shares > 0, values, 0.0), 0.0)


# 2^f on [0, 1), relative error below 8e-8, lowest power first (least squares on Chebyshev points).
_EXP2 = tuple(
    np.float32(one) for one in (0.999999927, 0.693152968, 0.24015453, 0.0558236045, 0.00899258403, 0.00187623295)
)
_LOG2E = np.float32(1.4426950408889634)
_LOWEST = np.float32(-87.0)  # below it a probability is 0 in float32


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def mixed_scores(
    own: np.ndarray,
    mixture: np.ndarray,
    num_kept: int,
    coefficients: np.ndarray,
    starts: np.ndarray,
    found: np.ndarray,
) -> None:
    """`score_answers` of mixtures of log-probabilities, summed over answers, for N candidates.

    Every loop over a position's tokens is one that the compiler turns into vector instructions; therefore the
    exponential is a polynomial of our own.

    Args:
        own: (S, W) float32 probabilities of the answering checkpoint: of the `num_kept` kept tokens, the answer's
            first, and (unless these are the whole vocabulary) of all others together.
        mixture: (C, S, W) float32, log-probabilities of the base and differences from it of each checkpoint.
        coefficients: (N, C) float64. starts: (A + 1,) where answers begin, and the end.
        found: (N, 4): answers kept, then sums of nll, `-sum own log P_m` (cross-entropy) and entropy.
    """
    num_parts, _, width = mixture.shape
    row = np.empty(width, dtype=np.float32)
    bits = np.empty(width, dtype=np.int32)
    power = bits.view(np.float32)  # the same memory: the exponent of a float32 is written as an integer
    for n in range(len(coefficients)):
        kept, nll, cross, entropy = 0, 0.0, 0.0, 0.0
        for a in range(len(starts) - 1):
            all_best = True
            for s in range(starts[a], starts[a + 1]):
                for k in range(width):
                    row[k] = np.float32(0.0)
                for c in range(num_parts):
                    share = np.float32(coefficients[n, c])
                    if share != 0.0:
                        part = mixture[c, s]
                        for k in range(width):
                            row[k] += share * part[k]
                top = row[0]
                for k in range(1, num_kept):
                    top = max(top, row[k])
                all_best &= top == row[0]
                for k in range(num_kept, width):
                    top = max(top, row[k])
                for k in range(width):
                    row[k] = max(row[k] - top, _LOWEST)
                    whole = np.floor(row[k] * _LOG2E)
                    bits[k] = (np.int32(whole) + np.int32(127)) << np.int32(23)
                total, along, crossed = np.float32(0.0), np.float32(0.0), np.float32(0.0)
                probabilities = own[s]
                for k in range(width):
                    scaled = row[k] * _LOG2E
                    f = scaled - np.floor(scaled)
                    value = _EXP2[5]
                    value = value * f + _EXP2[4]
                    value = value * f + _EXP2[3]
                    value = value * f + _EXP2[2]
                    value = value * f + _EXP2[1]
                    value = value * f + _EXP2[0]
                    e = value * power[k]
                    total += e
                    along += e * row[k]
                    crossed += probabilities[k] * row[k]
                log_total = np.log(np.float64(total))
                nll += log_total - row[0]
                cross += log_total - crossed
                entropy += log_total - along / total
            kept += all_best
        found[n, 0], found[n, 1], found[n, 2], found[n, 3] = kept, nll, cross, entropy
