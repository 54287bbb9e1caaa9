"""Small zoos on Ray: bases and their experts trained in parallel, their probes and tasks."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

from simmerge_ray.base.progress import Report
from simmerge_ray.base.storage import jsonl_bytes, new_directory, read_json, write_atomically
from simmerge_ray.checkpoints.catalogue import Catalogue, write_catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.on_ray.resources import ray_session
from simmerge_ray.on_ray.tasks import run_tasks
from simmerge_ray.research.study.zoo import ZooPart
from simmerge_ray.research.zoo.recipe import EXPERT_RECIPES, BaseRecipe, ExpertRecipe, TrainingRecipe

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
    here: bool = False,
) -> int:
    """Fill `out` with checkpoints, `probes/`, `tasks/` and `catalogue.yaml`; returns how many experts were trained.

    The base is the one that is shipped. An expert whose directory was made by the same recipe is kept, so an
    interrupted call goes on where it stopped. here: train one after the other in this process, without Ray.
    """
    out = out.resolve()  # tasks of Ray may run in another working directory
    if not (out / BASE_ID / "model.safetensors").exists():
        shipped = resources.files("simmerge_ray.research.zoo") / "base"
        with resources.as_file(shipped) as source, new_directory(out / BASE_ID) as target:
            shutil.copytree(source, target, dirs_exist_ok=True)
    write_questions(out, num_items, num_probes)
    num_trained = _train([(recipe, out / BASE_ID, out / recipe.name) for recipe in recipes], [], report, here)
    _write_catalogue(out, BASE_ID, recipes)
    return num_trained


def make_zoo_parts(out: Path, parts: Sequence[ZooPart], report: Report | None = None, here: bool = False) -> int:
    """Train the bases and experts of several catalogues, each in a directory of its name below `out`, and keep those
    made by the same recipe; returns how many were trained. here: as `make_zoo`."""
    out = out.resolve()
    bases, experts = [], []
    for part in parts:
        directory, base = out / part.name, out / part.name / part.base_id
        bases.append((part.base, base))
        experts += [(expert, base, directory / expert.name) for expert in part.experts]
    num_trained = _train(experts, bases, report, here)
    for part in parts:
        _write_catalogue(out / part.name, part.base_id, part.experts)
    return num_trained


def write_questions(out: Path, num_items: int = NUM_ITEMS, num_probes: int = NUM_PROBES) -> None:
    """Write `probes/` and `tasks/`: texts and items of every domain, the same in every zoo."""
    from simmerge_ray.research.zoo.domains import DOMAINS, evaluation_items, probe_texts

    for domain in DOMAINS:
        probes = [{"text": text} for text in probe_texts(domain, num_probes)]
        write_atomically(out / "probes" / f"{domain}.jsonl", jsonl_bytes(probes))
        items = [one._asdict() | {"max_new_tokens": MAX_NEW_TOKENS} for one in evaluation_items(domain, num_items)]
        write_atomically(out / "tasks" / f"{domain}.jsonl", jsonl_bytes(items))


def _write_catalogue(directory: Path, base_id: str, recipes: Sequence[ExpertRecipe]) -> None:
    refs = tuple(CheckpointRef(recipe.name, directory / recipe.name, base_id) for recipe in recipes)
    own_task = {recipe.name: recipe.domain for recipe in recipes}
    catalogue = Catalogue(refs, own_task, CheckpointRef(base_id, directory / base_id))
    write_catalogue(directory / "catalogue.yaml", catalogue)


def is_trained(directory: Path, recipe: TrainingRecipe) -> bool:
    """Whether the directory holds the checkpoint that the recipe makes."""
    try:
        return bool(read_json(directory / "recipe.json")["digest"] == recipe.digest())
    except (OSError, ValueError, KeyError):
        return False


def _train(
    experts: Sequence[tuple[ExpertRecipe, Path, Path]],
    bases: Sequence[tuple[BaseRecipe, Path]],
    report: Report | None,
    here: bool = False,
) -> int:
    """Train what is missing, an expert (recipe, base, directory) as soon as its base (recipe, directory) is there."""
    missing_bases = [(recipe, path) for recipe, path in bases if not is_trained(path, recipe)]
    anew = {path for _, path in missing_bases}
    missing = [(recipe, base, path) for recipe, base, path in experts if base in anew or not is_trained(path, recipe)]
    total = len(missing_bases) + len(missing)
    if not total:
        return 0
    from simmerge_ray.research.zoo.training import train_checkpoint

    calls: deque[tuple[Any, ...]] = deque((recipe, None, path) for recipe, path in missing_bases)
    calls += (call for call in missing if call[1] not in anew)
    with nullcontext() if here else ray_session():
        trained = (
            ((call, train_checkpoint(*call)) for call in _taken(calls)) if here else run_tasks(train_checkpoint, calls)
        )
        for done, ((_, _, made), _) in enumerate(trained, 1):
            calls += (call for call in missing if call[1] == made)
            if report:
                report(done, total)
    return total


def _taken(calls: deque[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """From the left, until there are none, those that were added meanwhile too."""
    while calls:
        yield calls.popleft()
