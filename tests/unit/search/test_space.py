"""The space of plans, and what Optuna is told of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import InputError
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm, parse_arms
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.search.space import MAX_SUBSETS, STEP, Range, SearchSpace, free_parameters, make_space

TWO_WAY = [name for name, spec in OPERATOR_SPECS.items() if spec.max_sources != 1 and not spec.needs_grams]
SUBSETS = (("a", "b"), ("a", "c"), ("a", "b", "c"))


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


@given(st.data(), st.lists(st.sampled_from(TWO_WAY), min_size=1, max_size=3, unique=True), st.integers(1, 3))
def test_a_plan_of_the_space_is_found_again_by_its_parameters(data, operators, num_anchors):
    space = SearchSpace(SUBSETS, tuple(make_arm(name) for name in operators), num_anchors)
    names: list[str] = []
    plan = space.plan(drawn(data, names))
    assert plan.members in [one[::order] for one in SUBSETS for order in (1, -1)] or set(plan.members) == {
        "a",
        "b",
        "c",
    }
    found = space.parameters(plan)
    assert found is not None
    # Equal anchors make one plan whatever their number; everything else is the same parameters again.
    assert set(found) == set(names) and all(where.holds(value) for value, where in found.values())
    assert space.plan(lambda name, where: found[name][0]).id == plan.id


def test_given_parameters_are_fixed_and_the_others_are_searched():
    (arm,) = parse_arms(("ties(density=0.2)",))
    assert set(free_parameters(arm)) == {"scale"}
    assert free_parameters(make_arm("della"))["density"] == Range(0.2, 0.8)
    assert free_parameters(make_arm("slerp")) == {}


def test_plans_outside_the_space_have_no_parameters():
    space = SearchSpace(SUBSETS, parse_arms(("linear", "ties(density=0.2)")))
    assert space.parameters(pair_plan("a", "b", make_arm("linear"), 0.25)) is not None
    outside = [
        pair_plan("b", "c", make_arm("linear")),
        pair_plan("a", "b", make_arm("slerp")),
        pair_plan("a", "b", make_arm("ties", {"density": 0.3})),
        pair_plan("a", "b", make_arm("linear"), 0.255),  # between two steps
        MergePlan(source="a"),
    ]
    for plan in outside:
        assert plan.source or space.parameters(plan) is None


def test_a_space_that_cannot_be_searched_is_refused(catalogue):
    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            make_space(catalogue, SearchConfig(budget=5, **changes))

    refuse("unknown checkpoint 'm9'", members=("m0", "m9"))
    refuse("members must differ", members=("m0", "m0"))
    refuse("ways 2-4: a merge takes from 2 to 3", ways=(2, 4))
    refuse("ways 1-2", ways=(1, 2))
    refuse("one arm and one number of checkpoints, not 4 arms and 2-2", sampler="cmaes")
    refuse("not 1 arms and 2-3", sampler="cmaes", arms=("ties",), ways=(2, 3))
    refuse(f"there are 0 subsets.*takes 1 to {MAX_SUBSETS}", members=("m0", "m1"), exclude=(("m1", "m0"),))
    space = make_space(catalogue, SearchConfig(budget=5, ways=(2, 3), exclude=(("m0", "m1"),)))
    assert space.subsets == (("m0", "m2"), ("m1", "m2"))
