"""`simmerge demo --quick`: three experts of the demo's zoo, and the merge of them that `simmerge auto` chooses without
a label. One process, no Ray, no vLLM; about a minute on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simmerge_ray.base.config import EngineConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.program import program
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.pipelines.auto.request import AutoRun
from simmerge_ray.research.zoo.recipe import EXPERT_RECIPES, ExpertRecipe

# They have learnt something and forgotten little: a merge keeps more than any of them. The full demo has the others.
QUICK_RECIPES = tuple(recipe for recipe in EXPERT_RECIPES if recipe.name in ("math-weak", "code-weak", "rag-weak"))


def quick_zoo(
    layout: RunLayout[Path],
    narrator: Narrator,
    recipes: Sequence[ExpertRecipe] = QUICK_RECIPES,
    num_items: int | None = None,
    num_probes: int | None = None,
) -> None:
    """Train what is missing of the experts, in this process. num_items, num_probes: as of `zoo_stage`."""
    from simmerge_ray.pipelines.demo import zoo_stage

    zoo_stage(layout, narrator, recipes, num_items, num_probes, here=True)


def quick_run(layout: RunLayout[Path], config: FindConfig | None = None) -> AutoRun:
    """What `simmerge auto` is asked of these experts; its answer goes to `auto` in the run's directory."""
    from dataclasses import replace

    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.probes import load_probe_sets
    from simmerge_ray.pipelines.auto.answer import auto_run, check_auto
    from simmerge_ray.selector.finding.sources import find_request

    request = find_request(load_catalogue(layout.catalogue), load_probe_sets(layout.probes), config or FindConfig())
    run = auto_run(request, EngineConfig(evaluator="transformers"), layout.root / "auto", None, None, 0)
    run = replace(run, here=True)
    check_auto(run)
    return run


def quick_lines(layout: RunLayout[Path]) -> list[str]:
    """Where it lies, and what to try next."""
    out, merged = layout.root / "auto", layout.root / "auto" / "merged"
    given = f"{layout.catalogue} --probes {layout.probes}"
    lines = ["", f"answer             {out / 'auto.json'}"]
    if merged.exists():
        lines += [
            f"merged checkpoint  {merged}",
            "",
            "next: what the merge keeps, with examples:",
            f"  {program()} retention {merged} --catalogue {given}",
        ]
    return [
        *lines,
        "let labels have the last word (minutes):",
        f"  {program()} auto {given} --out {out} --evaluator transformers --tasks {layout.tasks} --evaluate 4",
        "or take checkpoints of your own:",
        f"  {program()} init work CHECKPOINT... --probes TASK=FILE",
    ]
