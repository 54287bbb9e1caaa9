"""The contract of every row of OPERATORS: reference, laws, dtypes, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm
from simmerge_ray.plans.operators.table import OPERATORS
from tests import reference
from tests.operators import apply, assert_same, seeded, tensors, two_way

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
    "ties": [
        {},
        {"density": 0.2},
        {"density": 1.0},
        {"density": 0.01, "scale": 0.7},
        {"normalize": False},
        {"density": 0.3, "rescale": True},
    ],
    "dare_linear": DARE,
    "dare_ties": DARE,
    "della": DELLA,
    "della_linear": DELLA,
    "breadcrumbs": BREADCRUMBS,
    "breadcrumbs_ties": BREADCRUMBS,
    "model_stock": [{}, {"filter_wise": True}],
    "karcher": [{}, {"max_iter": 1}, {"tol": 0.3}],
    "sce": [{}, {"select_topk": 0.3}, {"select_topk": 0.0}],
    "multislerp": [{}, {"eps": 1e-3}, {"normalize": False}],
    "arcee_fusion": [{}],
    "nearswap": [{}, {"t": 0.2}, {"t": 0.0}],
    "ram": [{}, {"epsilon": 0.3}],
    "ramplus_tl": [{}, {"epsilon": 0.3}, {"epsilon": 0.3, "r": 0.9, "alpha": 5.0}],
    "scale_matched_linear": [{}],
    "regmean": [{}, {"alpha": 0.0}],
    "passthrough": [{}, {"scale": 0.5}],
}
CASES = [(name, params) for name in OPERATORS for params in PARAMS[name]]
TWO_WAY = [(name, params) for name, params in CASES if OPERATOR_SPECS[name].max_sources != 1]
ON_ARCS = ("linear", "slerp", "nuslerp", "karcher", "multislerp")


def source_counts(name: str) -> list[int]:
    spec = OPERATOR_SPECS[name]
    return [n for n in (1, 2, 3) if spec.min_sources <= n <= (spec.max_sources or 3)]


COUNTED = [(name, params, count) for name, params in CASES for count in source_counts(name)]


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
    # regmean without Gram matrices is the average
    assert same == (name in ("linear", "task_arithmetic", "nearswap", "ram", "regmean", "passthrough"))


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


@pytest.mark.parametrize("name", ["linear", "slerp", "nuslerp", "karcher", "multislerp", "regmean"])
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
