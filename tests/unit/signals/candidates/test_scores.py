"""Retention and its companions: against a slow truth from whole logits, and the laws between prices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.signals.candidates.answers import kept_log_probabilities, kept_tokens
from simmerge_ray.signals.candidates.scores import _EXP2, AnswerScores, join_scores, mixed_scores, score_answers
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


def mixed(own, parts, num_kept, coefficients, lengths):
    """`mixed_scores` on float32 copies: (N, 4)."""
    found = np.empty((len(coefficients), 4))
    starts = np.cumsum([0, *lengths])
    own, parts = (np.ascontiguousarray(one, dtype=np.float32) for one in (own, parts))
    mixed_scores(own, parts, num_kept, np.asarray(coefficients, dtype=np.float64), starts, found)
    return found


def slow_mixed(own, parts, num_kept, coefficients, lengths):
    """The same in float64."""
    found, starts = [], np.cumsum([0, *lengths])
    for row in coefficients:
        scores = np.tensordot(np.asarray(row), parts.astype(np.float64), 1)
        log_p = reference.log_softmax(scores)
        best = scores[:, 0] >= scores[:, :num_kept].max(1)
        kept = sum(bool(best[a:b].all()) for a, b in itertools.pairwise(starts))
        entropy = -(np.exp(log_p) * log_p).sum()
        found.append((kept, -log_p[:, 0].sum(), -(own.astype(np.float64) * log_p).sum(), entropy))
    return np.array(found)


def test_the_exponential_s_polynomial_is_numpy_s():
    f = np.linspace(0, 1, 100_001, dtype=np.float32)[:-1]
    value = np.float32(0.0)
    for factor in reversed(_EXP2):
        value = value * f + factor
    np.testing.assert_allclose(value.astype(np.float64), np.exp2(f.astype(np.float64)), rtol=3e-7)


@given(x=st.floats(0.0, 80.0))
@settings(max_examples=60)
def test_the_compiled_exponential_is_numpy_s_to_1e_6(x):
    """Of two tokens, one x below the other, the entropy is about x e^-x: its size is that of the exponential."""
    x = float(np.float32(x))
    found = mixed(np.array([[1.0, 0.0]]), np.array([[[0.0, -x]]]), 2, [[1.0]], [1])[0]
    log_p = -np.log1p(np.exp(-x)), -x - np.log1p(np.exp(-x))
    if x < 10:  # e^-x is seen beside 1 in float32
        assert found[1] == pytest.approx(-log_p[0], rel=1e-6, abs=1.2e-7)
    below = mixed(np.array([[0.0, 1.0]]), np.array([[[-x, 0.0]]]), 2, [[1.0]], [1])[0]
    assert below[1] == pytest.approx(-log_p[1], rel=1e-6, abs=1.2e-7)


@pytest.mark.parametrize("num_candidates", [1, 63, 64, 65, 130])
def test_candidates_go_through_many_positions_side_by_side(num_candidates):
    """In blocks, the normalising sums of many positions multiplied before a logarithm is taken."""
    generator = np.random.default_rng(num_candidates)
    lengths, vocabulary = [3] * 70, 9
    likely = reference.log_softmax(generator.normal(size=(3, sum(lengths), vocabulary)) * 3).astype(np.float32)
    parts = np.stack([likely[0], likely[1] - likely[0], likely[2] - likely[0]])
    weights = generator.uniform(0, 1.5, (num_candidates, 2)).astype(np.float32)
    coefficients = np.column_stack([np.ones(num_candidates), weights])
    given = np.exp(likely[1]), parts, vocabulary - 1
    found = mixed(*given, coefficients, lengths)
    np.testing.assert_allclose(found, slow_mixed(*given, coefficients, lengths), rtol=1e-5, atol=2e-3)
    for place in {0, num_candidates // 2, num_candidates - 1}:  # to the bit, whoever stands beside it
        np.testing.assert_array_equal(found[place], mixed(*given, coefficients[[place]], lengths)[0])


@CASES
@settings(max_examples=40)
def test_mixed_scores_are_the_slow_ones(seed, vocabulary, lengths):
    generator = np.random.default_rng(seed)
    num_positions = sum(lengths)
    logits = generator.normal(size=(3, num_positions, vocabulary)) * 4
    likely = reference.log_softmax(logits).astype(np.float32)
    parts = np.stack([likely[0], likely[1] - likely[0], likely[2] - likely[0]])
    own = np.exp(likely[1])
    num_kept = vocabulary if seed % 2 else max(1, vocabulary - 1)  # the last one may be the sum of all others
    coefficients = np.column_stack([np.ones(4), generator.uniform(0, 1.5, (4, 2)).astype(np.float32)])
    found = mixed(own, parts, num_kept, coefficients, lengths)
    expected = slow_mixed(own, parts, num_kept, coefficients, lengths)
    # float32 sums of scores up to 40 in magnitude.
    np.testing.assert_allclose(found[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-5 * num_positions)
    scores = np.tensordot(coefficients, parts.astype(np.float64), 1)[..., :num_kept]
    margins = np.abs(scores[..., :1] - scores[..., 1:])
    if margins.size == 0 or margins.min() > 1e-4:
        assert found[:, 0].tolist() == expected[:, 0].tolist()


@CASES
@settings(max_examples=40)
def test_kl_is_never_negative_and_0_for_the_own_mixture(seed, vocabulary, lengths):
    logits, _, answer = made_up(seed, vocabulary, lengths)
    virtual = virtual_of(logits, max(1, vocabulary // 2), answer)
    coefficients = np.vstack([np.random.default_rng(seed).uniform(0, 1.5, (8, 2)), [[1.0, 0.0]]])
    found = virtual.scores(coefficients)
    assert (found.kl >= 0).all() and (found.nll >= 0).all() and (found.entropy >= -1e-6).all()
    assert (found.retention >= 0).all() and found.retention[-1] == 1.0
    assert found.kl[-1] == pytest.approx(0.0, abs=2e-6)


def test_extreme_logits_give_finite_scores():
    """A probability below e^-87 counts as e^-87: float32 has no smaller one."""
    likely = np.array([[-500.0, 0.0, -1000.0], [0.0, -300.0, -np.float32(3e4)]])
    own = np.array([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]])
    found = mixed(own, likely[None], 3, [[1.0], [1.5], [0.0]], [1, 1])
    assert np.isfinite(found).all()
    assert found[0].tolist() == pytest.approx([1, 87, 87 + 0.5 * 87, 0], abs=1e-4)
    assert found[1].tolist() == pytest.approx([1, 87, 87 + 0.5 * 87, 0], abs=1e-4)
    assert found[2].tolist() == pytest.approx([2, *[2 * np.log(3)] * 3], rel=1e-6)  # all alike: all are the likeliest


def test_a_vocabulary_that_is_kept_whole_has_no_rest():
    logits, tokens, answer = made_up(6, 12, [2, 3])
    _, parts = kept_of(logits, 12)
    assert all(np.isneginf(rest).all() for _, rest in parts)
    found = virtual_of(logits, 12, answer).scores(np.array([[0.7, 0.4]]))
    assert all(np.isfinite(getattr(found, name)).all() for name in ("retention", "nll", "kl", "entropy"))
    of_all = scores_of(logits, 2, 12, tokens, answer)
    assert np.isfinite(of_all.kl).all() and np.isfinite(of_all.entropy).all()


def test_a_token_outside_the_kept_ones_is_no_answer_s_rival():
    """The rest counts in the sums, never as one token that would be likelier."""
    parts = np.log(np.array([[[0.3, 0.1, 0.6]]]))
    assert mixed(np.array([[0.3, 0.1, 0.6]]), parts, 2, [[1.0]], [1])[0, 0] == 1.0
    assert mixed(np.array([[0.3, 0.1, 0.6]]), parts, 3, [[1.0]], [1])[0, 0] == 0.0


def test_the_base_s_own_answers_are_looked_at_as_a_member_s():
    """The base answers the general probes: with all coefficients 0 it keeps all, and the mixtures are the same."""
    logits, tokens, answer = made_up(10, 30, [2, 4, 1])
    as_member = np.stack([logits[1], logits[0], logits[2]])  # the answering checkpoint is the base
    kept = kept_tokens(torch.from_numpy(as_member[0]), None, 8)
    parts = [kept_log_probabilities(torch.from_numpy(one), kept) for one in as_member]
    likely, rest = np.stack([p[0] for p in parts[1:]]), np.stack([p[1] for p in parts[1:]])
    found = VirtualAnswers(KeptAnswers(("m1", "m2"), likely, rest, *parts[0], "base", answer)).scores(
        np.array([[0.0, 0.0], [1.0, 0.0]])
    )
    assert found.retention[0] == 1.0 and found.kl[0] == pytest.approx(0.0, abs=1e-6)
    expected = score_answers(*parts[1], as_member[1].argmax(-1) == tokens, *parts[0], answer)
    assert found.nll[1] == pytest.approx(expected.mean_nll, rel=1e-5)
    assert found.kl[1] == pytest.approx(expected.mean_kl, rel=1e-4)


def test_what_one_checkpoint_keeps_is_known_unless_a_token_outside_may_be_the_likeliest():
    """Three answers of two tokens; the answer's token stands first, and `rest` is all that was not kept."""
    answer = np.array([0, 0, 1, 1, 2, 2])
    likely = np.log([[0.6, 0.1], [0.5, 0.2], [0.2, 0.5], [0.3, 0.1], [0.4, 0.3], [0.5, 0.1]])
    rest = np.log(1 - np.exp(likely).sum(1))
    kept = KeptAnswers(("m1",), likely[None], rest[None], None, None, "m1", answer)
    # In the second answer a token may be likelier than the answer's (.3 against .6 outside), but it is lost already.
    retention, nll = kept.kept_and_nll((likely, rest))
    assert retention == pytest.approx(2 / 3)
    assert nll == pytest.approx(-likely[:, 0].mean())
    likely[2] = np.log([0.5, 0.2])
    assert kept.kept_and_nll((likely, np.log(1 - np.exp(likely).sum(1)))) is None
    assert kept.kept_and_nll((likely, np.full(6, -np.inf)))[0] == 1.0  # the kept tokens are the whole vocabulary
