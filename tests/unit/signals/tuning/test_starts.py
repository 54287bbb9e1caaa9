"""Where tuning starts: shares by norms bring task vectors to one norm, a recipe starts at its own weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.operators.table import OPERATORS
from simmerge_ray.plans.recipe import GroupWeights, recipe_of
from simmerge_ray.signals.tuning.groups import groups_of
from simmerge_ray.signals.tuning.starts import norm_matched_weights, recipe_start
from simmerge_ray.signals.tuning.vectors import DenseVector, LowRankVector

TENSORS = ("model.embed_tokens.weight", *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)))


def start_of(recipe, members=("a", "b"), granularity="layer"):
    groups = groups_of(TENSORS, granularity)
    names = tuple(dict.fromkeys(groups.values()))
    return recipe_start(recipe, members, groups, names), names


def test_norm_matched_shares_bring_vectors_to_one_norm_with_the_ratios_of_the_operator():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=generator, dtype=torch.float64)
    vectors = [scale * torch.randn(64, generator=generator, dtype=torch.float64) for scale in (0.1, 1.0, 3.0)]
    norms = [float(vector.norm()) for vector in vectors]
    shares = norm_matched_weights(norms)
    assert sum(shares) == pytest.approx(1.0)
    np.testing.assert_allclose(np.multiply(shares, norms), shares[0] * norms[0])
    ours = sum(share * vector for share, vector in zip(shares, vectors, strict=True))
    theirs = OPERATORS["scale_matched_linear"](base, [base + vector for vector in vectors], [1.0] * 3) - base
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) == pytest.approx(1.0)
    harmonic = len(norms) / sum(1 / norm for norm in norms)
    assert float(ours.norm() / theirs.norm()) == pytest.approx(harmonic / np.mean(norms))
    assert norm_matched_weights([0.0, 2.0]) == [0.0, 1.0] and norm_matched_weights([0.0, 0.0]) == [0.5, 0.5]


def test_the_norm_of_factors_is_that_of_their_product():
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn((7, 2), generator=generator), torch.randn((2, 5), generator=generator)
    low, dense = LowRankVector(up, down, 0.5), DenseVector(0.5 * up @ down)
    assert low.square() == pytest.approx(dense.square(), rel=1e-6)
    assert dense.square() == pytest.approx(float((dense.values.double() ** 2).sum()), rel=1e-12)


def test_a_recipe_starts_at_its_own_weights():
    start, names = start_of(recipe_of(make_arm("task_arithmetic", {"scale": 2.0}), {"b": 0.6, "a": 0.2}))
    np.testing.assert_allclose(start, [[0.4] * len(names), [1.2] * len(names)])
    start, _ = start_of(recipe_of(make_arm("linear"), {"a": 1.0, "b": 3.0}))
    np.testing.assert_allclose(start, [[0.25] * len(names), [0.75] * len(names)])
    start, _ = start_of(recipe_of(make_arm("linear"), {"b": 1.0}))
    np.testing.assert_allclose(start, [[0.0] * len(names), [1.0] * len(names)])


def test_weights_by_group_and_over_the_depth_are_met_where_they_stand():
    grouped = GroupWeights((("layers.1.", 0.9),), 0.3)
    start, names = start_of(recipe_of(make_arm("task_arithmetic"), {"a": grouped, "b": (0.0, 1.0)}))
    assert dict(zip(names, start[0], strict=True))["model.layers.1."] == 0.9
    assert [start[1][names.index(f"model.layers.{n}.")] for n in range(3)] == [0.0, 0.5, 1.0]
    whole, _ = start_of(recipe_of(make_arm("task_arithmetic"), {"a": grouped, "b": 0.0}), granularity="global")
    assert whole[0] == pytest.approx((3 * 0.3 + 0.9) / 4)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipe_of(make_arm("ties"), {"a": 1.0, "b": 1.0}), "linear or task_arithmetic, not of ties"),
        (recipe_of(make_arm("linear"), {"a": 1.0, "c": 1.0}), "names c; tuned are a, b"),
    ],
)
def test_what_is_no_start_is_one_error(recipe, message):
    with pytest.raises(ConfigError, match=message):
        start_of(recipe)
