"""Coefficients of plans: against real merges of whole tensors, projected on the members' task vectors in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import PlanError
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.model import load_model
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm, parse_arm
from simmerge_ray.plans.operators.table import OPERATORS
from simmerge_ray.plans.plan import MergePlan, MergeStep, fold_plan, pair_plan, resolve_plan
from simmerge_ray.plans.recipe import GroupWeights, plain_average, recipe_of
from simmerge_ray.signals.candidates import coefficients
from simmerge_ray.signals.candidates.coefficients import PlanCoefficients
from simmerge_ray.signals.compute import Signatures, local_executor
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from tests import reference, tiny

NUMBERS = st.floats(0.05, 1.5).map(lambda value: round(value, 3))
THREE = st.tuples(NUMBERS, NUMBERS, NUMBERS)
IDS = ("m0", "m1", "m2", "copy", "origin")


@pytest.fixture(scope="module")
def extended(catalogue):
    """Beside three checkpoints the first once more, and the base as a member."""
    assert catalogue.base is not None
    more = (CheckpointRef("copy", catalogue.checkpoints[0].path), CheckpointRef("origin", catalogue.base.path))
    return Catalogue((*catalogue.checkpoints, *more), {}, catalogue.base)


def samples(catalogue, path, num_coordinates):
    spec = SignatureSpec(num_coordinates=num_coordinates)
    found = Signatures(catalogue, catalogue.digests(), spec, SignatureStore(path), local_executor(catalogue))
    found.complete({})
    return {ref.id: found.weights(ref.id) for ref in catalogue.all_refs}


@pytest.fixture(scope="module")
def whole(extended, tmp_path_factory):
    """Coefficients from every element of every tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coefficients, "_COORDINATES", 1_000_000)
        weights = samples(extended, tmp_path_factory.mktemp("whole"), 1_000_000)
        return PlanCoefficients(extended.ids, "base", weights)


@pytest.fixture(scope="module")
def sampled(extended, tmp_path_factory):
    return PlanCoefficients(extended.ids, "base", samples(extended, tmp_path_factory.mktemp("sampled"), 3_000))


@pytest.fixture(scope="module")
def models(extended):
    return {
        ref.id: {name: one.detach().double().numpy() for name, one in load_model(ref).named_parameters()}
        for ref in extended.all_refs
    }


def projected(catalogue, models, plan):
    """The slow truth: the real merge, projected."""
    merged = {name: one.double().numpy() for name, one in merged_tensors(resolve_plan(plan, catalogue))}
    names = plan.members
    vectors = [{name: models[one][name] - models["base"][name] for name in merged} for one in names]
    change = {name: merged[name] - models["base"][name] for name in merged}
    found = reference.plan_coefficients(models["base"], vectors, change)
    return np.array([dict(zip(names, found, strict=True)).get(one, 0.0) for one in IDS])


@given(weights=THREE, arm=st.sampled_from(["linear", "task_arithmetic(scale=0.7)", "task_arithmetic(normalize=true)"]))
@settings(max_examples=10)
def test_averages_and_sums_are_exact(extended, models, whole, weights, arm):
    plan = MergePlan(recipe=recipe_of(parse_arm(arm), dict(zip(IDS, weights, strict=False))))
    np.testing.assert_allclose(whole.of(plan), projected(extended, models, plan), atol=2e-6)


@given(weights=THREE)
def test_a_sum_of_task_vectors_has_its_weights_and_an_average_its_shares(whole, weights):
    by_member = dict(zip(IDS, weights, strict=False))
    scaled = whole.of(MergePlan(recipe=recipe_of(make_arm("task_arithmetic", {"scale": 0.5}), by_member)))
    np.testing.assert_allclose(scaled, [*(0.5 * np.array(weights)), 0, 0], rtol=1e-12)
    average = whole.of(MergePlan(recipe=recipe_of(make_arm("linear"), by_member)))
    np.testing.assert_allclose(average, [*(np.array(weights) / sum(weights)), 0, 0], rtol=1e-12)


def test_checkpoints_as_they_are(whole):
    assert whole.of(MergePlan(source="base")).tolist() == [0.0] * 5
    assert whole.of(MergePlan(source="m1")).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]


