"""The contract of every row of OPERATORS: reference, laws, dtypes, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.errors import OperatorError
from simmerge_ray.operators.specs import OPERATOR_SPECS, make_arm
from simmerge_ray.operators.table import OPERATORS
from simmerge_ray.operators.ties import kept_count, trim
from tests import reference

SHAPES = [(1,), (7,), (64, 33)]
PARAMS: dict[str, list[dict[str, float]]] = {
    "linear": [{}],
    "slerp": [{}, {"threshold": 0.5}],
    "nuslerp": [{}],
    "task_arithmetic": [{}, {"scale": 0.3}, {"scale": 0.0}],
    "ties": [{}, {"density": 0.2}, {"density": 1.0}, {"density": 0.01, "scale": 0.7}],
}
CASES = [(name, params) for name in OPERATORS for params in PARAMS[name]]


def tensors(shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [base, *(base + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))]


def test_every_operator_has_a_spec_a_function_and_a_reference():
    assert set(OPERATORS) == set(OPERATOR_SPECS) == set(reference.OPERATORS) == set(PARAMS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("name", "params"), CASES)
def test_equals_the_slow_reference(name, params, weight, shape):
    base, left, right = tensors(shape)
    result = OPERATORS[name](base, left, right, weight=weight, **params)
    expected = reference.OPERATORS[name](base.numpy(), left.numpy(), right.numpy(), weight=weight, **params)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "params"), CASES)
def test_merging_the_base_with_itself_returns_the_base(name, params, shape):
    base = tensors(shape)[0]
    torch.testing.assert_close(OPERATORS[name](base, base, base, **params), base, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "params"), CASES)
def test_swapping_parents_changes_nothing_where_stated(name, params, shape):
    base, left, right = tensors(shape)
    assert OPERATOR_SPECS[name].symmetric  # all of today's operators; an asymmetric one needs another law here
    forward, backward = OPERATORS[name](base, left, right, **params), OPERATORS[name](base, right, left, **params)
    torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_weight_zero_leaves_only_the_left_checkpoint(name, params):
    base, left, right = tensors((64, 33))
    other = tensors((64, 33), seed=1)[2]
    results = [OPERATORS[name](base, left, r, weight=0.0, **params) for r in (right, other)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    if name in ("linear", "slerp", "nuslerp"):
        torch.testing.assert_close(results[0], left, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_arithmetic_is_float32_or_float64(name, dtype):
    inputs = [tensor.to(dtype) for tensor in tensors((7,))]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert OPERATORS[name](*inputs).dtype == expected


@pytest.mark.parametrize("name", OPERATORS)
def test_unequal_shapes_are_refused_with_both_shapes(name):
    base, left, _ = tensors((7,))
    with pytest.raises(OperatorError, match=r"\(3,\).*\(7,\)"):
        OPERATORS[name](base, left, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name, spec in OPERATOR_SPECS.items() if spec.needs_base])
def test_a_missing_base_is_refused_by_name(name):
    _, left, right = tensors((7,))
    with pytest.raises(OperatorError, match=name):
        OPERATORS[name](None, left, right)


def test_task_arithmetic_at_half_scale_is_linear():
    base, left, right = tensors((64, 33))
    half = OPERATORS["task_arithmetic"](base, left, right, weight=0.3, scale=0.5)
    torch.testing.assert_close(half, OPERATORS["linear"](None, left, right, weight=0.3), rtol=1e-12, atol=1e-12)


def test_slerp_is_linear_above_its_threshold_and_not_below():
    _, left, right = tensors((64, 33))
    linear = OPERATORS["linear"](None, left, right)
    assert torch.equal(OPERATORS["slerp"](None, left, right, threshold=0.5), linear)
    assert not torch.allclose(OPERATORS["slerp"](None, left, right, threshold=1.0), linear)


def test_slerp_of_equal_norms_keeps_the_norm():
    left, right = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    for weight in (0.1, 0.5, 0.9):
        assert float(OPERATORS["slerp"](None, left, right, weight=weight).norm()) == pytest.approx(3.0, rel=1e-6)


def test_opposite_tensors_have_no_arc_and_are_averaged():
    left = torch.tensor([1.0, 2.0])
    for name in ("slerp", "nuslerp"):
        assert torch.equal(OPERATORS[name](None, left, -left), torch.zeros(2))


@pytest.mark.parametrize("num_entries", [1, 7, 50, 2112, 8192])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
def test_trimming_keeps_exactly_the_stated_count(num_entries, density):
    vector = torch.randn(num_entries, generator=torch.Generator().manual_seed(num_entries))
    assert (
        int((trim(vector, density) != 0).sum())
        == max(1, int(density * num_entries))
        == kept_count(density, num_entries)
    )


def test_trimming_keeps_the_first_of_equal_magnitudes():
    vector = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5])
    assert trim(vector, 0.4).tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), min_size=3, max_size=24),
    density=st.floats(0.01, 1.0),
    weight=st.floats(0.0, 1.0),
)
def test_ties_equals_the_reference_with_many_equal_magnitudes(values, density, weight):
    third = len(values) // 3
    base, left, right = (torch.tensor(values[i * third : (i + 1) * third], dtype=torch.float64) for i in range(3))
    result = OPERATORS["ties"](base, left, right, weight=weight, density=density)
    expected = reference.ties(base.numpy(), left.numpy(), right.numpy(), weight=weight, density=density)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_default_parameters_of_functions_and_specs_agree():
    base, left, right = tensors((7,))
    for name in OPERATORS:
        explicit = OPERATORS[name](base, left, right, **make_arm(name).param_dict())
        assert torch.equal(OPERATORS[name](base, left, right), explicit)
