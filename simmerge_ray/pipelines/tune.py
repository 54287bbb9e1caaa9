"""`simmerge tune` behind the command: checked inputs, a state to go on from, and the recipe as a plan file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.base.errors import ConfigError, PlanError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Place, digest_json, write_atomically
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import ProbeSet, load_probe_sets
from simmerge_ray.plans.plan import MergePlan, resolve_plan, write_plan

if TYPE_CHECKING:
    from simmerge_ray.signals.tuning.tuner import TuneState

RECIPE = "recipe.json"


def tuning_sources(
    catalogue_path: Place, members: Sequence[str], probes: Place, out: Path
) -> tuple[Catalogue, dict[str, ProbeSet]]:
    """The catalogue cut down to the members, and the probes; checked before any weight is read.

    Raises:
        ConfigError: no base, or fewer than two members. PlanError: an unknown member. ProbeError: see `check_members`.
    """
    from simmerge_ray.signals.candidates.retention import check_members

    whole, probe_sets = load_catalogue(catalogue_path), load_probe_sets(probes)
    chosen = tuple(whole.ref(member) for member in members) or whole.checkpoints
    catalogue = replace(whole, checkpoints=chosen)
    if catalogue.base is None:
        raise ConfigError("coefficients are of task vectors: name the common ancestor under `base` in the catalogue")
    if len(chosen) < 2 or len(set(catalogue.ids)) < len(chosen):
        raise PlanError(f"tuning needs two or more different members, got {', '.join(catalogue.ids)}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; the state and the recipe go into a directory")
    check_members(catalogue, probe_sets)
    return catalogue, probe_sets


def tune_stage(
    catalogue: Catalogue, probe_sets: dict[str, ProbeSet], config: TuneConfig, out: Path, narrator: Narrator
) -> Path:
    """Tune, and write the recipe; what an interrupted run had reached is gone on from. Returns the recipe's path."""
    from simmerge_ray.signals.signature import SignatureSpec
    from simmerge_ray.signals.tokens import tokenize_probes
    from simmerge_ray.signals.tuning.prepare import prepare_tuning, stated_bytes
    from simmerge_ray.signals.tuning.tuner import tune_coefficients

    own_tasks = {catalogue.own_task[member] for member in catalogue.ids}
    used = {task: probe_sets[task] for task in sorted(filter(None, own_tasks))}
    digests = catalogue.digests()
    content = [1, digests, {task: probes.digest for task, probes in used.items()}, config.model_dump(mode="json")]
    state_file = out / f"state-{digest_json(content)[:16]}.npz"
    narrator.say(f"memory: about {stated_bytes(catalogue) / 1e9:.2f} GB beside activations")
    with narrator.stage("tune") as stage:
        batches = tokenize_probes(catalogue, used, SignatureSpec(), config.max_tokens)
        prepared = prepare_tuning(catalogue, batches, config)
        state = _read_state(state_file)
        with narrator.bar("steps") as report:

            def keep(reached: TuneState) -> None:
                buffer = io.BytesIO()
                np.savez(buffer, **reached.arrays())  # type: ignore[arg-type]
                write_atomically(state_file, buffer.getvalue())
                report(reached.num_steps, config.num_steps)

            state = tune_coefficients(prepared.model, prepared.batches, prepared.start, config, state, keep)
        (first, first_held), (_, held) = state.objectives[0], state.objectives[state.best_step]
        stage.result = (
            f"step {state.best_step} of {state.num_steps}: {config.objective} {first:.4f} -> "
            f"{state.objectives[state.best_step][0]:.4f}, held out {first_held:.4f} -> {held:.4f}"
        )
    path = out / RECIPE
    write_plan(path, resolve_plan(MergePlan(recipe=prepared.recipe(state.best)), catalogue))
    return path


def _read_state(file: Path) -> TuneState | None:
    from simmerge_ray.signals.tuning.tuner import TuneState

    if not file.exists():
        return None
    with np.load(file) as arrays:
        return TuneState.from_arrays(dict(arrays))
