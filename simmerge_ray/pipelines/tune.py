"""`simmerge tune` behind the command: checked inputs, a state to go on from, and the recipe as a plan file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.base.errors import ConfigError, PlanError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Place, digest_json
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue, write_catalogue
from simmerge_ray.checkpoints.probes import ProbeSet, load_probe_sets
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, resolve_plan, write_plan
from simmerge_ray.plans.recipe import Recipe, recipe_of

if TYPE_CHECKING:
    from simmerge_ray.signals.tuning.run import TuningJob

RECIPE = "recipe.json"


def tuning_sources(
    catalogue_path: Place, members: Sequence[str], probes: Place, needs_base: bool = True
) -> tuple[Catalogue, dict[str, ProbeSet]]:
    """The catalogue cut down to the members, and the probes; checked before any weight is read.

    Raises:
        ConfigError: no base, or fewer than two members. PlanError: an unknown member. ProbeError: see `check_members`.
    """
    from simmerge_ray.signals.candidates.retention import check_members

    whole, probe_sets = load_catalogue(catalogue_path), load_probe_sets(probes)
    chosen = tuple(whole.ref(member) for member in members) or whole.checkpoints
    catalogue = replace(whole, checkpoints=chosen)
    if catalogue.base is None and needs_base:
        raise ConfigError("coefficients are of task vectors: name the common ancestor under `base` in the catalogue")
    if len(chosen) < 2 or len(set(catalogue.ids)) < len(chosen):
        raise PlanError(f"tuning needs two or more different members, got {', '.join(catalogue.ids)}")
    check_members(catalogue, probe_sets)
    return catalogue, probe_sets


def tune_stage(
    catalogue: Catalogue,
    probe_sets: dict[str, ProbeSet],
    config: TuneConfig,
    out: Path,
    narrator: Narrator,
    start: Recipe | None = None,
) -> Path:
    """Tune, and write the recipe; what an interrupted run had reached is gone on from. Returns the recipe's path.

    In this process, or on the cluster where there is one already or a GPU is asked for.

    Args:
        start: recipe to start from (`signals.tuning.starts.check_start`), instead of the config's start.
    """
    from simmerge_ray.on_ray.resources import on_running_cluster

    job = tuning_job(catalogue, probe_sets, config, out, start)
    narrator.say(f"memory: about {job.num_bytes / 1e9:.2f} GB")
    with narrator.stage("tune") as stage:
        if config.gpus > 0 or on_running_cluster():
            from simmerge_ray.on_ray.tuning_tasks import run_tunings

            (tuned,) = run_tunings([job], config.gpus)
        else:
            from simmerge_ray.signals.tuning.run import run_tuning

            with narrator.bar("steps") as report:
                tuned = run_tuning(job, report=report)
        state = tuned.state
        (first, first_held), (reached, held) = state.objectives[0], state.objectives[state.best_step]
        stage.result = (
            f"step {state.best_step} of {state.num_steps}: {config.objective} {first:.4f} -> {reached:.4f}, "
            f"held out {first_held:.4f} -> {held:.4f}"
        )
    path = out / RECIPE
    write_plan(path, resolve_plan(MergePlan(recipe=tuned.recipe), catalogue))
    return path


def regmean_stage(
    catalogue: Catalogue, probe_sets: dict[str, ProbeSet], config: TuneConfig, out: Path, narrator: Narrator
) -> Path:
    """Gram matrices of every member, kept under their digests, and the recipe that uses them. Returns its path.

    `catalogue.yaml` beside it names them, for other commands. In this process, or on the cluster if there is one.
    """
    from simmerge_ray.on_ray.resources import on_running_cluster
    from simmerge_ray.signals.signature import SignatureSpec
    from simmerge_ray.signals.tokens import tokenize_probes
    from simmerge_ray.signals.tuning.grams import gram_jobs, with_grams, write_grams

    with narrator.stage("Gram matrices") as stage:
        batches = tokenize_probes(catalogue, _own_probes(catalogue, probe_sets), SignatureSpec(), config.max_tokens)
        jobs = gram_jobs(catalogue, batches, config.max_tokens, out.absolute() / "grams")
        if config.gpus > 0 or on_running_cluster():
            from simmerge_ray.on_ray.tuning_tasks import write_grams_on_ray

            write_grams_on_ray(jobs, config.gpus)
        else:
            for job in jobs:
                write_grams(job)
        stage.result = f"{len(jobs)} of {', '.join(catalogue.ids)} in {out / 'grams'}"
    known = with_grams(catalogue, jobs)
    write_catalogue(out / "catalogue.yaml", known)
    arm = make_arm("regmean", {"alpha": config.alpha})
    path = out / RECIPE
    write_plan(path, resolve_plan(MergePlan(recipe=recipe_of(arm, dict.fromkeys(known.ids, 1.0))), known))
    return path


def _own_probes(catalogue: Catalogue, probe_sets: dict[str, ProbeSet]) -> dict[str, ProbeSet]:
    own_tasks = {catalogue.own_task[member] for member in catalogue.ids}
    return {task: probe_sets[task] for task in sorted(filter(None, own_tasks))}


def tuning_job(
    catalogue: Catalogue, probe_sets: dict[str, ProbeSet], config: TuneConfig, out: Path, start: Recipe | None = None
) -> TuningJob:
    """What `run_tuning` and `run_tunings` take; its state file's name is the digest of all that it depends on.

    Raises:
        ProbeError: see `tokenize_probes`. ConfigError: see `starts.check_start`.
    """
    from simmerge_ray.signals.signature import SignatureSpec
    from simmerge_ray.signals.tokens import tokenize_probes
    from simmerge_ray.signals.tuning.run import TuningJob
    from simmerge_ray.signals.tuning.starts import check_start

    if start is not None:
        check_start(start, catalogue.ids)
    used = _own_probes(catalogue, probe_sets)
    content = [2, catalogue.digests(), {task: probes.digest for task, probes in used.items()}]
    content += [config.model_dump(mode="json"), start.to_json() if start else None]
    batches = tokenize_probes(catalogue, used, SignatureSpec(), config.max_tokens)
    state_file = out.absolute() / f"state-{digest_json(content)[:16]}.npz"  # an actor may run in another directory
    return TuningJob(catalogue, batches, config, state_file, start)
