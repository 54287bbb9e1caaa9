from __future__ import annotations

from simmerge_ray.research.study.zoo import LARGE_RECIPE, REPLAY, draw_experts, zoo_part
from simmerge_ray.research.zoo.domains import DOMAINS
from simmerge_ray.research.zoo.recipe import BASE_RECIPE, EXPERT_RECIPES


def test_recipes_do_not_depend_on_how_many_are_drawn():
    few, many = draw_experts("s1", 1, 2), draw_experts("s1", 1, 5)
    assert set(few) < set(many)
    assert draw_experts("s1", 1, 2) == few
    assert {recipe.learning_rate for recipe in draw_experts("s2", 2, 2)}.isdisjoint(r.learning_rate for r in few)


def test_every_domain_has_its_experts_and_all_kinds_occur():
    drawn = draw_experts("s3", 3, 30)
    assert {domain: sum(one.domain == domain for one in drawn) for domain in DOMAINS} == dict.fromkeys(DOMAINS, 30)
    assert len({one.name for one in drawn}) == len({one.seed for one in drawn}) == 120
    for one in drawn:
        assert 40 <= one.num_steps <= 200
        assert one.replay == 0 or REPLAY[0] <= one.replay <= REPLAY[1]
        low, high = (4e-4, 4e-3) if one.lora_rank is None else (1e-3, 1e-2)
        assert low <= one.learning_rate <= high
    assert 20 <= sum(one.lora_rank is not None for one in drawn) <= 60
    assert 40 <= sum(one.replay > 0 for one in drawn) <= 80


def test_parts_share_no_checkpoint_with_each_other_or_with_the_demo():
    parts = [zoo_part(1, 2), zoo_part(2, 2), zoo_part(1, 2, large=True)]
    bases = {expert.name: part.base_id for part in parts for expert in part.experts}
    assert len(bases) == 24 and set(bases.values()) == {"s1-base", "s2-base", "l1-base"}
    assert not set(bases) & {recipe.name for recipe in EXPERT_RECIPES}
    assert parts[0].base != BASE_RECIPE and parts[2].base.num_layers > BASE_RECIPE.num_layers


def test_a_share_of_the_steps_shortens_the_training_alone():
    whole, part = zoo_part(1, 1), zoo_part(1, 1, step_share=0.01)
    assert (part.base.num_steps, part.base.num_copy_steps) == (8, 9)
    assert all(1 <= one.num_steps <= 2 for one in part.experts)
    assert [one.learning_rate for one in part.experts] == [one.learning_rate for one in whole.experts]


def test_the_large_base_has_at_least_eight_times_the_parameters():
    from simmerge_ray.research.zoo.model import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    small = build_model(tokenizer).num_parameters()
    large = build_model(
        tokenizer, LARGE_RECIPE.num_layers, LARGE_RECIPE.hidden_size, LARGE_RECIPE.intermediate_size
    ).num_parameters()
    assert large >= 8 * small
