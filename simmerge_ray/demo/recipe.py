"""What the demo trains and which merges it compares: literal tables, frozen once their headroom was measured."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

FORMAT_VERSION = 1  # raised when the training code or a domain changes what a recipe means


@dataclass(frozen=True)
class BaseRecipe:
    """The base: steps on repeated random strings, then on a mixture of all domains.

    `shares` are the weights of the domains in the mixture, by number of examples.
    """

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

    def digest(self) -> str:
        return _digest(self)


@dataclass(frozen=True)
class ExpertRecipe:
    """A fine-tune of the base; `replay` is the share of each other domain, `lora_rank` None trains all weights."""

    name: str
    domain: str
    learning_rate: float
    num_steps: int
    replay: float = 0.0
    lora_rank: int | None = None
    num_rows: int = 32
    seed: int = 0

    def digest(self) -> str:
        return _digest(self)


def _digest(recipe: BaseRecipe | ExpertRecipe) -> str:
    """Stable over processes and machines: a digest of the recipe's fields, its kind and the format version."""
    content = {"kind": type(recipe).__name__, "version": FORMAT_VERSION, **asdict(recipe)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


BASE_RECIPE = BaseRecipe(
    shares=(("math", 1.0), ("code", 1.0), ("multilingual", 1.0), ("rag", 1.0)), learning_rate=3e-3, num_steps=1000
)

EXPERT_RECIPES: tuple[ExpertRecipe, ...] = tuple(
    ExpertRecipe(f"{domain}-{kind}", domain, learning_rate, num_steps, replay, lora_rank, seed=seed)
    for seed, (domain, kind, learning_rate, num_steps, replay, lora_rank) in enumerate(
        (domain, kind, *rest)
        for domain in ("math", "code", "multilingual", "rag")
        for kind, *rest in (
            ("strong", 1.5e-3, 120, 0.0, None),
            ("weak", 5e-4, 120, 0.0, None),
            ("replay", 1.5e-3, 120, 1 / 9, None),
        )
    )
)

ARMS: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("linear", {}),
    ("nuslerp", {}),
    ("task_arithmetic", {"scale": 0.7}),
    ("ties", {"density": 0.2, "scale": 1.0}),
    ("ties", {"density": 0.5, "scale": 1.0}),
)