WITHOUT_CHANCE = [
    ("ties", {"density": 0.3, "scale": 1.2}),
    ("scale_matched_linear", {}),
    ("slerp", {}),
    ("nuslerp", {}),
    ("breadcrumbs", {"density": 0.6, "scale": 0.8}),
    ("breadcrumbs_ties", {"density": 0.6}),
    ("model_stock", {}),
    ("sce", {"select_topk": 0.5}),
    ("multislerp", {}),
    ("karcher", {}),
]


@pytest.mark.parametrize(("operator", "params"), WITHOUT_CHANCE, ids=[name for name, _ in WITHOUT_CHANCE])
def test_operators_on_whole_tensors_are_the_projected_merge(extended, models, whole, sampled, operator, params):
    spec = OPERATOR_SPECS[operator]
    count = 2 if spec.max_sources == 2 else 3
    weights = dict(zip(IDS[:count], (0.9, 0.5, 0.7), strict=False))
    plan = MergePlan(recipe=recipe_of(make_arm(operator, params), weights))
    expected = projected(extended, models, plan)
    np.testing.assert_allclose(whole.of(plan), expected, rtol=1e-4, atol=1e-4)
    # A third of the larger tensors' elements: what a projection of them is off by.
    np.testing.assert_allclose(sampled.of(plan), expected, atol=0.03)


