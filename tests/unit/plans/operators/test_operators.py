"""The contract of every row of OPERATORS: reference, laws, dtypes, errors."""

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
from tests.operators import two_way

SHAPES = [(1,), (7,), (64, 33)]
DARE = [{}, {"density": 0.2, "rescale": False}, {"density": 1.0, "scale": 0.7, "normalize": True}]
DELLA = [{}, {"density": 0.3, "epsilon": 0.1, "rescale": False}, {"epsilon": 0.0, "scale": 0.7, "normalize": False}]
BREADCRUMBS = [
    {},
    {"gamma": 0.0},
    {"density": 0.9, "gamma": 0.3, "scale": 0.7},
    {"density": 0.2, "rescale": True, "normalize": True},
]
PARAMS: dict[str, list[dict[str, object]]] = {
    "linear": [{}, {"normalize": False}],
    "slerp": [{}, {"threshold": 0.5}],
    "nuslerp": [{}, {"flatten": False}, {"flatten": False, "row_wise": True}],
    "task_arithmetic": [{}, {"scale": 0.3}, {"scale": 0.0}, {"normalize": True}],
    "ties": [{}, {"density": 0.2}, {"density": 1.0}, {"density": 0.01, "scale": 0.7}, {"normalize": False}],
    "dare_linear": DARE,
    "dare_ties": DARE,
    "della": DELLA,
    "della_linear": DELLA,
    "breadcrumbs": BREADCRUMBS,
    "breadcrumbs_ties": BREADCRUMBS,
    "model_stock": [{}, {"filter_wise": True}],
    "karcher": [{}, {"max_iter": 1}, {"tol": 0.3}],
    "sce": [{}, {"select_topk": 0.3}],
    "multislerp": [{}, {"eps": 1e-3}, {"normalize": False}],
    "scale_matched_linear": [{}],
    "passthrough": [{}, {"scale": 0.5}],
}
CASES = [(name, params) for name in OPERATORS for params in PARAMS[name]]
TWO_WAY = [(name, params) for name, params in CASES if name != "passthrough"]
ON_ARCS = ("linear", "slerp", "nuslerp", "karcher", "multislerp")


def source_counts(name: str) -> list[int]:
    spec = OPERATOR_SPECS[name]
    return [n for n in (1, 2, 3) if spec.min_sources <= n <= (spec.max_sources or 3)]


COUNTED = [(name, params, count) for name, params in CASES for count in source_counts(name)]


