"""`simmerge auto`: from a catalogue to the best of the merges that are predicted to be good, or to "keep this one"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.base.config import EngineConfig, SearchConfig
from simmerge_ray.base.errors import ConfigError, TaskError
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import PathOrUri, place_argument, place_option
from simmerge_ray.cli.plan import (
    AggregateOption,
    ArmOption,
    BudgetOption,
    CautionOption,
    ExcludeOption,
    MustContainOption,
    ObjectiveOption,
    ProbesOption,
    PropagatorOption,
    SelectorOption,
    ShortlistOption,
    SignalsOption,
    SignaturesOption,
    WaysOption,
    WeightingOption,
    check_names,
    plan_request,
)

if TYPE_CHECKING:
    from simmerge_ray.base.storage import Place
    from simmerge_ray.checkpoints.catalogue import Catalogue


@with_config_options
def auto(
    catalogue: Annotated[PathOrUri, place_argument(help="catalogue YAML: base and checkpoints")],
    signals: SignalsOption,
    tasks: Annotated[
        PathOrUri,
        place_option(help="directory of <task>.jsonl with prompt and target per line"),
    ],
    out: Annotated[Path, typer.Option(help="directory for labels, plans, the answer and the merge")],
    engine: EngineConfig,
    selector: SelectorOption = None,
    task: Annotated[
        list[str] | None, typer.Option(help="count on these tasks; default: all own tasks; repeatable")
    ] = None,
    evaluate: Annotated[int, typer.Option(min=1, help="merges to measure, those predicted to be best")] = 5,
    write: Annotated[bool, typer.Option(help="write a merge that is the answer to OUT/merged")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="rank, say what would be measured, and stop")] = False,
    ways: WaysOption = "2-3",
    must_contain: MustContainOption = None,
    exclude: ExcludeOption = None,
    arm: ArmOption = None,
    weighting: WeightingOption = "equal",
    objective: ObjectiveOption = "mean",
    propagator: PropagatorOption = "virtual",
    signatures: SignaturesOption = None,
    probes: ProbesOption = None,
    budget: BudgetOption = 1_000_000,
    shortlist: ShortlistOption = 500,
    caution: CautionOption = 1.0,
    aggregate: AggregateOption = "last",
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Rank the merges of a catalogue, measure the first few beside the checkpoints, and make the best, if it is better.

    An interrupted run goes on with the same command.
    """
    ranked_names = (
        "task", "evaluate", "ways", "must_contain", "exclude", "arm", "weighting", "objective", "propagator", "budget",
        "shortlist", "caution", "aggregate",
    )  # fmt: skip
    given = locals()
    ranked_by = {name: given[name] for name in ranked_names}
    config = SearchConfig(**engine.model_dump(), pairs="all")
    chosen_ways = check_names(ways, propagator, probes)
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.search.evaluation import load_tasks

    checkpoints = load_catalogue(catalogue)
    files = load_tasks(tasks)
    request = plan_request(
        checkpoints, selector, signals, counted_tasks(checkpoints, task or (), objective), chosen_ways,
        must_contain or (), exclude or (), arm or (), weighting, objective, propagator, signatures, probes,
    )  # fmt: skip
    for name in request.pool.tasks:
        if name not in files:
            raise TaskError(
                f"{tasks} has no {name}.jsonl, which says what is measured on {name!r}; known: {_list(files)}"
            )
    counted = {name: files[name].sampled(config.max_items, config.seed) for name in request.pool.tasks}
    from simmerge_ray.base.progress import narrated
    from simmerge_ray.base.storage import Manifest, digest_file

    with narrated(log) as narrator:
        from simmerge_ray.pipelines.auto import auto_stage, check_auto, dry_run_lines

        study = check_auto(checkpoints, counted, config, out, write)
        with narrator.stage("rank") as stage:
            ranking = request.scorer.rank(request.space, request.pool, evaluate, budget, shortlist, aggregate, caution)
            ranking = ranking.with_best_fixed()
            stage.result = f"{ranking.num_scored} merges scored, {len(ranking.plans)} to be measured"
        if dry_run:
            for line in dry_run_lines(study, ranking, checkpoints.own_task, out):
                narrator.console.print(line, highlight=False, soft_wrap=True, markup=False)
            return
        inputs = {f"task {key}": one.digest for key, one in counted.items()} | {"signals": digest_file(signals)}
        inputs |= _digests_of(checkpoints, request.directory)
        manifest = Manifest("auto", {"ranking": ranked_by, "search": config.content()}, inputs)
        auto_stage(checkpoints, counted, request.pool.objective, ranking, config, out, narrator, manifest, write)


def _digests_of(checkpoints: Catalogue, selector: Place) -> dict[str, str]:
    """Digests of all checkpoints and of a selector's files, by what a manifest calls them."""
    from simmerge_ray.base.storage import digest_file, local_directory

    found = {f"checkpoint {key}": value for key, value in checkpoints.digests().items()}
    with local_directory(selector) as directory:
        files = sorted(directory.rglob("*.safetensors"))
        return found | {f"selector {file.relative_to(directory)}": digest_file(file) for file in files}


def counted_tasks(checkpoints: Catalogue, tasks: Sequence[str], objective: str) -> tuple[str, ...]:
    """The tasks that everything is measured on: those named, those of the objective, or all own tasks.

    Merges of different checkpoints are compared with each other and with checkpoints, so the members' own tasks, as
    `simmerge plan` counts them, will not do.

    Raises:
        ConfigError: no checkpoint has a task of its own.
    """
    from simmerge_ray.search.objectives import MEAN, WORST

    if tasks or objective not in (MEAN, WORST):
        return tuple(tasks)
    own = sorted({name for name in checkpoints.own_task.values() if name})
    if not own:
        raise ConfigError("the checkpoints of the catalogue have no 'task'; name the tasks that count with --task")
    return tuple(own)


def _list(names: Any) -> str:
    return ", ".join(sorted(names))
