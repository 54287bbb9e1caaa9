"""The zoo of the study: bases of several seeds, and experts whose recipes are drawn at random.

Everything is a function of seeds, so a checkpoint can be made again by its name. Ids are `s<seed>-<domain>-<number>`:
they are unique over the bases, so the labels of all bases lie in one store.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from simmerge_ray.research.zoo.domains import DOMAINS
from simmerge_ray.research.zoo.recipe import BASE_RECIPE, BaseRecipe, ExpertRecipe

# Of the demo's three kinds (learning rates 4e-4 and 3e-3 with all weights, 5e-3 with LoRA, 120 steps) and around them.
FULL_RATES = (4e-4, 4e-3)
LORA_RATES = (1e-3, 1e-2)
NUM_STEPS = (40, 200)
REPLAY = (0.005, 0.05)  # of each other domain
LORA_RANKS = (2, 4, 8, 16)
LORA_SHARE, REPLAY_SHARE = 1 / 3, 1 / 2  # of the experts

# More layers, and 8.1 times the parameters of the demo's base.
LARGE_RECIPE = replace(BASE_RECIPE, num_layers=6, hidden_size=192, intermediate_size=544)


@dataclass(frozen=True)
class ZooPart:
    """One base and its experts: a catalogue of its own, since only checkpoints of one base are merged."""

    name: str
    base: BaseRecipe
    experts: tuple[ExpertRecipe, ...]

    @property
    def base_id(self) -> str:
        return f"{self.name}-base"


def zoo_part(seed: int, num_per_domain: int, large: bool = False, step_share: float = 1.0) -> ZooPart:
    """The base of a seed and its experts, the same number for every domain; with a share of their training steps."""
    name = f"{'l' if large else 's'}{seed}"
    recipe = LARGE_RECIPE if large else BASE_RECIPE
    num_steps, num_copy_steps = (math.ceil(step_share * num) for num in (recipe.num_steps, recipe.num_copy_steps))
    base = replace(recipe, seed=seed, num_steps=num_steps, num_copy_steps=num_copy_steps)
    experts = draw_experts(name, seed, num_per_domain)
    return ZooPart(name, base, tuple(replace(one, num_steps=math.ceil(step_share * one.num_steps)) for one in experts))


def draw_experts(prefix: str, seed: int, num_per_domain: int) -> tuple[ExpertRecipe, ...]:
    """Recipes with learning rate, steps and replay log-uniform; a third train LoRA factors, a half replay the other
    domains. A recipe does not depend on how many are drawn."""
    drawn = []
    for place, domain in enumerate(DOMAINS):
        for number in range(1, num_per_domain + 1):
            generator = random.Random(f"expert/{seed}/{domain}/{number}")
            rank = generator.choice(LORA_RANKS) if generator.random() < LORA_SHARE else None
            replay = log_uniform(generator, REPLAY) if generator.random() < REPLAY_SHARE else 0.0
            rate = log_uniform(generator, FULL_RATES if rank is None else LORA_RATES)
            num_steps, own_seed = round(log_uniform(generator, NUM_STEPS)), 1000 * seed + 10 * number + place
            name = f"{prefix}-{domain}-{number}"
            drawn.append(ExpertRecipe(name, domain, rate, num_steps, replay, rank, seed=own_seed))
    return tuple(drawn)


def log_uniform(generator: random.Random, bounds: tuple[float, float]) -> float:
    """Drawn so that every factor is as likely, to three digits."""
    low, high = bounds
    return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.3g}")
