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
_FAST = {"reassoc", "contract", "nsz"}
# Candidates side by side: the innermost loops are over them. Rows are taken out first, since the compiler makes vector
# instructions of one index only.
_BLOCK = 64
_PLACES = 63  # a product of the normalising sums of 64 positions stays far below the largest float64


@njit(inline="always")
def _mix(mixture: np.ndarray, position: int, shares: np.ndarray, row: np.ndarray) -> None:
    """row (W, n) = mixture (C, S, W) at a position, weighted by shares (C, n)."""
    for k in range(len(row)):
        into, value, weights = row[k], mixture[0, position, k], shares[0]
        for b in range(_BLOCK):
            into[b] = weights[b] * value
        for c in range(1, len(mixture)):
            value, weights = mixture[c, position, k], shares[c]
            for b in range(_BLOCK):
                into[b] += weights[b] * value


@njit(inline="always")
def _subtract_top(row: np.ndarray, num_kept: int, top: np.ndarray, best: np.ndarray) -> None:
    """Every candidate's largest value becomes 0. best: &= whether the first of the kept tokens has it."""
    zero = row[0]
    for b in range(_BLOCK):
        top[b] = zero[b]
    for k in range(1, num_kept):
        one = row[k]
        for b in range(_BLOCK):
            top[b] = max(top[b], one[b])
    for b in range(_BLOCK):
        best[b] &= np.int32(top[b] == zero[b])
    for k in range(num_kept, len(row)):
        one = row[k]
        for b in range(_BLOCK):
            top[b] = max(top[b], one[b])
    for k in range(len(row)):
        one = row[k]
        for b in range(_BLOCK):
            one[b] = max(one[b] - top[b], _LOWEST)


@njit(inline="always")
def _sum_up(row: np.ndarray, own: np.ndarray, sums: np.ndarray, bits: np.ndarray, power: np.ndarray) -> None:
    """sums (3, n) of `e^x`, `e^x x` and `own x` over the tokens. bits, power: the same memory, of integers and floats:
    the exponent of a float32 is written as an integer."""
    total, along, crossed = sums[0], sums[1], sums[2]
    sums[:] = np.float32(0.0)
    for k in range(len(row)):
        one, probability = row[k], own[k]
        for b in range(_BLOCK):
            bits[b] = (np.int32(np.floor(one[b] * _LOG2E)) + np.int32(127)) << np.int32(23)
        for b in range(_BLOCK):
            scaled = one[b] * _LOG2E
            f = scaled - np.floor(scaled)
            value = _EXP2[5]
            value = value * f + _EXP2[4]
            value = value * f + _EXP2[3]
            value = value * f + _EXP2[2]
            value = value * f + _EXP2[1]
            value = value * f + _EXP2[0]
            e = value * power[b]
            total[b] += e
            along[b] += e * one[b]
            crossed[b] += probability * one[b]


@njit(cache=True, nogil=True, fastmath=_FAST)
def mixed_scores(
    own: np.ndarray,
    mixture: np.ndarray,
    num_kept: int,
    coefficients: np.ndarray,
    starts: np.ndarray,
    found: np.ndarray,
) -> None:
    """`score_answers` of mixtures of log-probabilities, summed over answers, for N candidates.

    Candidates go through the positions side by side; the exponential is a polynomial of our own, which the compiler
    turns into vector instructions. A candidate's figures do not depend on who stands beside it.

    Args:
        own: (S, W) float32 probabilities of the answering checkpoint: of the `num_kept` kept tokens, the answer's
            first, and (unless these are the whole vocabulary) of all others together.
        mixture: (C, S, W) float32, log-probabilities of the base and differences from it of each checkpoint.
        coefficients: (N, C) float64. starts: (A + 1,) where answers begin, and the end.
        found: (N, 4): answers kept, then sums of nll, `-sum own log P_m` (cross-entropy) and entropy.
    """
    num_parts, _, width = mixture.shape
    row = np.empty((width, _BLOCK), dtype=np.float32)
    shares = np.empty((num_parts, _BLOCK), dtype=np.float32)
    top, bits = np.empty(_BLOCK, dtype=np.float32), np.empty(_BLOCK, dtype=np.int32)
    best, sums, power = np.empty(_BLOCK, dtype=np.int32), np.empty((3, _BLOCK), dtype=np.float32), bits.view(np.float32)
    product, logs, each = np.empty(_BLOCK), np.empty(_BLOCK), np.empty((4, _BLOCK))
    for first in range(0, len(coefficients), _BLOCK):
        size = min(_BLOCK, len(coefficients) - first)
        shares[:], each[:], logs[:], product[:] = np.float32(0.0), 0.0, 0.0, 1.0
        for b in range(size):
            for c in range(num_parts):
                shares[c, b] = np.float32(coefficients[first + b, c])
        for a in range(len(starts) - 1):
            best[:] = 1
            for s in range(starts[a], starts[a + 1]):
                _mix(mixture, s, shares, row)
                _subtract_top(row, num_kept, top, best)
                _sum_up(row, own[s], sums, bits, power)
                for b in range(_BLOCK):
                    product[b] *= sums[0, b]
                    each[1, b] -= row[0, b]
                    each[2, b] -= sums[2, b]
                    each[3, b] -= sums[1, b] / sums[0, b]
                if s & _PLACES == _PLACES:
                    logs += np.log(product)
                    product[:] = 1.0
            for b in range(_BLOCK):
                each[0, b] += best[b]
        logs += np.log(product)
        for b in range(size):
            found[first + b, 0] = each[0, b]
            for n in range(1, 4):
                found[first + b, n] = each[n, b] + logs[b]
