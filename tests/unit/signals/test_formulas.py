"""Signals of tensors against float64 pair-by-pair references, and the laws that let them be sharded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.signals.cosines import CosineMoments, layer_thirds, pairwise_cosine
from simmerge_ray.signals.divergence import entropy, pairwise_kl
from simmerge_ray.signals.weights import BLOCK_ELEMENTS, WeightSums, tensor_kind, weight_sums
from tests import reference


def log_probs(num: int, tokens: int, vocabulary: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(num, tokens, vocabulary) float32 log-probabilities near a common base's (tokens, vocabulary)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, vocabulary, generator=generator) * 3
    logits = base + noise * torch.randn(num, tokens, vocabulary, generator=generator)
    return torch.log_softmax(logits, -1), torch.log_softmax(base, -1)


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.02])  # KL about 0.5, 5e-3, 1e-4
def test_kl_of_all_pairs_equals_the_pairwise_sum(noise):
    probs, base = log_probs(5, 6, 500, noise)
    divergence = pairwise_kl(probs, base)
    exact = probs.double().log_softmax(-1).numpy()  # the float32 rounding of the inputs is not the formula's error
    for i in range(5):
        for j in range(5):
            for token in range(6):
                expected = reference.kl(exact[i, token], exact[j, token])
                assert float(divergence[token, i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_kl_is_zero_of_itself_not_negative_and_independent_of_the_reference():
    probs, base = log_probs(4, 5, 200, 0.3)
    divergence = pairwise_kl(probs, base)
    assert (divergence >= 0).all()
    assert (torch.diagonal(divergence, dim1=1, dim2=2) == 0).all()
    torch.testing.assert_close(divergence, pairwise_kl(probs, probs[2]), rtol=1e-4, atol=1e-6)


def test_adding_a_checkpoint_moves_no_old_pair():
    probs, base = log_probs(4, 5, 200, 0.3)
    torch.testing.assert_close(pairwise_kl(probs, base)[:, :3, :3], pairwise_kl(probs[:3], base), rtol=1e-6, atol=1e-9)


def test_entropy_of_a_uniform_distribution_is_the_log_of_its_size():
    assert float(entropy(torch.log_softmax(torch.zeros(1, 64), -1))) == pytest.approx(np.log(64), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 40), st.integers(0, 100))
def test_cosines_equal_the_reference(num, rows, width, seed):
    vectors = torch.randn(num, rows, width, generator=torch.Generator().manual_seed(seed)) + 0.1
    cosines = pairwise_cosine(vectors)
    assert cosines.shape == (rows, num, num)
    for row in range(rows):
        for i in range(num):
            for j in range(num):
                expected = 1.0 if i == j else reference.cosine(vectors[i, row].numpy(), vectors[j, row].numpy())
                assert float(cosines[row, i, j]) == pytest.approx(expected, abs=2e-6)


def test_cosine_with_a_zero_row_is_zero():
    vectors = torch.stack((torch.zeros(1, 3), torch.ones(1, 3)))
    assert pairwise_cosine(vectors)[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_moments_of_parts_add_up_to_the_moments_of_the_whole():
    layers = [pairwise_cosine(torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(s))) for s in range(4)]
    whole = CosineMoments.of(layers).finish()
    parts = CosineMoments.of([x[:7] for x in layers]) + CosineMoments.of([x[7:] for x in layers])
    for name, value in parts.finish().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12)
    stacked = torch.stack(layers).double()
    torch.testing.assert_close(whole["mean"], stacked.mean((0, 1)))
    torch.testing.assert_close(whole["sd"], stacked.flatten(0, 1).std(0, correction=0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(whole["min"], stacked.amin((0, 1)))
    torch.testing.assert_close(whole["late"], stacked[3].mean(0))


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 7, 32])
def test_thirds_cover_all_layers_and_none_is_empty(num_layers):
    thirds = layer_thirds(num_layers)
    assert all(thirds)
    assert set().union(*map(set, thirds)) == set(range(num_layers))


@pytest.mark.parametrize("distance", [1e-3, 1e-1])
@pytest.mark.parametrize("with_base", [True, False])
def test_weight_signals_equal_the_reference(distance, with_base):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(3, BLOCK_ELEMENTS // 2 + 11, generator=generator)  # two blocks, the second one short
    checkpoints = [base + distance * torch.randn(base.shape, generator=generator) for _ in range(4)]
    signals = weight_sums(checkpoints, base if with_base else None).finish(centre_is_base=with_base)
    exact = [c.double().numpy() for c in checkpoints]
    centre = base.double().numpy() if with_base else np.mean(exact, axis=0)
    for i in range(4):
        for j in range(4):
            if i == j:
                continue
            l2 = np.linalg.norm(exact[i] - exact[j]) / np.linalg.norm(centre)
            assert float(signals["l2"][i, j]) == pytest.approx(l2, rel=1e-5)
            assert float(signals["cosine"][i, j]) == pytest.approx(reference.cosine(exact[i], exact[j]), rel=1e-7)
            if with_base:
                vectors = exact[i] - centre, exact[j] - centre
                assert float(signals["task_vector_cosine"][i, j]) == pytest.approx(reference.cosine(*vectors), abs=1e-5)
                conflict = np.mean(np.sign(vectors[0]) != np.sign(vectors[1]))
                assert float(signals["sign_conflict"][i, j]) == pytest.approx(conflict, abs=1e-4)
                ratio = np.log(np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]))
                assert float(signals["task_vector_norm_ratio"][i, j]) == pytest.approx(ratio, abs=1e-5)
    assert ("task_vector_cosine" in signals) == with_base


def test_weight_sums_of_parts_add_up():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2 * BLOCK_ELEMENTS + 5, generator=generator) for _ in range(4)]
    whole = weight_sums(tensors[1:], tensors[0])
    parts = [
        weight_sums([t[s] for t in tensors[1:]], tensors[0][s])
        for s in (slice(0, BLOCK_ELEMENTS), slice(BLOCK_ELEMENTS, None))
    ]
    joined = WeightSums.zero(3) + parts[0] + parts[1]
    assert torch.equal(joined.gram, whole.gram)
    assert torch.equal(joined.sign_product, whole.sign_product)


def test_a_checkpoint_equal_to_the_base_gives_finite_signals():
    base = torch.ones(10)
    signals = weight_sums([base, base + 0.5, base], base).finish(centre_is_base=True)
    assert all(bool(torch.isfinite(value).all()) for value in signals.values())
    assert float(signals["task_vector_cosine"][0, 1]) == 0.0
    assert float(signals["l2"][0, 2]) == 0.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "embedding"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("transformer.h.0.ln_1.bias", "norm"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("rotary.inv_freq", "other"),
    ],
)
def test_tensor_kinds(name, kind):
    assert tensor_kind(name) == kind
