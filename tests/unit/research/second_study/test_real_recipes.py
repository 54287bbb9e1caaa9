from __future__ import annotations

from simmerge_ray.research.second_study.real_recipes import (
    FULL_RATES,
    LORA_RATES,
    MIXED,
    NUM_STEPS,
    TRANSLATION_STEPS,
    draw_real_experts,
    pilot_recipes,
)
from simmerge_ray.research.second_study.real_tasks import GENERAL, REAL_TASKS


def test_three_experts_a_task_half_of_them_lora_and_half_of_them_mixed():
    drawn = draw_real_experts("d")
    assert [one.task for one in drawn] == [task for task in REAL_TASKS for _ in range(3)]
    assert len({one.name for one in drawn}) == len({one.digest() for one in drawn}) == 12
    assert sum(one.lora_rank is not None for one in drawn) == 6
    mixed = [one.mixed for one in drawn if one.mixed]
    assert len(mixed) == 6 and mixed.count(GENERAL) == 3
    for one in drawn:
        low, high = FULL_RATES if one.lora_rank is None else LORA_RATES
        assert low <= one.learning_rate <= high and NUM_STEPS[0] <= one.num_steps <= NUM_STEPS[1]
        assert one.task != "translation" or one.num_steps >= TRANSLATION_STEPS[0]
        assert one.mixed != one.task and abs(sum(one.shares.values()) - 1) < 1e-12
        assert one.mixed is None or MIXED[0] <= one.shares[one.mixed] <= MIXED[1]


def test_recipes_follow_from_the_seed_and_the_data():
    assert draw_real_experts("d") == draw_real_experts("d")
    assert not set(draw_real_experts("d", seed=1)) & set(draw_real_experts("d"))
    digests = [{one.digest() for one in draw_real_experts(data)} for data in ("d", "e")]
    assert not digests[0] & digests[1]
    assert [one.task for one in pilot_recipes()] == list(REAL_TASKS)