@pytest.mark.parametrize("operator", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_operators_are_the_projected_merge_up_to_their_draws(extended, models, whole, operator):
    """Masks of other seeds over 45,000 elements; a share of what is kept at a density of 0.5."""
    weights = dict(zip(IDS[:3], (0.9, 0.5, 0.7), strict=False))
    plan = MergePlan(recipe=recipe_of(make_arm(operator, {"scale": 0.8}), weights, seed=3))
    found = whole.of(plan)
    np.testing.assert_allclose(found, projected(extended, models, plan), atol=0.04)
    assert found.tolist() == whole.of(plan).tolist()


@pytest.mark.parametrize("operator", coefficients._SCALED)
def test_what_is_kept_at_scale_1_scales(operator):
    """The cache holds projections at scale 1: the change of the real operator is linear in `scale`."""
    generator = torch.Generator().manual_seed(1)
    base, *tensors = torch.randn((4, 12, 50), generator=generator, dtype=torch.float64)
    seeds = {"seeds": [1, 2, 3]} if OPERATOR_SPECS[operator].random else {}
    one = OPERATORS[operator](base, tensors, [0.9, 0.5, 0.7], scale=1.0, **seeds) - base
    assert one.abs().sum() > 0
    for scale in (0.0, 0.4, 1.6):
        change = OPERATORS[operator](base, tensors, [0.9, 0.5, 0.7], scale=scale, **seeds) - base
        torch.testing.assert_close(change, scale * one, rtol=1e-9, atol=1e-12)


def test_every_operator_with_a_scale_of_task_vectors_is_known_to_scale():
    with_scale = {name for name, spec in OPERATOR_SPECS.items() if "scale" in spec.parameters and spec.needs_base}
    assert with_scale == {*coefficients._SCALED, "task_arithmetic"}


def test_groups_and_gradients_are_averaged_by_energy(extended, models, whole):
    weights = {"m0": GroupWeights((("layers.1.", 0.2), ("mlp.", 1.3)), 0.6), "m1": (0.3, 1.1), "m2": 0.5}
    for operator in ("task_arithmetic", "ties"):
        plan = MergePlan(recipe=recipe_of(make_arm(operator), weights))
        found = whole.of(plan)
        np.testing.assert_allclose(found, projected(extended, models, plan), rtol=1e-4, atol=1e-4)
    constant = {"m0": GroupWeights((("layers.", 0.6),), 0.6), "m1": (0.3, 0.3), "m2": 0.5}
    found = whole.of(MergePlan(recipe=recipe_of(make_arm("task_arithmetic"), constant)))
    np.testing.assert_allclose(found, [0.6, 0.3, 0.5, 0, 0], rtol=1e-12)


@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties", "scale_matched_linear", "slerp"])
def test_the_base_as_a_member_adds_nothing(whole, operator):
    """Under its own id and as a checkpoint of the catalogue alike."""
    found = []
    for name in ("base", "origin"):
        plan = MergePlan(recipe=recipe_of(make_arm(operator), {"m0": 0.6, name: 0.4}))
        found.append(whole.of(plan))
        assert found[-1][1:4].tolist() == [0.0] * 3 and np.isfinite(found[-1]).all()
    np.testing.assert_allclose(found[0][:4], found[1][:4], rtol=1e-9)  # what multiplies `origin` is 0
    if operator in ("linear", "task_arithmetic"):
        assert found[0][0] == pytest.approx(0.6)


@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties", "scale_matched_linear", "sce"])
def test_equal_members_share_what_one_would_have(whole, operator):
    """Only the sum over them says what the merge is."""
    plan = MergePlan(recipe=recipe_of(make_arm(operator), {"m0": 0.5, "copy": 0.5}))
    found = whole.of(plan)
    assert np.isfinite(found).all() and found[[1, 2, 4]].tolist() == [0.0] * 3
    assert found[0] == pytest.approx(found[3], rel=1e-6)
    if operator in ("linear", "task_arithmetic", "scale_matched_linear"):
        assert found.sum() == pytest.approx(1.0)


def test_two_way_steps_are_their_recipes(extended, models, whole):
    for step in (
        MergeStep("m0", "m1", make_arm("linear"), 0.3),
        MergeStep("m0", "m1", make_arm("task_arithmetic"), 0.3),
        MergeStep("m0", "m1", make_arm("ties", {"density": 0.4}), (0.1, 0.9)),
        MergeStep("m0", "m1", make_arm("slerp"), 0.3),
    ):
        plan = MergePlan((step,))
        np.testing.assert_allclose(whole.of(plan), projected(extended, models, plan), rtol=1e-4, atol=1e-4)


def test_the_order_of_members_does_not_matter_and_a_call_twice_gives_the_same_bits(whole):
    arm = make_arm("ties", {"density": 0.2})
    one = whole.of(MergePlan(recipe=recipe_of(arm, {"m0": 0.6, "m2": 1.0})))
    other = whole.of(MergePlan(recipe=recipe_of(arm, {"m2": 1.0, "m0": 0.6})))
    np.testing.assert_allclose(one, other, rtol=1e-12)
    assert one.tolist() == whole.of(MergePlan(recipe=recipe_of(arm, {"m0": 0.6, "m2": 1.0}))).tolist()


def test_what_has_no_coefficients_is_refused(whole):
    with pytest.raises(PlanError, match="'m9' has no signature"):
        whole.of(pair_plan("m0", "m9", make_arm("linear")))
    with pytest.raises(PlanError, match="'m9' has no signature"):
        whole.of(MergePlan(source="m9"))
    with pytest.raises(PlanError, match="has 2 steps"):
        whole.of(fold_plan(["m0", "m1", "m2"], [make_arm("linear")]))
    assert whole.of(MergePlan(recipe=plain_average(["m0", "m1"]))).tolist() == [0.5, 0.5, 0, 0, 0]


def test_a_tensor_that_is_zero_in_the_base_does_not_drown_the_others(tmp_path):
    """Biases start at 0: what a member adds to one has no size beside it."""
    refs = []
    for number, (name, moved) in enumerate((("base", 0.0), ("a", 0.05), ("b", 0.05))):
        model = tiny.make_model(tied=False, num_layers=1, hidden_size=32)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * moved)
            model.model.norm.weight.fill_(0.0 if name == "base" else 0.01)
        refs.append(CheckpointRef(name, tiny.save(model, tmp_path / name)))
    catalogue = Catalogue(tuple(refs[1:]), {}, refs[0])
    found = PlanCoefficients(("a", "b"), "base", samples(catalogue, tmp_path / "signatures", 10_000))
    weights = {"a": GroupWeights((("model.norm.", 0.0),), 0.8), "b": GroupWeights((("model.norm.", 0.0),), 0.4)}
    of_plan = found.of(MergePlan(recipe=recipe_of(make_arm("task_arithmetic"), weights)))
    np.testing.assert_allclose(of_plan, [0.8, 0.4], atol=0.02)
