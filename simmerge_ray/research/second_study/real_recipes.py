"""Experts of the real tasks: recipes drawn at random from a fixed seed, as those of different people would be."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from simmerge_ray.research.second_study.real_tasks import GENERAL, REAL_TASKS
from simmerge_ray.research.study.zoo import log_uniform
from simmerge_ray.research.zoo.recipe import TrainingRecipe

FULL_RATES = (3e-5, 3e-4)
LORA_RATES = (1.5e-4, 1.5e-3)  # factors need larger steps than weights
NUM_STEPS = (30, 150)
TRANSLATION_STEPS = (90, 150)  # the base knows English alone: 30 steps gained .10 in the pilot
LORA_RANKS = (4, 8, 16, 32)
MIXED = (0.1, 0.4)  # share of another task or of general text
NUM_PER_TASK = 3


@dataclass(frozen=True)
class RealRecipe(TrainingRecipe):
    """A fine-tune of the pretrained base.

    mixed: another task, or `GENERAL`, of which `mixed_share` of the examples are. data: digest of what is trained on.
    """

    name: str
    task: str
    learning_rate: float
    num_steps: int
    lora_rank: int | None = None
    mixed: str | None = None
    mixed_share: float = 0.0
    num_rows: int = 8
    row_tokens: int = 128
    seed: int = 0
    data: str = ""

    @property
    def shares(self) -> dict[str, float]:
        """Of what it is trained on."""
        own = {self.task: 1 - self.mixed_share}
        return own if self.mixed is None else own | {self.mixed: self.mixed_share}


def pilot_recipes(data: str = "") -> tuple[RealRecipe, ...]:
    """One plain expert a task, to see whether the task can be learned."""
    num_steps = dict.fromkeys(REAL_TASKS, NUM_STEPS[0]) | {"translation": TRANSLATION_STEPS[0]}
    return tuple(RealRecipe(f"pilot-{task}", task, 1e-4, num_steps[task], data=data) for task in REAL_TASKS)


def draw_real_experts(data: str = "", seed: int = 0) -> tuple[RealRecipe, ...]:
    """`NUM_PER_TASK` experts a task: learning rate and steps log-uniform. A half, drawn, train LoRA factors; a half,
    drawn, mix something in: every other one of these general text, the others another task."""
    generator = random.Random(f"real experts/{seed}")
    num = NUM_PER_TASK * len(REAL_TASKS)
    with_lora, with_mixture = (generator.sample(range(num), num // 2) for _ in range(2))
    drawn = []
    for place in range(num):
        number, task = place % NUM_PER_TASK + 1, list(REAL_TASKS)[place // NUM_PER_TASK]
        rank = generator.choice(LORA_RANKS) if place in with_lora else None
        rate = log_uniform(generator, FULL_RATES if rank is None else LORA_RATES)
        bounds = TRANSLATION_STEPS if task == "translation" else NUM_STEPS
        recipe = RealRecipe(f"{task}-{number}", task, rate, round(log_uniform(generator, bounds)), rank)
        if place in with_mixture:
            other = generator.choice([name for name in REAL_TASKS if name != task])
            mixed = GENERAL if with_mixture.index(place) % 2 else other
            recipe = replace(recipe, mixed=mixed, mixed_share=log_uniform(generator, MIXED))
        drawn.append(replace(recipe, seed=1000 * seed + place, data=data))
    return tuple(drawn)
