"""The demo zoo on Ray: the shipped base, its experts fine-tuned in parallel, their probes and tasks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from simmerge_ray.catalogue import Catalogue, write_catalogue
from simmerge_ray.checkpoints import CheckpointRef
from simmerge_ray.demo.recipe import EXPERT_RECIPES, ExpertRecipe
from simmerge_ray.distributed.resources import ray_session
from simmerge_ray.progress import Report
from simmerge_ray.storage import jsonl_bytes, new_directory, read_json, write_once

NUM_ITEMS = 400
NUM_PROBES = 64
MAX_NEW_TOKENS = 14
BASE_ID = "base"


def make_zoo(
    out: Path,
    recipes: Sequence[ExpertRecipe] = EXPERT_RECIPES,
    num_items: int = NUM_ITEMS,
    num_probes: int = NUM_PROBES,
    report: Report | None = None,
) -> int:
    """Fill `out` with checkpoints, `probes/`, `tasks/` and `catalogue.yaml`; returns how many experts were trained.

    An expert whose directory was made by the same recipe is kept, so an interrupted call goes on where it stopped.
    """
    from simmerge_ray.demo.domains import DOMAINS, evaluation_items, probe_texts

    out = out.resolve()  # tasks of Ray may run in another working directory
    if not (out / BASE_ID / "model.safetensors").exists():
        with (
            resources.as_file(resources.files("simmerge_ray.demo") / "data" / "base") as shipped,
            new_directory(out / BASE_ID) as target,
        ):
            shutil.copytree(shipped, target, dirs_exist_ok=True)
    for domain in DOMAINS:
        probes = [{"text": text} for text in probe_texts(domain, num_probes)]
        write_once(out / "probes" / f"{domain}.jsonl", jsonl_bytes(probes))
        items = [
            {"prompt": item.prompt, "target": item.target, "max_new_tokens": MAX_NEW_TOKENS}
            for item in evaluation_items(domain, num_items)
        ]
        write_once(out / "tasks" / f"{domain}.jsonl", jsonl_bytes(items))
    missing = [recipe for recipe in recipes if not _is_trained(out / recipe.name, recipe)]
    if missing:
        with ray_session():
            _train(missing, out, report)
    refs = tuple(CheckpointRef(recipe.name, out / recipe.name, BASE_ID) for recipe in recipes)
    own_task = {recipe.name: recipe.domain for recipe in recipes}
    write_catalogue(out / "catalogue.yaml", Catalogue(refs, own_task, CheckpointRef(BASE_ID, out / BASE_ID)))
    return len(missing)


def _is_trained(directory: Path, recipe: ExpertRecipe) -> bool:
    try:
        return bool(read_json(directory / "recipe.json")["digest"] == recipe.digest())
    except (OSError, ValueError, KeyError):
        return False


def _train(recipes: Sequence[ExpertRecipe], out: Path, report: Report | None) -> None:
    import ray

    from simmerge_ray.demo.training import train_expert

    remote = ray.remote(train_expert).options(num_cpus=1, max_retries=2)
    pending = [remote.remote(recipe, str(out / BASE_ID), str(out / recipe.name)) for recipe in recipes]
    for done in range(len(recipes)):
        finished, pending = ray.wait(pending, num_returns=1)
        ray.get(finished[0])
        if report:
            report(done + 1, len(recipes))
