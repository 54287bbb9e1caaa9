"""Recipes: what they refuse, their JSON and their ids."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.errors import PlanError
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm, parse_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep, pair_plan, plan_from_json, step_weights
from simmerge_ray.plans.recipe import GroupWeights, Recipe, plain_average, recipe_from_json, recipe_of

NUMBERS = st.floats(0.0, 1.5, allow_subnormal=False)
GROUPS = st.builds(
    GroupWeights,
    st.lists(
        st.tuples(st.sampled_from(["layers.0.", "layers.1.", "mlp", "embed"]), NUMBERS), min_size=1, max_size=3
    ).map(tuple),
    NUMBERS,
)
WEIGHTS = st.one_of(NUMBERS, st.lists(NUMBERS, min_size=2, max_size=4).map(tuple), GROUPS)
ARMS = st.sampled_from(
    [make_arm("linear"), make_arm("task_arithmetic"), make_arm("task_arithmetic", {"scale": 0.5}),
     make_arm("ties", {"density": 0.2}), make_arm("scale_matched_linear"), make_arm("dare_ties", {"density": 0.5})]
)  # fmt: skip
RECIPES = st.builds(
    lambda arm, weights, seed: Recipe(arm, tuple(f"m{n}" for n in range(len(weights))), tuple(weights), seed),
    ARMS, st.lists(WEIGHTS, min_size=1, max_size=4), st.integers(0, 5),
)  # fmt: skip


@given(RECIPES)
def test_json_and_canonical_form_are_the_same_recipe(one):
    assert recipe_from_json(json.loads(json.dumps(one.to_json()))) == one
    plan = MergePlan(recipe=one)
    assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.members == one.members and plan.needs_base == one.arm.spec.needs_base


@given(RECIPES, st.randoms(use_true_random=False))
def test_the_order_of_members_changes_no_id(one, random):
    order = list(range(len(one.members)))
    random.shuffle(order)
    shuffled = Recipe(one.arm, tuple(one.members[n] for n in order), tuple(one.weights[n] for n in order), one.seed)
    assert MergePlan(recipe=shuffled).id == MergePlan(recipe=one).id or one.arm.spec.random


def test_one_merge_has_one_id():
    def of(operator, weights, **params):
        return MergePlan(recipe=recipe_of(make_arm(operator, params), dict(zip("ab", weights, strict=True))))

    assert of("linear", (1, 1)).id == of("linear", (0.5, 0.5)).id == MergePlan(recipe=plain_average(["a", "b"])).id
    assert of("task_arithmetic", (1, 0.5), scale=0.5).id == of("task_arithmetic", (0.5, 0.25)).id
    assert of("linear", (1, 1), normalize=False).id != of("linear", (0.5, 0.5), normalize=False).id
    assert of("task_arithmetic", (0.5, 0.25)).id != of("task_arithmetic", (0.25, 0.5)).id
    assert of("ties", (0.2, 0.6)).id == of("ties", (0.4, 1.2)).id != of("ties", (0.4, 1.2), normalize=False).id
    assert of("nuslerp", (0.3, 0.9)).id == of("nuslerp", (0.1, 0.3)).id != of("nuslerp", (0.9, 0.3)).id
    assert of("model_stock", (1, 2)).id == of("model_stock", (1, 1)).id


@given(RECIPES)
def test_the_canonical_form_is_its_own(one):
    canonical = one.canonical()
    assert canonical.canonical() == canonical
    assert MergePlan(recipe=canonical).id == MergePlan(recipe=one).id


@pytest.mark.parametrize("operator", ["linear", "ties", "dare_linear", "multislerp", "karcher"])
def test_members_without_weight_are_left_out_where_that_is_the_same_merge(operator):
    whole, part = (
        recipe_of(make_arm(operator), weights) for weights in ({"z": 0.0, "a": 0.7, "b": 0.4}, {"a": 0.7, "b": 0.4})
    )
    assert whole.without_zeros() == part and MergePlan(recipe=whole).id == MergePlan(recipe=part).id
    nothing = recipe_of(make_arm(operator), {"a": 0.0, "b": 0.0})
    assert nothing.without_zeros() == nothing
    for needed in ("sce", "model_stock"):  # they find weights of their own
        kept = recipe_of(make_arm(needed), {"a": 0.0, "b": 1.0, "c": 1.0})
        assert kept.without_zeros() == kept


PAIR_ARMS = ["linear", "slerp", "nuslerp", "task_arithmetic", "task_arithmetic(scale=1.2)", "ties(density=0.2)",
             "dare_linear", "model_stock", "sce", "scale_matched_linear", "linear(normalize=false)"]  # fmt: skip


@pytest.mark.parametrize("text", PAIR_ARMS)
def test_the_recipe_of_an_arm_s_step_is_that_arm_s_plan(text):
    """Labels of pairs x arms and of recipes are the same labels where the merges are the same."""
    arm = parse_arm(text)
    plan = pair_plan("a", "b", arm)
    recipe = MergePlan(recipe=recipe_of(arm, dict(zip("ab", step_weights(arm.operator, 0.5), strict=True))))
    assert recipe.pair_arm == arm and recipe.id == plan.id and plan.pair_arm == arm
    others = [
        recipe_of(arm, {"a": 0.3, "b": 0.9}),
        recipe_of(arm, dict.fromkeys("abc", 1.0)) if arm.spec.max_sources is None else recipe.recipe,
        recipe_of(arm, {"a": (0.2, 1.0), "b": 1.0}),
        Recipe(arm, ("a", "b"), recipe.recipe.weights, seed=1),
    ]
    others = [MergePlan(recipe=one) for one in others if arm.spec.uses_weights and one != recipe.recipe]
    assert all(one.pair_arm is None and one.id != plan.id for one in others)


@pytest.mark.parametrize("operator", [name for name, spec in OPERATOR_SPECS.items() if spec.max_sources != 1])
def test_other_weights_of_a_step_are_no_arm(operator):
    assert MergePlan((MergeStep("a", "b", make_arm(operator), 0.3),)).pair_arm is None
    assert MergePlan(source="a").pair_arm is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe_of(make_arm("linear"), {}), "takes at least 1"),
        (lambda: Recipe(make_arm("linear"), ("a", "a"), (1, 1)), "'a' is given twice"),
        (lambda: Recipe(make_arm("linear"), ("a", "b"), (1,)), "2 members need 2 weights, got 1"),
        (lambda: recipe_of(make_arm("slerp"), {"a": 1, "b": 1, "c": 1}), "at most 2 members, got 3"),
        (lambda: recipe_of(make_arm("linear"), {"a": float("nan")}), "weight of 'a': nan is not a finite number"),
        (lambda: recipe_of(make_arm("linear"), {"a": (1.0,)}), "a list needs 2 to"),
        (lambda: recipe_of(make_arm("linear"), {"a": GroupWeights((("", 1.0),))}), "group '' has 1.0"),
        (lambda: MergePlan(source="a", recipe=plain_average(["a", "b"])), "either steps, or a recipe, or one source"),
        (lambda: recipe_from_json({"operator": "linear", "members": "a"}), "a list under 'members'"),
        (lambda: recipe_from_json({"operator": "linear", "members": [{"checkpont": "a"}]}), "did you mean"),
        (lambda: recipe_from_json({"members": []}), "an operator's name under 'operator'"),
    ],
)
def test_a_wrong_recipe_is_one_error(make, message):
    with pytest.raises(PlanError, match=message.replace("(", r"\(")):
        make()


def test_weights_of_a_tensor():
    one = recipe_of(
        make_arm("task_arithmetic"),
        {"a": GroupWeights((("layers.1.", 0.25), ("mlp", 0.5)), 1.0), "b": (0.0, 1.0), "c": 0.3},
    )
    assert one.weights_at("model.layers.1.mlp.up", 0.5) == (0.25, 0.5, 0.3)
    assert one.weights_at("model.layers.0.mlp.up", 0.0) == (0.5, 0.0, 0.3)
    assert one.weights_at("model.embed_tokens.weight", 0.0) == (1.0, 0.0, 0.3)
    assert one.label == "task_arithmetic: <2 groups> a + [0, 1] b + 0.3 c"
    tuned = GroupWeights((("layers.1.", 0.25), ("mlp", 0.5)), 1.0)
    both = recipe_of(make_arm("task_arithmetic"), {"a": tuned, "b": tuned})
    assert both.label == "task_arithmetic in 2 groups: a + b"
