"""Laws of single operators."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm
from simmerge_ray.plans.operators.table import OPERATORS, fell_back
from tests import reference
from tests.operators import apply, assert_same, tensors, two_way


@given(weight=st.floats(0.0, 1.0), seed=st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_linear_of_two_rounds_as_its_formula_does(weight, seed):
    _, left, right = (tensor.float() for tensor in tensors((33,), seed=seed))
    assert torch.equal(two_way("linear", None, left, right, weight=weight), (1 - weight) * left + weight * right)


def test_task_arithmetic_at_half_scale_is_linear():
    base, left, right = tensors((64, 33))
    half = two_way("task_arithmetic", base, left, right, weight=0.3, scale=0.5)
    assert_same(half, two_way("linear", None, left, right, weight=0.3))
    assert_same(two_way("task_arithmetic", base, left, right, weight=0.3, normalize=True), half)


def test_task_arithmetic_at_weight_half_is_the_sum_of_task_vectors():
    base, left, right = tensors((7,))
    assert_same(two_way("task_arithmetic", base, left, right), left + right - base)


def test_pruning_nothing_leaves_task_arithmetic_or_ties():
    base, *sources = tensors((64, 33), count=3)
    everything = {
        "dare_linear": {},
        "della_linear": {},
        "breadcrumbs": {"gamma": 0.0},
        "dare_ties": {"normalize": True},
        "della": {},
        "breadcrumbs_ties": {"gamma": 0.0, "normalize": True},
    }
    for name, params in everything.items():
        like = "ties" if params.get("normalize", OPERATOR_SPECS[name].parameters["normalize"].default) else None
        expected = apply("ties", base, sources, density=1.0) if like else apply("task_arithmetic", base, sources)
        assert_same(apply(name, base, sources, density=1.0, **params), expected)


def test_slerp_is_linear_above_its_threshold_and_not_below():
    _, left, right = tensors((64, 33))
    linear = two_way("linear", None, left, right)
    assert torch.equal(two_way("slerp", None, left, right, threshold=0.5), linear)
    assert not torch.allclose(two_way("slerp", None, left, right, threshold=1.0), linear)
    assert fell_back("slerp", None, [left, right], threshold=0.5)
    assert not fell_back("slerp", None, [left, right], threshold=1.0)


@pytest.mark.parametrize("name", ["slerp", "karcher", "multislerp", "nuslerp"])
def test_means_on_the_sphere_of_equal_norms_keep_the_norm(name):
    left, right = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    for weight in (0.1, 0.5, 0.9):
        assert float(two_way(name, None, left, right, weight=weight).norm()) == pytest.approx(3.0, rel=1e-6)


@given(weight=st.sampled_from([0.1, 0.3, 0.5, 0.8]), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_the_karcher_mean_of_two_unit_vectors_is_slerp(weight, seed):
    _, left, right = (tensor / tensor.norm() for tensor in tensors((33,), seed=seed))
    # The iteration stops at a step of tol = 1e-5, which is the error of its result.
    karcher = two_way("karcher", None, left, right, weight=weight, tol=1e-9, max_iter=100)
    torch.testing.assert_close(
        karcher, two_way("slerp", None, left, right, weight=weight, threshold=1.0), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "karcher", "multislerp"])
def test_opposite_tensors_have_no_arc_and_are_averaged(name):
    left = torch.tensor([1.0, 2.0])
    assert torch.equal(two_way(name, None, left, -left), torch.zeros(2))
    assert fell_back(name, None, [left, -left]) == (name in ("slerp", "nuslerp"))


@pytest.mark.parametrize("factor", [-1.0, -1 / 3, -0.7, 1 / 3, 1.7])
@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_collinear_tensors_are_averaged_in_spite_of_rounding(name, factor):
    for seed in range(20):
        for shape in ((1,), (7,), (64, 33)):
            left = tensors(shape, seed=seed)[0]
            left *= 3 / left.norm()  # large beside the eps of multislerp
            params = {"threshold": 1.0} if name == "slerp" else {}
            merged = two_way(name, None, left, factor * left, weight=0.5, **params)
            # Opposite directions of equal weight have no mean; parallel ones have the mean norm, which is the average.
            assert_same(merged, 0.5 * (1 + factor) * left)


def test_nuslerp_falls_back_only_where_task_vectors_are_collinear():
    base, left, right = tensors((8, 6))
    for params in ({}, {"flatten": False}, {"flatten": False, "row_wise": True}):
        assert not fell_back("nuslerp", base, [left, right], **params)
        assert fell_back("nuslerp", base, [left, left], **params)
        assert_same(two_way("nuslerp", base, left, left, **params), left)
    one_row = right.clone()
    one_row[3] = left[3]
    assert not fell_back("nuslerp", base, [left, one_row], flatten=False)
    merged = two_way("nuslerp", base, left, one_row, flatten=False)
    assert_same(merged[3], left[3])


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ("slerp", "nuslerp")])
def test_other_operators_never_fall_back(name):
    base, left, _ = tensors((7,))
    assert not fell_back(name, base, [left, left], **make_arm(name).param_dict())


def test_all_task_vectors_zero_leave_the_base_for_any_number_of_sources():
    # The method's divisor is 0 here; a frozen tensor must not end the merge.
    base = tensors((7,))[0]
    assert torch.equal(apply("multislerp", base, [base] * 3), base)


def test_karcher_refuses_negative_weights():
    _, *sources = tensors((7,))
    with pytest.raises(OperatorError, match="must not be negative"):
        apply("karcher", None, sources, (2.0, -1.0))


def test_model_stock_goes_all_the_way_for_equal_models_and_nowhere_for_orthogonal_or_opposite_ones():
    base, left, _ = tensors((7,))
    assert_same(apply("model_stock", base, [left, left, left]), left)
    zero = torch.zeros(2)
    assert torch.equal(apply("model_stock", zero, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]), zero)
    assert torch.equal(apply("model_stock", zero, [torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])]), zero)


# Their rule is absolute: a distance, or a softmax of the weights.
NOT_HOMOGENEOUS = ("nearswap", "ram", "ramplus_tl", "arcee_fusion")


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    "name", [name for name, spec in OPERATOR_SPECS.items() if spec.needs_base and name not in NOT_HOMOGENEOUS]
)
def test_scaling_all_task_vectors_scales_the_result(name, size):
    # No absolute threshold on task vectors: small fine-tunes merge as large ones do.
    _, *sources = tensors((64, 33))
    zero = torch.zeros_like(sources[0])
    expected = apply(name, zero, sources)
    scaled = apply(name, zero, [size * s for s in sources])
    np.testing.assert_allclose(scaled.numpy() / size, expected.numpy(), rtol=1e-9, atol=1e-12)


def test_sce_weights_a_large_task_vector_more_and_selects_where_sources_differ():
    zero = torch.zeros(4, dtype=torch.float64)
    large, small = torch.tensor([3.0, 3.0, 3.0, 3.0]).double(), torch.tensor([1.0, 1.0, 1.0, -1.0]).double()
    merged = apply("sce", zero, [large, small])
    assert_same(merged, [2.8, 2.8, 2.8, 3.0])  # (9 * 3 + 1 * 1) / 10; the last entry of `small` is in the minority
    assert apply("sce", zero, [large, small], select_topk=0.25).tolist() == [0.0, 0.0, 0.0, 3.0]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), min_size=4, max_size=32),
    density=st.floats(0.01, 1.0),
    weights=st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.75])] * 3),
    name=st.sampled_from(["ties", "breadcrumbs", "breadcrumbs_ties"]),
)
def test_trimmed_sums_equal_the_reference_with_many_equal_magnitudes(values, density, weights, name):
    size = len(values) // 4
    base, *sources = (torch.tensor(values[i * size : (i + 1) * size], dtype=torch.float64) for i in range(4))
    expected = reference.OPERATORS[name](base.numpy(), [s.numpy() for s in sources], weights, density=density)
    assert_same(apply(name, base, sources, weights, density=density), expected)


def test_ties_with_thresholds_keeps_what_reaches_them():
    zero = torch.zeros(4)
    left, right = torch.tensor([4.0, -3.0, 2.0, 1.0]), torch.tensor([0.5, 0.25, -5.0, 0.5])
    merged = apply("ties", zero, [left, right], thresholds=(3.0, 0.5))
    assert merged.tolist() == [2.25, -3.0, -5.0, 0.5]
    # The threshold of a density that keeps no two equal magnitudes gives the same as the density.
    base, *sources = tensors((64, 33))
    thresholds = [
        float((s - base).abs().reshape(-1).sort(descending=True).values[int(0.2 * 2112) - 1]) for s in sources
    ]
    assert_same(apply("ties", base, sources, thresholds=thresholds), apply("ties", base, sources, density=0.2))
    with pytest.raises(OperatorError, match="1 thresholds for 2"):
        apply("ties", base, sources, thresholds=(0.1,))
    equal = torch.tensor([[1.0, -1.0, 0.5], [1.0, 2.0, -1.0]])
    merged = apply("ties", torch.zeros(2, 3), [equal, 0 * equal], thresholds=(1.0, 1.0), budgets=(2, 0))
    assert merged.tolist() == [[1.0, -1.0, 0.0], [0.0, 2.0, 0.0]]
    with pytest.raises(OperatorError, match="3 budgets for 2"):
        apply("ties", base, sources, thresholds=(0.1, 0.1), budgets=(1, 1, 1))
    with pytest.raises(OperatorError, match="'trim_scope': 'model' is not one of tensor, global"):
        apply("ties", base, sources, trim_scope="model")


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_refuses_probabilities_outside_zero_and_one(name):
    base, *sources = tensors((7,))
    for density in (0.1, 0.9, 0.15, [0.5, 0.9]):
        with pytest.raises(OperatorError, match=r"outside \(0, 1\)"):
            apply(name, base, sources, density=density)
    assert math.isfinite(float(apply(name, base, sources, density=0.9, epsilon=0.05).sum()))


def test_nearswap_takes_what_is_near_and_moves_the_rest_by_t():
    base, x = torch.zeros(4, dtype=torch.float64), torch.tensor([0.05, -0.2, 3.0, 0.0], dtype=torch.float64)
    assert_same(apply("nearswap", base, [x], t=0.1), [0.05, -0.1, 0.1, 0.0])
    assert torch.equal(apply("nearswap", base, [x], t=0.0), base)
    assert_same(apply("nearswap", base, [x], t=10.0), x)


def test_arcee_fusion_takes_whole_entries_and_the_outliers_of_importance_first():
    base, x, _ = tensors((64, 33))
    merged = apply("arcee_fusion", base, [x])
    taken = merged != base
    assert_same(merged, torch.where(taken, x, base))
    assert 0 < int(taken.sum()) < 0.5 * taken.numel()  # those above median + 1.5 interquartile distances
    row = torch.argmax((x - base).abs().sum(1))
    assert taken[row].any() and not taken[row].all()
    one = torch.zeros(64, 33, dtype=torch.float64)
    one[5, 7] = 2.0
    assert torch.equal(apply("arcee_fusion", base, [base + one]), base + one)  # all that there is
    empty = torch.zeros(0, 3)
    assert apply("arcee_fusion", empty, [empty]).shape == (0, 3)


def test_ram_averages_what_is_shared_and_keeps_what_is_one_source_s():
    base = torch.zeros(4, dtype=torch.float64)
    left, right = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, 4.0, 0.0, 1e-6], [6.0, 0.0, 0.0, 0.0]))
    assert_same(apply("ram", base, [left, right]), [4.0, 4.0, 0.0, 0.0])
    # left: one shared entry by one of its own, rho 1; right has none of its own
    assert_same(apply("ramplus_tl", base, [left, right], r=0.5, alpha=10.0), [4.0, 6.0, 0.0, 0.0])
    assert_same(apply("ramplus_tl", base, [left, right], r=0.5), [4.0, 4.0 * 1.1, 0.0, 0.0])
    for name in ("ram", "ramplus_tl"):
        assert_same(apply(name, base, [left], epsilon=0.0), left)
        assert_same(apply(name, base, [left, left, left], epsilon=0.0), left)


def test_sce_of_one_source_is_it_or_with_a_selection_the_base():
    base, x, _ = tensors((7,))
    assert_same(apply("sce", base, [x]), x)
    assert torch.equal(apply("sce", base, [x], select_topk=0.5), base)  # one source varies nowhere


def test_ties_rescaled_keeps_the_l1_norm_of_every_task_vector():
    base, x, _ = tensors((64, 33))
    for density in (0.1, 0.5, 1.0):
        merged = apply("ties", base, [x], density=density, rescale=True)
        assert math.isclose((merged - base).abs().sum(), (x - base).abs().sum(), rel_tol=1e-9)
    assert torch.equal(apply("ties", base, [base], rescale=True), base)  # nothing to restore