def tensors(shape: tuple[int, ...], seed: int = 0, count: int = 2) -> list[torch.Tensor]:
    """A base and fine-tunes near it, float64."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [base, *(base + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count))]


def seeded(name: str, count: int, first: int = 11) -> dict[str, list[int]]:
    return {"seeds": list(range(first, first + count))} if OPERATOR_SPECS[name].random else {}


def apply(name, base, sources, weights=None, seed=11, **params) -> torch.Tensor:
    weights = [1.0] * len(sources) if weights is None else weights
    return OPERATORS[name](base, sources, weights, **seeded(name, len(sources), seed), **params)


def assert_same(result: torch.Tensor, expected: torch.Tensor | np.ndarray) -> None:
    # float64 rounding of a few sums over at most 2112 entries
    np.testing.assert_allclose(result.numpy(), np.asarray(expected), rtol=1e-11, atol=1e-11)


def test_every_operator_has_a_spec_a_function_and_a_reference():
    assert list(OPERATORS) == list(OPERATOR_SPECS) == list(PARAMS) == list(reference.OPERATORS)
    assert all(OPERATORS[name].__name__ == name == spec.name for name, spec in OPERATOR_SPECS.items())


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 0.7, 1.6), (0.5, 0.0, 0.25)])
@pytest.mark.parametrize(("name", "params", "count"), COUNTED)
def test_equals_the_slow_reference(name, params, count, weights):
    for shape in [(1,), (7,), (16, 33)]:  # the reference loops over entries
        base, *sources = tensors(shape, count=count)
        extra = params | seeded(name, count)
        result = OPERATORS[name](base, sources, weights[:count], **extra)
        expected = reference.OPERATORS[name](base.numpy(), [s.numpy() for s in sources], weights[:count], **extra)
        assert_same(result, expected)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_without_a_base_the_tensors_themselves_are_interpolated(name):
    assert OPERATOR_SPECS[name].uses_base and not OPERATOR_SPECS[name].needs_base
    sources = tensors((64, 33))[1:]
    expected = reference.OPERATORS[name](None, [s.numpy() for s in sources], (0.6, 1.4))
    assert_same(apply(name, None, sources, (0.6, 1.4)), expected)
    zeros = torch.zeros_like(sources[0])
    assert_same(apply(name, zeros, sources, (0.6, 1.4)), expected)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(COUNTED),
    shape=st.sampled_from([(1,), (2,), (5,), (3, 4), (4, 1), (1, 6), (2, 3, 2), ()]),
    weights=st.tuples(*[st.sampled_from([0.25, 0.5, 1.0, 2.0])] * 3),
    seed=st.integers(0, 1000),
)
def test_equals_the_slow_reference_for_any_shape(case, shape, weights, seed):
    name, params, count = case
    base, *sources = tensors(shape, seed=seed, count=count)
    extra = params | seeded(name, count)
    result = OPERATORS[name](base, sources, weights[:count], **extra)
    assert result.shape == shape
    expected = reference.OPERATORS[name](base.numpy(), [s.numpy() for s in sources], weights[:count], **extra)
    # Small tensors may be nearly antiparallel; the arc's weights then grow, and their rounding with them.
    np.testing.assert_allclose(result.numpy(), np.asarray(expected), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "params", "count"),
    # The sum of several bases is not the base, nor is its half.
    [case for case in COUNTED if case[0] not in ("linear", "passthrough") or not case[1]],
)
def test_merging_the_base_with_itself_returns_the_base(name, params, count):
    for shape in SHAPES:
        base = tensors(shape)[0]
        assert_same(apply(name, base, [base] * count, **params), base)


@pytest.mark.parametrize(("name", "params"), TWO_WAY)
def test_swapping_parents_changes_nothing_where_stated(name, params):
    spec = OPERATOR_SPECS[name]
    assert spec.symmetric != spec.random
    for shape in SHAPES:
        base, left, right = (tensor.float() for tensor in tensors(shape))
        forward = two_way(name, base, left, right, seeds=(3, 4), **params)
        # To the bit: plans of swapped parents share an id, so they must give the same file.
        assert torch.equal(forward, two_way(name, base, right, left, seeds=(4, 3), **params))


@pytest.mark.parametrize(("name", "params"), [case for case in TWO_WAY if OPERATOR_SPECS[case[0]].uses_weights])
def test_weight_zero_leaves_only_the_left_checkpoint(name, params):
    spec = OPERATOR_SPECS[name]
    base, left, right = tensors((64, 33))
    result = two_way(name, base, left, right, weight=0.0, seeds=(3, 4), **params)
    assert_same(result, two_way(name, base, left, tensors((64, 33), seed=1)[2], weight=0.0, seeds=(3, 5), **params))
    if spec.min_sources == 1:
        seeds = {"seeds": (3,)} if spec.random else {}
        assert_same(result, OPERATORS[name](base, [left], [2.0], **seeds, **params))
    if name in ON_ARCS and params != {"normalize": False}:
        assert_same(result, left)


@pytest.mark.parametrize("name", [name for name, spec in OPERATOR_SPECS.items() if not spec.uses_weights])
def test_weights_do_nothing_where_stated(name):
    count = OPERATOR_SPECS[name].min_sources
    base, *sources = tensors((7,), count=count)
    assert torch.equal(apply(name, base, sources), apply(name, base, sources, [0.3, 0.9][:count]))


@pytest.mark.parametrize(("name", "count"), [(name, source_counts(name)[-1]) for name in OPERATORS])
def test_elementwise_operators_may_be_cut_into_chunks_and_others_may_not(name, count):
    base, *sources = tensors((40,), count=count)
    pieces = (slice(0, 13), slice(13, None))
    parts = [
        torch.cat([apply(name, base[p], [s[p] for s in sources], **params) for p in pieces]) for params in PARAMS[name]
    ]
    wholes = [apply(name, base, sources, **params) for params in PARAMS[name]]
    same = all(torch.equal(part, whole) for part, whole in zip(parts, wholes, strict=True))
    assert same == (name in ("linear", "task_arithmetic", "passthrough"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_arithmetic_is_float32_or_float64(name, dtype):
    base, *sources = (tensor.to(dtype) for tensor in tensors((64, 33), count=source_counts(name)[-1]))
    result = apply(name, base, sources)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != torch.float64:
        assert torch.equal(result, apply(name, base.float(), [s.float() for s in sources]))
        # Masks and trims of float32 inputs are those of the same values in float64: all else is rounding.
        wide = apply(name, base.double(), [s.double() for s in sources])
        torch.testing.assert_close(result.double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "params", "count"), COUNTED)
def test_inputs_are_not_written_to(name, params, count):
    inputs = tensors((7,), count=count)
    copies = [tensor.clone() for tensor in inputs]
    result = apply(name, inputs[0], inputs[1:], **params)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert all(result.data_ptr() != tensor.data_ptr() for tensor in inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_unequal_shapes_are_refused_with_both_shapes(name):
    count = source_counts(name)[-1]
    base, *sources = tensors((7,), count=count)
    short = torch.zeros(3, dtype=torch.float64)
    if count > 1:
        with pytest.raises(OperatorError, match=r"\(3,\).*\(7,\)"):
            apply(name, base, [*sources[:-1], short])
    if OPERATOR_SPECS[name].uses_base:
        with pytest.raises(OperatorError, match=r"base has shape \(3,\).*\(7,\)"):
            apply(name, short, sources)
    else:
        apply(name, short, sources)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_missing_base_is_refused_by_name_where_one_is_needed(name):
    sources = tensors((7,), count=source_counts(name)[-1])[1:]
    if OPERATOR_SPECS[name].needs_base:
        with pytest.raises(OperatorError, match=f"'{name}' works on task vectors and needs a base"):
            apply(name, None, sources)
    else:
        apply(name, None, sources)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_number_of_sources_weights_or_seeds_is_refused(name):
    spec = OPERATOR_SPECS[name]
    base, *sources = tensors((7,), count=3)
    wrong = [spec.min_sources - 1, *([spec.max_sources + 1] if spec.max_sources else [])]
    for count in wrong:
        with pytest.raises(OperatorError, match=rf"'{name}' takes .* checkpoint\(s\) beside the base, got {count}"):
            apply(name, base, sources[:count])
    count = spec.min_sources
    with pytest.raises(OperatorError, match=f"'{name}': {count + 1} weights for {count}"):
        apply(name, base, sources[:count], [1.0] * (count + 1))
    if spec.random:
        with pytest.raises(OperatorError, match=f"'{name}': 3 seeds for 1"):
            OPERATORS[name](base, sources[:1], [1.0], seeds=(1, 2, 3))


@pytest.mark.parametrize("name", ["linear", "slerp", "nuslerp", "karcher", "multislerp"])
def test_averages_refuse_weights_that_sum_to_zero(name):
    base, *sources = tensors((7,))
    with pytest.raises(OperatorError, match="sum to 0"):
        apply(name, base, sources, (0.0, 0.0))
    if name in ("linear", "multislerp"):
        with pytest.raises(OperatorError, match="sum to 0"):
            apply(name, base, [*sources, base], (0.1, 0.2, -0.3))  # 5.6e-17 in float64


@pytest.mark.parametrize("name", [name for name, spec in OPERATOR_SPECS.items() if spec.needs_base])
def test_sums_of_task_vectors_with_weights_of_zero_leave_the_base(name):
    spec = OPERATOR_SPECS[name]
    base, *sources = tensors((7,))
    params = {"normalize": True} if "normalize" in spec.parameters else {}
    if spec.uses_weights:
        assert torch.equal(apply(name, base, sources, (0.0, 0.0), **params), base)


def test_a_difference_of_task_vectors_is_not_normalised():
    base, *sources = tensors((7,))
    for normalize in (False, True):
        result = apply("task_arithmetic", base, sources, (1.0, -1.0), normalize=normalize)
        assert_same(result, base + sources[0] - sources[1])


@pytest.mark.parametrize("name", OPERATORS)
def test_parameters_per_source_act_on_their_source_only(name):
    spec = OPERATOR_SPECS[name]
    base, *sources = tensors((64, 33), count=source_counts(name)[-1])
    count = len(sources)
    for param in spec.per_source:
        low, high = {"density": (0.2, 0.6), "epsilon": (0.05, 0.15), "gamma": (0.0, 0.2), "scale": (0.5, 2)}[param]
        mixed = [low, *[high] * (count - 1)]
        extra = seeded(name, count)
        result = apply(name, base, sources, **{param: mixed})
        expected = reference.OPERATORS[name](
            base.numpy(), [s.numpy() for s in sources], [1.0] * count, **{param: mixed}, **extra
        )
        assert_same(result, expected)
        assert torch.equal(
            apply(name, base, sources, **{param: [low] * count}), apply(name, base, sources, **{param: low})
        )
        with pytest.raises(OperatorError, match=f"{count + 1} values of '{param}' for {count}"):
            apply(name, base, sources, **{param: [low] * (count + 1)})
        with pytest.raises(OperatorError, match=rf"'{name}': parameter '{param}': -1\.0 is outside"):
            apply(name, base, sources, **{param: -1.0})


def test_default_parameters_of_functions_and_specs_agree():
    for name in OPERATORS:
        base, *sources = tensors((64, 33), count=source_counts(name)[-1])
        assert torch.equal(apply(name, base, sources), apply(name, base, sources, **make_arm(name).param_dict()))


@pytest.mark.parametrize("name", [name for name, spec in OPERATOR_SPECS.items() if spec.random])
def test_random_operators_repeat_with_their_seeds_and_differ_with_others(name):
    base, *sources = tensors((64, 33))
    results = [apply(name, base, sources, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    # The mask belongs to the seed: the same source twice with one seed is the source once, not with two seeds.
    twice = [OPERATORS[name](base, [sources[0]] * 2, [0.5, 0.5], seeds=seeds) for seeds in ((5, 5), (5, 6))]
    assert_same(twice[0], OPERATORS[name](base, sources[:1], [1.0], seeds=(5,)))
    assert not torch.allclose(twice[0], twice[1])


# Laws of single operators


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
    for params in PARAMS["nuslerp"]:
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


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("name", [name for name, spec in OPERATOR_SPECS.items() if spec.needs_base])
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
