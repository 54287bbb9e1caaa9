"""The demo with four experts of a few steps each: `python -m tests.e2e.tiny_demo RUN`. Driven by test_demo.py."""

from __future__ import annotations

import sys
from pathlib import Path

from simmerge_ray.cli import run_command
from simmerge_ray.config import TrainConfig
from simmerge_ray.demo.recipe import ExpertRecipe
from simmerge_ray.runs import RunLayout

RECIPES = tuple(
    ExpertRecipe(f"{domain}-few", domain, learning_rate=1e-3, num_steps=12, seed=seed)
    for seed, domain in enumerate(("math", "code", "multilingual", "rag"))
)


def main() -> None:
    from rich.console import Console

    from simmerge_ray.distributed.demo import run_demo
    from simmerge_ray.progress import Narrator

    run_demo(
        RunLayout(Path(sys.argv[1])),
        Narrator(Console()),
        recipes=RECIPES,
        held_out=("math-few", "rag-few"),
        num_items=40,
        train=TrainConfig(num_epochs=20),
        evaluator="transformers",
    )


if __name__ == "__main__":
    run_command(main)
