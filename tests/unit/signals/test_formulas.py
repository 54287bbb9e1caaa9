"""Signals of tensors against float64 pair-by-pair references, and the laws that let them be sharded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.signals.cosines import cosine_statistics, pairwise_cosine
from simmerge_ray.signals.divergence import log_softmax, pairwise_kl
from simmerge_ray.signals.features import layer_thirds
from simmerge_ray.signals.weights import BLOCK_ELEMENTS, WeightSums, sums_in_blocks, tensor_kind, tensor_layer
from tests import reference


def log_probs(num: int, tokens: int, vocabulary: int, noise: float, seed: int = 0) -> torch.Tensor:
    """(num + 1, tokens, vocabulary) float64 log-probabilities of float32 logits near a common base, which is first."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, tokens, vocabulary, generator=generator) * 3
    logits = base + noise * torch.randn(num, tokens, vocabulary, generator=generator)
    return log_softmax(torch.cat((base, logits)))


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.02])  # KL about 0.5, 5e-3, 1e-4
def test_kl_of_all_pairs_equals_the_pairwise_sum(noise):
    probs = log_probs(5, 6, 500, noise)
    divergence = pairwise_kl(probs)
    for i in range(6):
        for j in range(6):
            for token in range(6):
                expected = reference.kl(probs[i, token].numpy(), probs[j, token].numpy())
                assert float(divergence[token, i, j]) == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_kl_is_zero_of_itself_not_negative_and_independent_of_the_reference():
    probs = log_probs(4, 5, 200, 0.3)
    divergence = pairwise_kl(probs)
    assert (divergence >= 0).all()
    assert (torch.diagonal(divergence, dim1=1, dim2=2) == 0).all()
    order = torch.tensor([2, 0, 1, 4, 3])
    torch.testing.assert_close(divergence[:, order][:, :, order], pairwise_kl(probs[order]), rtol=1e-9, atol=1e-14)


def test_adding_a_checkpoint_moves_no_old_pair():
    probs = log_probs(4, 5, 200, 0.3)
    torch.testing.assert_close(pairwise_kl(probs)[:, :3, :3], pairwise_kl(probs[:3]), rtol=1e-9, atol=1e-14)


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


def test_statistics_of_cosines_are_those_of_all_layers_and_rows():
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    layers = [pairwise_cosine(torch.randn(3, 20, 8, generator=one)).double() for one in generators]
    whole = cosine_statistics(layers)
    stacked = torch.stack(layers)
    torch.testing.assert_close(whole["mean"], stacked.mean((0, 1)))
    torch.testing.assert_close(whole["sd"], stacked.flatten(0, 1).std(0, correction=0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(whole["min"], stacked.amin((0, 1)))
    torch.testing.assert_close(whole["late"], stacked[3].mean(0))


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 7, 32])
def test_thirds_cover_all_layers_and_none_is_empty(num_layers):
    thirds = list(layer_thirds(num_layers).values())
    assert all(thirds)
    assert set().union(*map(set, thirds)) == set(range(num_layers))


def sums_of(checkpoints: list[np.ndarray], base: np.ndarray | None, density: float = 0.2) -> WeightSums:
    """Sums of one float32 tensor in blocks, with the thresholds of trimming."""
    rows = np.stack([c.ravel() for c in checkpoints])
    centre = rows.mean(0, dtype=np.float64).astype(np.float32) if base is None else base.ravel()
    keep = max(1, int(density * centre.size))
    thresholds = np.sort(np.abs(rows - centre), axis=1)[:, -keep]
    return sums_in_blocks(lambda a, b: (rows[:, a:b] - centre[a:b], centre[a:b]), centre.size, thresholds)


@pytest.mark.parametrize("distance", [1e-3, 1e-1])
@pytest.mark.parametrize("with_base", [True, False])
def test_weight_signals_equal_the_reference(distance, with_base):
    generator = np.random.default_rng(3)
    base = generator.standard_normal((3, BLOCK_ELEMENTS // 2 + 11), dtype=np.float32)  # two blocks, the second short
    checkpoints = [base + distance * generator.standard_normal(base.shape, dtype=np.float32) for _ in range(4)]
    signals = sums_of(checkpoints, base if with_base else None).signals(with_base)
    exact = [c.astype(np.float64) for c in checkpoints]
    centre = base.astype(np.float64) if with_base else np.mean(exact, axis=0)
    for i in range(4):
        for j in range(4):
            if i == j:
                continue
            l2 = np.linalg.norm(exact[i] - exact[j]) / np.linalg.norm(centre)
            assert signals["l2"][i, j] == pytest.approx(l2, rel=1e-5)
            assert signals["cosine"][i, j] == pytest.approx(reference.cosine(exact[i], exact[j]), rel=1e-9)
            if with_base:
                vectors = exact[i] - centre, exact[j] - centre
                assert signals["task_vector_cosine"][i, j] == pytest.approx(
                    reference.cosine(*vectors), rel=1e-5, abs=1e-9
                )
                conflict = np.mean(np.sign(vectors[0]) != np.sign(vectors[1]))
                assert signals["sign_conflict"][i, j] == pytest.approx(conflict, abs=1e-4)
                ratio = np.log(np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]))
                assert signals["task_vector_norm_ratio"][i, j] == pytest.approx(ratio, rel=1e-5, abs=1e-8)
                keep = int(0.2 * base.size)
                kept = [set(np.argsort(-np.abs(c - base).ravel())[:keep].tolist()) for c in checkpoints]
                overlap = len(kept[i] & kept[j]) / keep
                assert signals["trimmed_overlap"][i, j] == pytest.approx(overlap, abs=1e-4)
    assert ("task_vector_cosine" in signals) == with_base


def test_weight_sums_of_parts_add_up():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((3, 2 * BLOCK_ELEMENTS + 5), dtype=np.float32)
    centre = generator.standard_normal(rows.shape[1], dtype=np.float32)
    low = np.full(3, 1.0, dtype=np.float32)
    whole = sums_in_blocks(lambda a, b: (rows[:, a:b], centre[a:b]), rows.shape[1], low)
    first = sums_in_blocks(lambda a, b: (rows[:, a:b], centre[a:b]), BLOCK_ELEMENTS, low)
    rows_left, centre_left = rows[:, BLOCK_ELEMENTS:], centre[BLOCK_ELEMENTS:]
    rest = sums_in_blocks(lambda a, b: (rows_left[:, a:b], centre_left[a:b]), BLOCK_ELEMENTS + 5, low)
    joined = first + rest
    assert np.allclose(joined.gram, whole.gram, rtol=1e-13)
    assert np.array_equal(joined.sign_product, whole.sign_product)
    assert np.array_equal(joined.overlap, whole.overlap)


def test_a_checkpoint_equal_to_the_base_gives_finite_signals():
    base = np.ones(10, dtype=np.float32)
    signals = sums_of([base, base + np.float32(0.5), base], base).signals(True)
    assert all(np.isfinite(value).all() for value in signals.values())
    assert signals["task_vector_cosine"][0, 1] == 0.0
    assert np.abs(signals["task_vector_norm_ratio"]).max() < 20  # not the logarithm of zero
    assert signals["l2"][0, 2] == 0.0
    assert signals["trimmed_overlap"][0, 1] == 0.0


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


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11),
        ("transformer.h.0.ln_1.bias", 0),
        ("h.7.mlp.c_fc.weight", 7),
        ("model.embed_tokens.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_layers_of_tensors(name, index):
    assert tensor_layer(name) == index
