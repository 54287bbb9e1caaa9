from __future__ import annotations

from simmerge_ray.research.second_study.small import (
    DEVELOPMENT_SEEDS,
    FIRST_SMALL_SEED,
    FOREIGN_LORA_RATES,
    FOREIGN_RATES,
    FOREIGN_STEPS,
    NUM_SMALL_BASES,
    foreign_part,
)
from simmerge_ray.research.zoo.domains import DOMAINS
from simmerge_ray.research.zoo.forms import FOREIGN


def test_no_base_and_no_expert_of_another_task_sees_an_evaluated_form():
    part = foreign_part(FIRST_SMALL_SEED, 20)
    assert {name for name, _ in part.base.shares} == {FOREIGN + domain for domain in DOMAINS}
    for expert in part.experts:
        shares = expert.shares()
        assert {name for name in shares if not name.startswith(FOREIGN)} == {expert.domain}
        assert abs(sum(shares.values()) - 1) < 1e-12
        assert (len(shares) == 1) == (expert.replay == 0)


def test_recipes_are_of_the_seed_and_do_not_depend_on_how_many_are_drawn():
    few, many = foreign_part(21, 2), foreign_part(21, 5)
    assert set(few.experts) < set(many.experts) and few.base == many.base
    assert few.base != foreign_part(22, 2).base
    assert len({one.digest() for one in many.experts}) == 20
    for one in many.experts:
        low, high = FOREIGN_RATES if one.lora_rank is None else FOREIGN_LORA_RATES
        assert low <= one.learning_rate <= high
        low, high = FOREIGN_STEPS[one.domain]
        assert low <= one.num_steps <= high
    assert {one.lora_rank is None for one in many.experts} == {True, False}


def test_the_recipe_was_not_chosen_on_the_bases_of_the_study():
    assert not set(DEVELOPMENT_SEEDS) & set(range(FIRST_SMALL_SEED, FIRST_SMALL_SEED + NUM_SMALL_BASES))


def test_a_share_of_the_steps_and_a_larger_base():
    whole, part, large = foreign_part(21, 1), foreign_part(21, 1, step_share=0.01), foreign_part(21, 1, large=True)
    assert part.base.num_steps < 0.02 * whole.base.num_steps and len(part.experts) == len(whole.experts)
    assert all(one.num_steps <= 10 for one in part.experts)
    assert large.base.num_layers > whole.base.num_layers and large.base_id != whole.base_id
