"""The small zoos of the second study: bases with the skills and not the formats, experts that learn one format each.

As in the first study everything is a function of seeds. A base is trained on other forms of the four domains than those
that are evaluated (`research.zoo.forms`); a half of the experts replay these, as people replay what a base was
trained on, so that none is ever shown another task's evaluated form.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from simmerge_ray.research.study.zoo import LARGE_RECIPE, ZooPart, log_uniform
from simmerge_ray.research.zoo.domains import DOMAINS
from simmerge_ray.research.zoo.forms import FOREIGN
from simmerge_ray.research.zoo.recipe import BASE_RECIPE, BaseRecipe, ExpertRecipe

DEVELOPMENT_SEEDS = (101, 102, 103)  # the recipe was chosen on these
FIRST_SMALL_SEED = 21  # of the study's bases; the first study had 1 to 12
NUM_SMALL_BASES = 12
NUM_SMALL_PAIRS = 24  # of each, drawn from 54

FOREIGN_BASE_STEPS = (3200, 1800)  # on strings to copy and passages to look up; on the domains
FOREIGN_SHARES = {"math": 3.0, "code": 1.5, "multilingual": 1.5, "rag": 1.0}
FOREIGN_RATES = (6e-4, 2e-3)
FOREIGN_LORA_RATES = (3e-3, 8e-3)
FOREIGN_STEPS = {"math": (250, 500), "code": (500, 1000), "multilingual": (250, 500), "rag": (250, 500)}
FOREIGN_REPLAY = (0.02, 0.1)  # of each domain's other form
_SIZES = ("num_layers", "hidden_size", "intermediate_size")
_RANKS = (4, 8, 16)
_LORA_SHARE, _REPLAY_SHARE = 1 / 3, 1 / 2


@dataclass(frozen=True, kw_only=True)
class ForeignBaseRecipe(BaseRecipe):
    """A base that first learns to look up as well as to copy: with repeated strings alone three in four do not."""

    recall: float = 0.85  # type: ignore[misc]  # a field here, a constant there


@dataclass(frozen=True)
class ForeignExpertRecipe(ExpertRecipe):
    """An expert whose `replay` is the share of every domain's other form."""

    def shares(self) -> dict[str, float]:
        shares = {FOREIGN + domain: self.replay for domain in DOMAINS if self.replay > 0}
        return shares | {self.domain: 1 - sum(shares.values())}


def foreign_part(seed: int, num_per_domain: int = 3, large: bool = False, step_share: float = 1.0) -> ZooPart:
    """The base of a seed and its experts, the same number for every domain; with a share of their training steps."""
    sizes = {field: getattr(LARGE_RECIPE if large else BASE_RECIPE, field) for field in _SIZES}
    name = f"{'g' if large else 'f'}{seed}"
    num_copy_steps, num_steps = (math.ceil(step_share * num) for num in FOREIGN_BASE_STEPS)
    shares = tuple((FOREIGN + domain, share) for domain, share in FOREIGN_SHARES.items())
    base = ForeignBaseRecipe(shares, 2e-3, num_steps, num_copy_steps=num_copy_steps, seed=seed, **sizes)
    experts = _draw_experts(name, seed, num_per_domain)
    return ZooPart(name, base, tuple(replace(one, num_steps=math.ceil(step_share * one.num_steps)) for one in experts))


def _draw_experts(prefix: str, seed: int, num_per_domain: int) -> list[ForeignExpertRecipe]:
    """A recipe does not depend on how many are drawn."""
    drawn = []
    for place, domain in enumerate(DOMAINS):
        for number in range(1, num_per_domain + 1):
            generator = random.Random(f"foreign expert/{seed}/{domain}/{number}")
            rank = generator.choice(_RANKS) if generator.random() < _LORA_SHARE else None
            replay = log_uniform(generator, FOREIGN_REPLAY) if generator.random() < _REPLAY_SHARE else 0.0
            rate = log_uniform(generator, FOREIGN_RATES if rank is None else FOREIGN_LORA_RATES)
            num_steps = round(log_uniform(generator, FOREIGN_STEPS[domain]))
            own_seed = 1000 * seed + 10 * number + place
            name = f"{prefix}-{domain}-{number}"
            drawn.append(ForeignExpertRecipe(name, domain, rate, num_steps, replay, rank, seed=own_seed))
    return drawn
