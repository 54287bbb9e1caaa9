"""The demo with four experts of a few steps each; `python -m tests.e2e.tiny_demo RUN` runs it as a command."""

from __future__ import annotations

import sys
from pathlib import Path

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.cli.app import run_command
from simmerge_ray.research.zoo.recipe import ExpertRecipe

RECIPES = tuple(
    ExpertRecipe(f"{domain}-few", domain, learning_rate=1e-3, num_steps=6, seed=seed)
    for seed, domain in enumerate(("math", "code", "multilingual", "rag"))
)
HELD_OUT = ("math-few", "rag-few")


def run_tiny_demo(layout: RunLayout, narrator: Narrator) -> None:
    from simmerge_ray.pipelines.demo import DemoSize, run_demo

    find = FindConfig(num_recipes=500, shortlist=4)
    size = DemoSize(RECIPES, HELD_OUT, 20, 16, TrainConfig(num_epochs=20), find, "transformers")
    run_demo(layout, narrator, size)


def main() -> None:
    from rich.console import Console

    run_tiny_demo(RunLayout(Path(sys.argv[1])), Narrator(Console()))


if __name__ == "__main__":
    run_command(main)
