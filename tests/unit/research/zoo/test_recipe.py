"""The zoo's tables: distinct, covering, and digests that are stable."""

import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace

import pytest

from simmerge_ray.plans.operators.specs import OPERATOR_SPECS
from simmerge_ray.research.zoo.domains import DOMAINS
from simmerge_ray.research.zoo.recipe import ARMS, BASE_RECIPE, EXPERT_RECIPES, BaseRecipe, ExpertRecipe


def test_every_domain_has_at_least_two_experts_and_one_expert_is_a_lora() -> None:
    counts = Counter(recipe.domain for recipe in EXPERT_RECIPES)
    assert set(counts) == set(DOMAINS)
    assert min(counts.values()) >= 2
    assert any(recipe.lora_rank is not None for recipe in EXPERT_RECIPES)


def test_experts_have_distinct_names_seeds_and_digests() -> None:
    for values in (
        [recipe.name for recipe in EXPERT_RECIPES],
        [recipe.seed for recipe in EXPERT_RECIPES],
        [recipe.digest() for recipe in EXPERT_RECIPES],
    ):
        assert len(set(values)) == len(values)


def test_base_is_trained_on_every_domain() -> None:
    assert {domain for domain, share in BASE_RECIPE.shares if share > 0} == set(DOMAINS)


@pytest.mark.parametrize("recipe", [BASE_RECIPE, EXPERT_RECIPES[0]], ids=["base", "expert"])
def test_digest_changes_with_every_field(recipe: BaseRecipe | ExpertRecipe) -> None:
    changed = {"name": "x", "domain": "x", "shares": (("math", 1.0),), "lora_rank": 99}
    for field in fields(recipe):
        value = changed.get(field.name, getattr(recipe, field.name))
        if field.name not in changed:
            value += 1
        assert replace(recipe, **{field.name: value}).digest() != recipe.digest(), field.name


def test_digest_is_the_same_in_another_process() -> None:
    code = (
        "from simmerge_ray.research.zoo.recipe import BASE_RECIPE as b, EXPERT_RECIPES as e\n"
        "print(b.digest(), e[0].digest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [BASE_RECIPE.digest(), EXPERT_RECIPES[0].digest()]


def test_arms_are_known_operators_without_twins() -> None:
    assert 4 <= len(ARMS) <= 6
    assert {operator for operator, _ in ARMS} <= set(OPERATOR_SPECS)
    assert len({(operator, *sorted(parameters.items())) for operator, parameters in ARMS}) == len(ARMS)
    assert not {"linear", "slerp"} <= {operator for operator, _ in ARMS}
