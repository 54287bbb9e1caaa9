"""Recipes in the merge engine: their tensors are the operator's, and mergekit's YAML of a recipe is the same merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import PlanError
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.model import load_model
from simmerge_ray.plans.operators.gradients import tensor_positions
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.operators.table import OPERATORS
from simmerge_ray.plans.plan import MergePlan, read_plan, resolve_plan, write_plan
from simmerge_ray.plans.recipe import GroupWeights, plain_average, recipe_of
from tests.unit.merging.mergekit_files import compiled

NUMBERS = st.floats(0.1, 1.5).map(lambda value: round(value, 3))
WEIGHTS = st.one_of(
    NUMBERS,
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    st.builds(
        GroupWeights,
        st.tuples(st.tuples(st.just("layers.1."), NUMBERS), st.tuples(st.just("mlp."), NUMBERS)),
        NUMBERS,
    ),
)
ARMS = st.sampled_from(
    [
        make_arm("linear"),
        make_arm("linear", {"normalize": False}),
        make_arm("task_arithmetic", {"scale": 0.7}),
        make_arm("ties", {"density": 0.3, "scale": 1.2}),
        make_arm("della_linear", {"density": 0.5}),
    ]
)


def resolved(catalogue, arm, weights):
    plan = MergePlan(recipe=recipe_of(arm, dict(zip(catalogue.ids, weights, strict=False)), seed=3))
    return resolve_plan(plan, catalogue)


@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties", "scale_matched_linear", "multislerp"])
def test_a_recipe_is_its_operator_on_every_tensor(catalogue, operator):
    weights = (0.9, GroupWeights((("layers.1.", 0.2),), 0.6), (0.3, 1.1))
    one = resolved(catalogue, make_arm(operator), weights)
    models = {ref.id: dict(load_model(ref).named_parameters()) for ref in catalogue.all_refs}
    merged = dict(merged_tensors(one))
    positions = tensor_positions(merged)
    for name, tensor in merged.items():
        parts = [models[member][name].detach() for member in catalogue.ids]
        at = one.plan.recipe.weights_at(name, positions[name])
        base = models["base"][name].detach() if one.plan.uses_base else None
        expected = OPERATORS[operator](base, parts, at)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@given(arm=ARMS, weights=st.lists(WEIGHTS, min_size=2, max_size=3))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mergekit_s_yaml_of_a_recipe_compiles_to_the_same_graph(catalogue, tmp_path, arm, weights):
    graph = compile_plan(resolved(catalogue, arm, weights))
    assert graph.mergekit is not None
    again = compiled(tmp_path, graph.mergekit)
    paths = {key: ref.path.resolve() for key, ref in again.checkpoints.items()}
    ours = {key: ref.path.resolve() for key, ref in graph.checkpoints.items()}
    for one, other in zip(graph.outputs, again.outputs, strict=True):
        assert one.name == other.name
        assert one.node.operator == other.node.operator
        np.testing.assert_array_equal(one.node.weights, other.node.weights)
        assert [ours[source.checkpoint] for source in one.node.sources] == [
            paths[source.checkpoint] for source in other.node.sources
        ]
        assert dict(one.node.params) == {
            key: value[0] if isinstance(value, tuple) else value for key, value in other.node.params
        }


def test_a_recipe_s_file_is_read_as_any_plan_s(catalogue, tmp_path):
    one = resolved(catalogue, make_arm("task_arithmetic"), (0.8, (0.1, 0.9)))
    write_plan(tmp_path / "plan.json", one)
    again, _ = read_plan(tmp_path / "plan.json")
    assert again.plan == one.plan and again.plan.id == one.plan.id


def test_what_mergekit_cannot_say_is_said(catalogue):
    one = resolve_plan(MergePlan(recipe=plain_average(["m0", "m1"])), catalogue)
    assert compile_plan(one).mergekit is not None
    ours = resolved(catalogue, make_arm("scale_matched_linear"), (1, 1))
    assert compile_plan(ours).mergekit is None
    with pytest.raises(PlanError, match="unknown checkpoint 'm9'"):
        resolve_plan(MergePlan(recipe=plain_average(["m0", "m9"])), catalogue)
