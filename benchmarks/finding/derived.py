"""A catalogue of what goes wrong in practice: broken members, members that are the base, and members half as good.

It has the zoo's checkpoints, and for every task one of each kind that claims to be a fine-tune for it. A member half as
good is the task's strong fine-tune with as much noise on its weights as halves its utility; labels are used to make
it, as for the rest of a zoo, and not to choose.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.finding.utilities import Bench
from simmerge_ray.checkpoints.catalogue import Catalogue, write_catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.model import built_model, load_model
from simmerge_ray.plans.plan import MergePlan

_DONE = "made.json"

BROKEN, COPY, HALF = "broken", "base-as", "half"


def make_derived(bench: Bench, zoo: Path, out: Path) -> Path:
    """Write the catalogue below `out` with probes and tasks of the zoo; what is there is kept. Returns `out`."""
    catalogue = bench.catalogue
    assert catalogue.base is not None and isinstance(catalogue.base.path, Path)
    refs, own_task = list(catalogue.checkpoints), dict(catalogue.own_task)
    for number, task in enumerate(sorted(bench.tasks)):
        makers: dict[str, Callable[[], dict[str, Tensor]]] = {
            BROKEN: lambda number=number: _random_weights(catalogue, number),
            COPY: lambda: _weights(catalogue.base),
            HALF: lambda task=task, number=number: _half_as_good(bench, task, number),
        }
        for kind, make in makers.items():
            directory = out / f"{kind}-{task}"
            if not (directory / _DONE).exists():
                shutil.copytree(catalogue.base.path, directory, dirs_exist_ok=True)
                save_file(make(), directory / "model.safetensors", metadata={"format": "pt"})
                (directory / _DONE).write_text("{}\n")
            refs.append(CheckpointRef(directory.name, directory, catalogue.base.id))
            own_task[directory.name] = task
    for name in ("probes", "tasks"):
        shutil.copytree(zoo / name, out / name, dirs_exist_ok=True)
    write_catalogue(out / "catalogue.yaml", Catalogue(tuple(refs), own_task, catalogue.base))
    return out


def _weights(ref: CheckpointRef | None) -> dict[str, Tensor]:
    assert ref is not None
    return {name: parameter.detach().clone() for name, parameter in load_model(ref).named_parameters()}


def _random_weights(catalogue: Catalogue, seed: int) -> dict[str, Tensor]:
    """As they are before any training."""
    assert catalogue.base is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = built_model(catalogue.base)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _half_as_good(bench: Bench, task: str, seed: int) -> dict[str, Tensor]:
    """The strong fine-tune with the least relative noise, in steps of 10 %, that halves its utility."""
    strong = _weights(bench.catalogue.ref(f"{task}-strong"))
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(weight.shape, generator=generator) for name, weight in strong.items()}
    whole = bench.utilities.mean(MergePlan(source=f"{task}-strong"), [task])
    sigma = 0.05
    while True:
        noisy = {name: weight * (1 + sigma * noise[name]) for name, weight in strong.items()}
        if bench.utilities.mean_of_weights(f"half {task} {seed} {sigma:.4f}", noisy.items, [task]) <= 0.5 * whole:
            return noisy
        sigma *= 1.1
