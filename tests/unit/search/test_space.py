"""The space of plans, and what Optuna is told of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import InputError
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm, parse_arm, parse_arms
from simmerge_ray.plans.plan import MergePlan, fold_plan, pair_plan
from simmerge_ray.plans.recipe import plain_average, recipe_of
from simmerge_ray.search.space import MAX_SUBSETS, STEP, Range, SearchSpace, free_parameters, make_space

NARY = [name for name, spec in OPERATOR_SPECS.items() if spec.max_sources is None and not spec.needs_grams]
TWO_WAY = [name for name, spec in OPERATOR_SPECS.items() if spec.max_sources == 2]
PAIRS = (("a", "b"), ("a", "c"))
SUBSETS = (*PAIRS, ("a", "b", "c"))


def drawn(data: st.DataObject, names: list[str]) -> Any:
    """A `Suggest` that draws values as a sampler would, and notes the names that it was asked for."""

    def suggest(name: str, where: Range) -> Any:
        assert name not in names
        names.append(name)
        if where.choices:
            return data.draw(st.sampled_from(where.choices))
        steps = data.draw(st.integers(0, round((where.high - where.low) / STEP)))
        return where.low + steps * STEP

    return suggest


@given(st.data(), st.booleans(), st.integers(1, 3))
def test_a_plan_of_the_space_is_found_again_by_its_parameters(data, only_pairs, num_anchors):
    known = [*TWO_WAY, *NARY] if only_pairs else NARY
    operators = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    arms = tuple(make_arm(name) for name in operators)
    space = SearchSpace(PAIRS if only_pairs else SUBSETS, arms, num_anchors, base="base")
    plan = space.plan(drawn(data, []))
    if plan is None or plan.source is not None:
        assert plan is None or plan.source in ("a", "b", "c", "base")
        return
    assert set(plan.members) <= {"a", "b", "c"} and plan.arms[0].operator in operators
    found = space.parameters(plan)
    assert found is not None and all(where.nearest(value) == value for value, where in found.values())
    assert space.plan(lambda name, where: found[name][0]).id == plan.id


def made(arm: str, weights: dict[str, float], **params: float) -> MergePlan:
    return MergePlan(recipe=recipe_of(make_arm(arm, params), weights))


def chosen(arm: str, base: str | None = "base", **values: Any) -> MergePlan | None:
    """The plan of a space of one arm and one subset in which these weights (t) are suggested."""
    space = SearchSpace((tuple(values) if "t" not in values else ("a", "b"),), (parse_arm(arm),), 1, base)
    return space.plan(lambda name, where: values[name.rsplit(":", 1)[-1].split(".")[0]])


def test_weights_of_0_leave_members_out():
    assert chosen("linear", a=0.6, b=0.0, c=0.3) == made("linear", {"a": 0.6, "c": 0.3})
    assert chosen("ties(density=0.2, scale=1.1)", a=0.0, b=0.4) == made("ties", {"b": 0.4}, density=0.2, scale=1.1)
    assert chosen("model_stock", a=0.0, b=0.0).recipe.weights == (1.0, 1.0)


@pytest.mark.parametrize(
    ("arm", "values", "source"),
    [
        ("linear", {"a": 0.6, "b": 0.0}, "a"),
        ("karcher", {"a": 0.0, "b": 0.3}, "b"),
        ("scale_matched_linear", {"a": 0.0, "b": 0.3}, "b"),
        ("task_arithmetic", {"a": 0.0, "b": 1.0}, "b"),
        ("task_arithmetic", {"a": 0.0, "b": 0.9}, None),
        ("task_arithmetic(scale=2)", {"a": 0.5, "b": 0.0}, "a"),
        ("task_arithmetic", {"a": 0.0, "b": 0.0}, "base"),
        ("ties(density=0.2, scale=1.1)", {"a": 0.0, "b": 0.0}, "base"),
        ("nuslerp", {"t": 0.0}, "a"),
        ("slerp", {"t": 1.0}, "b"),
        ("linear(normalize=false)", {"a": 1.0, "b": 0.0}, None),
    ],
)
def test_what_leaves_a_checkpoint_as_it_is_is_that_checkpoint_s_plan(arm, values, source):
    assert chosen(arm, **values).source == source


def test_an_average_of_nothing_is_no_plan():
    for arm in ("linear", "linear(normalize=false)", "karcher", "multislerp"):
        assert chosen(arm, a=0.0, b=0.0) is None
    layered = SearchSpace((("a", "b"),), parse_arms(("linear",)), 2)
    assert layered.plan(lambda name, where: 0.0 if name.endswith(".1") else 0.5) is None  # nothing in the last layer
    assert layered.plan(lambda name, where: 0.0 if name == "weight:a.1" else 0.5).recipe.weights == ((0.5, 0.0), 0.5)
    assert chosen("task_arithmetic", base=None, a=0.0, b=0.0) is None


def test_on_an_arc_there_is_one_number():
    names: list[str] = []
    plan = SearchSpace(PAIRS[:1], parse_arms(("nuslerp",)), 2).plan(lambda name, where: names.append(name) or 0.25)
    assert names == ["a + b:t.0", "a + b:t.1"] and plan.recipe.weights == (0.75, 0.25)


def test_given_parameters_are_fixed_and_the_others_are_searched():
    (arm,) = parse_arms(("ties(density=0.2)",))
    assert set(free_parameters(arm)) == {"scale"}
    assert free_parameters(make_arm("della"))["density"] == Range(0.2, 0.8)
    assert free_parameters(make_arm("slerp")) == {}
    # The weights of a sum hold its scale; those of an average do not.
    assert free_parameters(make_arm("task_arithmetic")) == {}
    assert set(free_parameters(make_arm("dare_linear"))) == {"density"}
    assert set(free_parameters(make_arm("dare_linear", {"normalize": True}))) == {"density", "scale"}


def test_plans_outside_the_space_have_no_parameters():
    space = SearchSpace(SUBSETS, parse_arms(("linear", "ties(density=0.2)", "task_arithmetic", "nuslerp")))
    inside = {
        "weights": made("task_arithmetic", {"a": 1.2, "b": 0.31}),
        "a step": pair_plan("a", "b", make_arm("linear"), 0.25),
        "the other way round": pair_plan("b", "a", make_arm("nuslerp"), 0.25),
        "its scale goes into the weights": made("task_arithmetic", {"a": 1.0, "b": 0.5}, scale=0.7),
        "thirds": MergePlan(recipe=plain_average(["c", "a", "b"])),
        "a part of a larger subset": made("linear", {"b": 1.0, "c": 0.4}),
        "between two steps of a number": made("task_arithmetic", {"a": 0.333, "b": 1.2345}),
    }
    assert [name for name, plan in inside.items() if space.parameters(plan) is None] == []
    found = space.parameters(inside["between two steps of a number"])
    assert {value for value, where in found.values() if not where.choices} == {0.33, 1.23}
    assert space.parameters(inside["the other way round"])["a + b:t.0"][0] == 0.75
    outside = [
        pair_plan("a", "d", make_arm("linear")),
        pair_plan("b", "c", make_arm("nuslerp")),  # no pair of the space, and an arc has no third member
        pair_plan("a", "b", make_arm("slerp")),
        pair_plan("a", "b", make_arm("ties", {"density": 0.3})),
        made("task_arithmetic", {"a": 1.6, "b": 0.3}),
        made("task_arithmetic", {"a": (0.2, 0.4), "b": 0.3}),  # another number of anchors
        MergePlan(recipe=recipe_of(make_arm("ties", {"density": 0.2}), {"a": 1, "b": 1}, seed=1)),
        made("ties", {"a": 1.0, "b": 1.0}, density=0.2, scale=3.0),
        MergePlan(recipe=recipe_of(make_arm("linear", {"normalize": False}), {"a": 1.0, "b": 1.0})),
        fold_plan("abc", [make_arm("linear")]),
        MergePlan(source="a"),
    ]
    assert [plan.label for plan in outside if space.parameters(plan) is not None] == []


def test_a_space_that_cannot_be_searched_is_refused(catalogue):
    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            make_space(catalogue, SearchConfig(budget=5, **changes))

    refuse("unknown checkpoint 'm9'", members=("m0", "m9"))
    refuse("members must differ", members=("m0", "m0"))
    refuse("ways 2-4: a merge takes from 2 to 3", ways=(2, 4))
    refuse("ways 1-2", ways=(1, 2))
    refuse("one arm and one set of checkpoints, not 4 arms and 3 sets", sampler="cmaes")
    refuse("not 1 arms and 4 sets", sampler="cmaes", arms=("ties",), ways=(2, 3))
    alone = {"sampler": "cmaes", "arms": ("ties",), "ways": (3, 3)}
    refuse("'cmaes' takes one objective, not add, copy", **alone, objectives=("add", "copy"))
    refuse("ways 2-3: .*'nuslerp' at most 2; leave them out: --arm 'linear' --arm 'task_arithmetic'", ways=(2, 3))
    refuse("ways 3-3: .*'slerp' at most 2; name others", ways=(3, 3), arms=("slerp",))
    refuse("'passthrough' at most 1", arms=("linear", "passthrough"))
    refuse(f"there are 0 subsets.*takes 1 to {MAX_SUBSETS}", members=("m0", "m1"), exclude=(("m1", "m0"),))
    space = make_space(catalogue, SearchConfig(budget=5, arms=("linear",), ways=(2, 3), exclude=(("m0", "m1"),)))
    assert space.subsets == (("m0", "m2"), ("m1", "m2"))
