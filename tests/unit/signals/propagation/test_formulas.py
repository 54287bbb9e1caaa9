"""Laws of the formulas on float64 arrays, against explicit merging of vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.signals.propagation.bound import Bound
from simmerge_ray.signals.propagation.halfway import curve_shares
from simmerge_ray.signals.propagation.interface import Intermediate, members
from simmerge_ray.signals.propagation.outputs import mixed_outputs
from simmerge_ray.signals.propagation.second_order import (
    centred_gram,
    closed_cosine,
    mixed_distance,
    paired_forms,
    point_forms,
    quadratic_divergence,
)
from simmerge_ray.signals.propagation.span import blend, blend_shares, kth_largest, trimmed
from simmerge_ray.signals.propagation.tensor_space import TensorSpace
from simmerge_ray.signals.signature import TaskOutputs, TensorSample
from tests import reference
from tests.tables import synthetic_table

TABLE = synthetic_table(6)

ARMS = (
    make_arm("linear"),
    make_arm("slerp"),
    make_arm("slerp", {"threshold": 1.0}),
    make_arm("nuslerp"),
    make_arm("task_arithmetic", {"scale": 0.7}),
    make_arm("task_arithmetic", {"normalize": True}),
)
weights = st.floats(0.0, 1.0)
steps = st.lists(st.tuples(st.sampled_from(ARMS), weights, st.integers(0, 99), st.integers(0, 99)), max_size=4)


def gram_products(gram, left, right):
    """Inner products of two coefficient vectors (K,) by the Gram matrix (K, K) of [base, task vectors]."""

    def products(centred):
        origin = np.zeros(len(gram))
        origin[0] = float(centred)
        a, b = left - origin, right - origin
        return float(a @ gram @ a), float(a @ gram @ b), float(b @ gram @ b)

    return products


def textbook(arm, base, left, right, weight):
    factor = 2.0 if arm.spec.needs_base else 1.0
    merge = getattr(reference, arm.operator)
    return merge(base, [left, right], [factor * (1.0 - weight), factor * weight], **arm.param_dict())


@given(st.integers(0, 2**32 - 1), st.sampled_from((3, 7, 64)), st.sampled_from((1e-3, 0.1, 3.0)), steps)
@settings(max_examples=120)
def test_coefficients_at_any_depth_are_the_merge_itself(seed, size, distance, drawn):
    """Norms and products of intermediates of up to 4 steps, any source on either side, from the Gram matrix alone."""
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(size)
    vectors = generator.standard_normal((4, size)) * distance
    basis = np.concatenate((base[None], vectors))
    gram = basis @ basis.T
    coefficients = [np.eye(5)[0] + np.eye(5)[i] for i in range(1, 5)]
    explicit = [base + vector for vector in vectors]
    for arm, weight, a, b in drawn:
        left, right = a % len(explicit), b % len(explicit)
        products = gram_products(gram, coefficients[left], coefficients[right])
        shares = blend_shares(arm, weight, products, with_base=True)
        coefficients.append(blend(coefficients[left], coefficients[right], shares))
        explicit.append(textbook(arm, base, explicit[left], explicit[right], weight))
    found = np.stack(coefficients) @ gram @ np.stack(coefficients).T
    expected = np.stack(explicit) @ np.stack(explicit).T
    norms = np.sqrt(np.outer(np.diagonal(expected), np.diagonal(expected)))
    assert np.abs(found - expected).max() <= 1e-12 * norms.max()
    change = np.stack(explicit) - base
    found_change = (np.stack(coefficients) - np.eye(5)[0]) @ basis
    assert np.linalg.norm(found_change - change) <= 1e-12 * np.linalg.norm(np.stack(explicit))


def test_without_a_base_nuslerp_is_slerp_of_the_weights():
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((2, 50))
    products = [float(left @ left), float(left @ right), float(right @ right)]
    found = blend_shares(make_arm("nuslerp"), 0.3, lambda centred: pytest.fail() if centred else products, False)
    np.testing.assert_allclose(
        found[0] * left + found[1] * right, reference.nuslerp(None, [left, right], [0.7, 0.3]), rtol=1e-12
    )


def space_of(base, vectors, count, generator):
    """A tensor of n elements of which `count` are sampled, with its exact Gram matrix."""
    index = np.sort(generator.choice(len(base), count, replace=False))
    basis = np.concatenate((base[None], vectors)).astype(np.float64)
    nothing = np.zeros(3), np.full(3, np.nan, np.float32)
    samples = [TensorSample(len(base), (base + vector)[index].astype(np.float32), *nothing) for vector in vectors]
    return TensorSpace(basis @ basis.T, base[index].astype(np.float32), samples), index


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=40)
def test_products_of_any_vectors_are_exact_where_a_tensor_is_kept_whole(seed, size, other):
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(size).astype(np.float32)
    vectors = (generator.standard_normal((3, size)) * 0.1).astype(np.float32)
    vectors = (base + vectors) - base  # as float32 weights give them back
    space, _ = space_of(base, vectors, size, generator)
    values = generator.standard_normal((2, size))
    fitted = [space.fitted(one, np.eye(4)[[0, 1, 2]]) for one in values]
    for one, expected in zip(fitted, values, strict=True):
        np.testing.assert_allclose(space.sampled(one), expected, atol=1e-9)
    tolerance = 1e-6 * (1.0 + np.abs(values).sum())
    np.testing.assert_allclose(space.products(fitted), values @ values.T, atol=tolerance)


def test_calibrated_weights_make_products_of_the_span_exact_and_others_nearly():
    """Squares of trimmed heavy-tailed vectors: what their largest entries do to a sample the sources do, too."""
    generator = np.random.default_rng(1)
    base = generator.standard_normal(200_000)
    vectors = generator.standard_t(4, (2, 200_000)) * 0.1
    space, index = space_of(base, vectors, 2000, generator)
    used = np.stack([space.sampled(space.vector(number)) for number in range(3)])
    weights = space.weights((0, 1, 2))
    np.testing.assert_allclose((used * weights) @ used.T, space.gram, rtol=1e-6, atol=1e-6 * space.gram.max())
    change = np.where(np.abs(vectors[0]) > np.abs(vectors[1]), vectors[0], vectors[1])
    fitted = space.fitted(change[index], np.eye(3))
    error = space.products([fitted])[0, 0] / (change @ change) - 1.0
    plain = space.scale * (change[index] @ change[index]) / (change @ change) - 1.0
    assert abs(error) < 0.02 and abs(error) < 0.5 * abs(plain)


points = st.integers(0, 2**32 - 1)


@given(points, st.integers(2, 6), st.integers(1, 9))
def test_quadratic_forms_are_exact_for_points_that_mix_linearly(seed, num, dimension):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((num, dimension))
    left, right = (v / v.sum() for v in generator.uniform(0.1, 1.0, (2, num)))
    distance = np.linalg.norm(x[:, None] - x[None], axis=2)
    expected = np.linalg.norm(left @ x - right @ x)
    squares = distance * distance
    assert mixed_distance(*paired_forms(left[None], right[None], squares))[0] == pytest.approx(expected, abs=1e-6)
    to_points = np.linalg.norm(left @ x - x, axis=1)
    np.testing.assert_allclose(mixed_distance(*point_forms(left[None], 0, squares))[0], to_points, atol=1e-6)
    np.testing.assert_allclose(
        centred_gram(distance), (x - x[0]) @ (x - x[0]).T, atol=1e-12 * (1 + distance.max() ** 2)
    )
    one = np.eye(num)
    assert quadratic_divergence(*paired_forms(one[:1], one[1:2], distance))[0] == pytest.approx(distance[0, 1])
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert closed_cosine(*paired_forms(left[None], right[None], unit @ unit.T))[0] == pytest.approx(
        reference.cosine(left @ unit, right @ unit), abs=1e-9
    )
    assert closed_cosine(*paired_forms(one[:1], one[:1], unit @ unit.T))[0] == pytest.approx(1.0)


def outputs_of(logits):
    zero = np.zeros((1, 1, 1), np.float32)
    flags = np.zeros(len(logits), np.int64)
    return TaskOutputs(logits.astype(np.float32), zero, zero[None] + 1.0, flags > 0, flags, flags, flags[:1])


@given(st.integers(0, 2**32 - 1), weights, st.integers(2, 30), st.floats(0.01, 5.0))
def test_the_bound_holds_for_kl_from_a_mixture_of_logits(seed, weight, vocabulary, scale):
    """`KL(C || m) <= (1 - w) KL(C || A) + w KL(C || B)`: log-partition is convex in the logits."""
    generator = np.random.default_rng(seed)
    a, b, c = generator.standard_normal((3, 1, vocabulary)) * scale
    mixture = mixed_outputs([outputs_of(a), outputs_of(b)], [1.0 - weight, weight]).logits
    logs = [reference.log_softmax(logits)[0] for logits in (a, b, mixture)]
    truth = reference.log_softmax(c)[0]
    bound = (1.0 - weight) * reference.kl(truth, logs[0]) + weight * reference.kl(truth, logs[1])
    assert reference.kl(truth, logs[2]) <= bound + 1e-5 * (1 + bound)


def test_a_mixture_of_one_is_it_and_attention_rows_keep_their_sum():
    generator = np.random.default_rng(2)
    rows = generator.dirichlet(np.ones(6), (2, 3, 4, 5)).astype(np.float32)
    both = [
        TaskOutputs(*generator.standard_normal((2, 2, 7)).astype(np.float32), one, *[np.zeros(2)] * 4) for one in rows
    ]
    alone = mixed_outputs(both, [1.0, 0.0])
    np.testing.assert_array_equal(alone.logits, both[0].logits)
    np.testing.assert_array_equal(alone.hidden, both[0].hidden)
    np.testing.assert_allclose(alone.attention, both[0].attention, atol=1e-7)
    beyond = mixed_outputs(both, [-1.0, 2.0]).attention
    assert beyond.min() >= 0.0
    np.testing.assert_allclose(beyond.sum(-1), 1.0, atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.lists(st.floats(0.1, 2.0), min_size=1, max_size=4), weights)
def test_curves_are_exact_for_quadratic_outputs_of_parallel_task_vectors(seed, scales, reach):
    """One checkpoint alone, identical ones and multiples of one: any quadratic function of the weights."""
    generator = np.random.default_rng(seed)
    base, direction = generator.standard_normal((2, 5))
    linear, quadratic = generator.standard_normal(5), generator.standard_normal((5, 5))

    def f(weights):
        return weights @ linear + weights @ quadratic @ weights

    vectors = np.outer(scales, direction)
    # So far as the merged task vector has of each at most that one: outside a line takes the parabola's place.
    coefficients = reach * min(scales) / sum(scales) * generator.uniform(0.0, 1.0, len(scales))
    merged = coefficients @ vectors
    expected = f(base + merged)
    shares = [
        curve_shares(c, float(vector @ merged / (vector @ vector)))
        for c, vector in zip(coefficients, vectors, strict=True)
    ]
    found = f(base) * (1.0 - np.sum(shares))
    found += sum(h * f(base + v / 2) + w * f(base + v) for (h, w), v in zip(shares, vectors, strict=True))
    assert found == pytest.approx(expected, abs=1e-8 * (1.0 + np.abs(quadratic).sum() * np.abs(vectors).max() ** 2))


def test_beyond_the_checkpoint_the_curve_is_a_line():
    assert curve_shares(1.7, 1.7) == (0.0, 1.7)
    assert curve_shares(1.0, 1.0) == (0.0, 1.0)
    assert curve_shares(0.0, 0.0) == (0.0, 0.0)


@given(st.lists(weights, min_size=1, max_size=5))
def test_shares_of_the_members_sum_to_1(drawn):
    bound, source = Bound(TABLE), "c00"
    for number, weight in enumerate(drawn, 1):
        source = Intermediate(make_arm("linear"), weight, f"c{number:02d}", source)
    shares = bound.barycentric(source)
    assert shares.sum() == pytest.approx(1.0)
    assert set(np.array(bound.ids)[shares != 0]) <= set(members(source))


@pytest.mark.parametrize("levels", [3, 50, 10**9])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_a_sample_is_trimmed_like_the_whole(levels, density):
    """The share that is kept, also where weights in few bits make most magnitudes equal to the threshold."""
    generator = np.random.default_rng(levels)
    whole = np.round(generator.standard_normal(40_000) * levels) / levels
    threshold = kth_largest(whole, density)
    sample = generator.choice(whole, 4000)
    found = trimmed(sample, threshold, density)
    assert np.count_nonzero(found) / 4000 == pytest.approx(density, abs=5 * (density * (1 - density) / 4000) ** 0.5)
    kept = found != 0
    np.testing.assert_array_equal(found[kept], sample[kept])
    assert np.abs(sample[kept]).min() >= threshold >= np.abs(sample[~kept]).max() - 1 / levels
