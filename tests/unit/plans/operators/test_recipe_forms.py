"""What the canonical form of a recipe takes for granted of the operators."""

from __future__ import annotations

import pytest
import torch

from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, Arm, make_arm
from simmerge_ray.plans.recipe import Recipe, by_ratio
from tests.operators import apply, tensors

ARMS = [
    make_arm(name, {"normalize": normalize} if normalize is not None else {})
    for name, spec in OPERATOR_SPECS.items()
    if spec.max_sources != 1
    for normalize in ((True, False) if "normalize" in spec.parameters else (None,))
]


def merged(arm: Arm, sources: list[torch.Tensor], weights: tuple[float, ...], base: torch.Tensor) -> torch.Tensor:
    return apply(arm.operator, base, sources, list(weights), **dict(arm.params))


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.label)
def test_weights_count_by_their_ratio_alone_exactly_where_it_is_said(arm):
    base, *sources = tensors((7, 9))
    one, other = (merged(arm, sources, weights, base) for weights in ((0.7, 0.4), (1.4, 0.8)))
    is_same = torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert is_same == (by_ratio(arm) or not arm.spec.uses_weights)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.label)
def test_a_member_that_is_left_out_changed_nothing(arm):
    names = ("a", "b", "c")[: arm.spec.max_sources or 3]
    weights = (0.7, 0.4, 0.0)[-len(names) :]  # the last one: masks of random operators belong to places here
    base, *sources = tensors((7, 9), count=len(names))
    part = Recipe(arm, names, weights).without_zeros()
    assert (len(part.members) < len(names)) == (arm.spec.uses_weights and arm.spec.max_sources is None)
    kept = [sources[names.index(name)] for name in part.members]
    torch.testing.assert_close(merged(arm, kept, part.weights, base), merged(arm, sources, weights, base))
