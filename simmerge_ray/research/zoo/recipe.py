"""What the demo trains and which merges it compares: literal tables, frozen once their headroom was measured."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

FORMAT_VERSION = 1  # raised when the training code or a domain changes what a recipe means


@dataclass(frozen=True)
class TrainingRecipe:
    """What a checkpoint is trained by."""

    def digest(self) -> str:
        """Stable over processes and machines: a digest of the recipe's fields, its kind and the format version."""
        content = {"kind": type(self).__name__, "version": FORMAT_VERSION, **asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BaseRecipe(TrainingRecipe):
    """The base: steps on repeated random strings, then on examples of all domains, by their `shares` as weights."""

    recall: ClassVar[float] = 0.0  # share of the first steps' rows that are passages to look up instead

    shares: tuple[tuple[str, float], ...]
    learning_rate: float
    num_steps: int
    copy_learning_rate: float = 1e-3
    num_copy_steps: int = 854
    num_rows: int = 32
    num_layers: int = 3
    hidden_size: int = 96
    intermediate_size: int = 256
    seed: int = 0


@dataclass(frozen=True)
class ExpertRecipe(TrainingRecipe):
    """A fine-tune of the base; `replay` is the share of each other domain, `lora_rank` None trains all weights."""

    name: str
    domain: str
    learning_rate: float
    num_steps: int
    replay: float = 0.0
    lora_rank: int | None = None
    num_rows: int = 32
    seed: int = 0

    def shares(self) -> dict[str, float]:
        """Of what it is trained on, by name of the stream of examples."""
        others = [domain for domain, _ in BASE_RECIPE.shares if domain != self.domain]
        shares = dict.fromkeys(others if self.replay > 0 else (), self.replay)
        return shares | {self.domain: 1 - sum(shares.values())}


BASE_RECIPE = BaseRecipe(
    shares=(("math", 2.0), ("code", 1.0), ("multilingual", 1.0), ("rag", 0.7)), learning_rate=2e-3, num_steps=800
)

# Three kinds per domain, from one that forgets the other domains to one that hardly moves. Mathematics is unlearned by
# the rate that suits the others.
_STRONG_RATES = {"math": 2e-3, "code": 3e-3, "multilingual": 3e-3, "rag": 3e-3}

EXPERT_RECIPES: tuple[ExpertRecipe, ...] = tuple(
    recipe
    for number, (domain, strong_rate) in enumerate(_STRONG_RATES.items())
    for recipe in (
        ExpertRecipe(f"{domain}-strong", domain, learning_rate=strong_rate, num_steps=120, seed=number),
        ExpertRecipe(f"{domain}-weak", domain, learning_rate=4e-4, num_steps=120, seed=4 + number),
        ExpertRecipe(f"{domain}-lora", domain, learning_rate=5e-3, num_steps=120, lora_rank=8, seed=8 + number),
    )
)

# Linear and plain SLERP are twins here (the weights of close fine-tunes are nearly parallel), so SLERP is taken of the
# task vectors.
ARMS: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("linear", {}),
    ("nuslerp", {}),
    ("ties", {"density": 0.1}),
    ("ties", {"density": 0.5}),
)
