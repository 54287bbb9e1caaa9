"""Retention and its companions: against a slow truth from whole logits, and the laws between prices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.signals.candidates.answers import kept_log_probabilities, kept_tokens
from simmerge_ray.signals.candidates.scores import AnswerScores, join_scores, score_answers
from simmerge_ray.signals.candidates.virtual import KeptAnswers, VirtualAnswers
from tests import reference


def made_up(seed: int, vocabulary: int, lengths: list[int], num_checkpoints: int = 2):
    """Logits (1 + M, S, V) of base and checkpoints, tokens and answer numbers; checkpoint 1 answers."""
    generator = np.random.default_rng(seed)
    answer = np.repeat(np.arange(len(lengths)), lengths)
    base = generator.normal(size=(len(answer), vocabulary))
    logits = np.stack([base, *(base + generator.normal(size=base.shape) for _ in range(num_checkpoints))])
    return logits.astype(np.float32), logits[1].argmax(-1), answer


def kept_of(logits: np.ndarray, num_kept: int):
    kept = kept_tokens(torch.from_numpy(logits[1]), torch.from_numpy(logits[0]), num_kept)
    return kept, [kept_log_probabilities(torch.from_numpy(one), kept) for one in logits]


def scores_of(logits: np.ndarray, index: int, num_kept: int, tokens: np.ndarray, answer: np.ndarray) -> AnswerScores:
    _, parts = kept_of(logits, num_kept)
    return score_answers(*parts[index], logits[index].argmax(-1) == tokens, *parts[1], answer)


CASES = given(
    seed=st.integers(0, 2**16),
    vocabulary=st.integers(2, 40),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
)


@CASES
@settings(max_examples=40)
def test_scores_are_those_of_whole_logits_where_the_vocabulary_is_kept(seed, vocabulary, lengths):
    logits, tokens, answer = made_up(seed, vocabulary, lengths)
    expected = reference.answer_scores(logits[2], logits[1], tokens, answer)
    found = scores_of(logits, 2, vocabulary, tokens, answer)
    assert found.kept.tolist() == expected["kept"]
    assert found.num_tokens.tolist() == expected["num_tokens"]
    for name in ("nll", "kl", "entropy"):
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-5, atol=1e-5)


@CASES
@settings(max_examples=40)
def test_kept_tokens_bound_kl_and_entropy_from_below_and_change_nothing_else(seed, vocabulary, lengths):
    logits, tokens, answer = made_up(seed, vocabulary, lengths)
    whole = scores_of(logits, 2, vocabulary, tokens, answer)
    part = scores_of(logits, 2, max(1, vocabulary // 3), tokens, answer)
    assert part.kept.tolist() == whole.kept.tolist()
    np.testing.assert_allclose(part.nll, whole.nll, rtol=1e-5, atol=1e-5)
    assert (part.kl <= whole.kl + 1e-4).all()
    assert (part.entropy <= whole.entropy + 1e-4).all()


@pytest.mark.parametrize("num_kept", [1, 5, 30])
def test_a_checkpoint_keeps_all_of_its_own_answers(num_kept):
    logits, tokens, answer = made_up(3, 30, [4, 1, 2])
    found = scores_of(logits, 1, num_kept, tokens, answer)
    assert found.retention == 1.0
    np.testing.assert_allclose(found.kl, 0.0, atol=1e-6)


def test_scores_of_micro_batches_join_to_those_of_all():
    logits, tokens, answer = made_up(4, 20, [2, 3, 1, 4])
    whole = scores_of(logits, 2, 20, tokens, answer)
    first = answer < 2
    parts = [scores_of(logits[:, chosen], 2, 20, tokens[chosen], answer[chosen]) for chosen in (first, ~first)]
    joined = join_scores(parts)
    for name in ("kept", "nll", "kl", "entropy", "num_tokens"):
        assert getattr(joined, name).tolist() == getattr(whole, name).tolist()


def test_kept_tokens_hold_the_answer_first_and_the_likeliest_of_checkpoint_and_base():
    logits, tokens, _ = made_up(5, 50, [3, 3])
    kept = kept_tokens(torch.from_numpy(logits[1]), torch.from_numpy(logits[0]), 4)
    assert kept[:, 0].tolist() == tokens.tolist()
    assert all(len(set(row)) == 4 for row in kept.tolist())
    for place, row in enumerate(kept.tolist()):
        assert int(logits[0][place].argmax()) in row


def virtual_of(logits: np.ndarray, num_kept: int, answer: np.ndarray, with_base: bool = True, **more) -> VirtualAnswers:
    _, parts = kept_of(logits, num_kept)
    likely, rest = np.stack([p[0] for p in parts[1:]]), np.stack([p[1] for p in parts[1:]])
    ids = tuple(f"m{n}" for n in range(1, len(logits)))
    base = parts[0] if with_base else (None, None)
    return VirtualAnswers(KeptAnswers(ids, likely, rest, *base, "m1", answer), **more)


@CASES
@settings(max_examples=30)
def test_virtual_scores_are_those_of_the_mixed_logits(seed, vocabulary, lengths):
    logits, tokens, answer = made_up(seed, vocabulary, lengths)
    generator = np.random.default_rng(seed)
    coefficients = generator.uniform(0, 1.5, size=(3, 2))
    found = virtual_of(logits, vocabulary, answer).scores(coefficients)
    for number, (first, second) in enumerate(coefficients):
        mixed = logits[0] + first * (logits[1] - logits[0]) + second * (logits[2] - logits[0])
        expected = reference.answer_scores(mixed, logits[1], tokens, answer)
        total = sum(expected["num_tokens"])
        np.testing.assert_allclose(found.nll[number], sum(expected["nll"]) / total, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.kl[number], sum(expected["kl"]) / total, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.entropy[number], sum(expected["entropy"]) / total, rtol=1e-4, atol=1e-4)
        margins = np.sort(mixed, -1)
        if (margins[:, -1] - margins[:, -2]).min() > 1e-4:
            assert found.retention[number] == pytest.approx(np.mean(expected["kept"]))


@pytest.mark.parametrize("with_base", [True, False])
def test_a_virtual_checkpoint_alone_is_itself(with_base):
    logits, tokens, answer = made_up(7, 30, [2, 4, 1])
    found = virtual_of(logits, 8, answer, with_base).scores(np.eye(2))
    for number in (0, 1):
        expected = scores_of(logits, number + 1, 8, tokens, answer)
        assert found.nll[number] == pytest.approx(expected.mean_nll, rel=1e-5)
        assert found.kl[number] == pytest.approx(expected.mean_kl, rel=1e-4, abs=1e-6)
    assert found.retention[0] == 1.0


def test_the_curve_passes_through_the_average_and_the_checkpoints():
    """Where members interact, the straight mixture is off at the average; the curved one is exact there and at them."""
    logits, tokens, answer = made_up(8, 30, [2, 4, 1])
    interaction = np.random.default_rng(9).normal(size=logits[0].shape).astype(np.float32)
    average = logits[1:].mean(0) + 0.25 * interaction  # c_1 c_2 times the interaction
    kept, parts = kept_of(logits, 30)
    of_average = kept_log_probabilities(torch.from_numpy(average), kept)
    curved = virtual_of(logits, 30, answer, averaged=("m1", "m2"), average=of_average)
    coefficients = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.9, 0.7]])
    found = curved.scores(coefficients)
    for number, (first, second) in enumerate(coefficients):
        mixed = logits[0] + first * (logits[1] - logits[0]) + second * (logits[2] - logits[0])
        mixed = mixed + first * second * interaction
        expected = reference.answer_scores(mixed, logits[1], tokens, answer)
        np.testing.assert_allclose(found.nll[number], sum(expected["nll"]) / len(tokens), rtol=1e-4, atol=1e-4)
    assert parts
