"""`simmerge search`: label every pair with every arm, or look for the best merge that a budget allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.cli.places import PathOrUri, place_argument, place_option

if TYPE_CHECKING:
    from simmerge_ray.base.config import SearchConfig

_COST, _MODEL, _BEST = "Resources and limits", "Evaluation", "Search for the best merge (with --budget)"

# Options that `simmerge auto` has, too.
EvaluatorOption = Annotated[str, typer.Option(help="vllm or transformers", rich_help_panel=_MODEL)]
DtypeOption = Annotated[str, typer.Option(help="float32 or bfloat16", rich_help_panel=_MODEL)]
MaxModelLenOption = Annotated[
    int | None, typer.Option(min=8, help="longest prompt + answer in tokens", rich_help_panel=_MODEL)
]
MaxItemsOption = Annotated[
    int | None, typer.Option(min=1, help="items of each task, drawn by --seed", rich_help_panel=_MODEL)
]
SeedOption = Annotated[int, typer.Option(help="of the items drawn, and of proposals", rich_help_panel=_MODEL)]
RetryInfeasibleOption = Annotated[
    bool, typer.Option("--retry-infeasible", help="try merges again that could not be measured", rich_help_panel=_MODEL)
]
ConcurrencyOption = Annotated[
    int | None, typer.Option(min=1, help="engines at once; default: as many as fit", rich_help_panel=_COST)
]
CpusOption = Annotated[float, typer.Option(help="CPU cores of an engine or rank; they merge", rich_help_panel=_COST)]
GpusOption = Annotated[float, typer.Option(help="GPUs of an engine, or a share", rich_help_panel=_COST)]
TensorParallelOption = Annotated[int, typer.Option(min=1, help="ranks of an engine", rich_help_panel=_COST)]
ExecutorOption = Annotated[str, typer.Option(help="ranks: mp, one node; ray, several", rich_help_panel=_COST)]
# What they are called in a `SearchConfig`.
SHARED_NAMES = (
    "evaluator", "dtype", "max_model_len", "max_items", "seed", "retry_infeasible", "concurrency", "cpus_per_trial",
    "gpus_per_trial", "tensor_parallel", "executor",
)  # fmt: skip


def search(
    catalogue: Annotated[PathOrUri, place_argument(help="catalogue YAML: base and checkpoints")],
    out: Annotated[PathOrUri, place_option(help="directory of the label store")],
    tasks: Annotated[
        PathOrUri | None,
        place_option(help="directory of <task>.jsonl with prompt and target per line"),
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="e.g. linear or 'ties(density=0.2)'; repeatable")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="LEFT,RIGHT: a pair to leave out; repeatable")] = None,
    pairs: Annotated[str, typer.Option(help="cross-task or all")] = "cross-task",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, say what it takes, and stop")] = False,
    evaluator: EvaluatorOption = "vllm",
    dtype: DtypeOption = "float32",
    max_model_len: MaxModelLenOption = None,
    max_items: MaxItemsOption = None,
    seed: SeedOption = 0,
    retry_infeasible: RetryInfeasibleOption = False,
    lm_eval: Annotated[
        list[str] | None, typer.Option(help="task of lm-evaluation-harness; repeatable", rich_help_panel=_MODEL)
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option(help="directory of its task YAML files", rich_help_panel=_MODEL)
    ] = None,
    lm_eval_fewshot: Annotated[
        int | None, typer.Option(min=0, help="examples before a prompt", rich_help_panel=_MODEL)
    ] = None,
    concurrency: ConcurrencyOption = None,
    cpus_per_trial: CpusOption = 1.0,
    gpus_per_trial: GpusOption = 0.0,
    tensor_parallel: TensorParallelOption = 1,
    executor: ExecutorOption = "mp",
    max_trials: Annotated[int | None, typer.Option(min=1, help="stop after so many", rich_help_panel=_COST)] = None,
    max_hours: Annotated[float | None, typer.Option(help="stop after so long", rich_help_panel=_COST)] = None,
    max_gpu_hours: Annotated[float | None, typer.Option(help="GPU hours of all engines", rich_help_panel=_COST)] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="merges to try", rich_help_panel=_BEST)] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(help="mean, worst, a task, math=2,code=1; several: Pareto front", rich_help_panel=_BEST),
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe, cmaes or random", rich_help_panel=_BEST)] = "tpe",
    member: Annotated[
        list[str] | None, typer.Option(help="checkpoint to merge; repeatable; default: all", rich_help_panel=_BEST)
    ] = None,
    ways: Annotated[str, typer.Option(help="checkpoints of a merge: 2, or 2-4", rich_help_panel=_BEST)] = "2",
    layer_groups: Annotated[
        int, typer.Option(min=1, help="anchors of a weight over the model's depth", rich_help_panel=_BEST)
    ] = 1,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="parts of the items after which a bad trial stops", rich_help_panel=_BEST),
    ] = None,
    log: Annotated[Path, typer.Option("--log", help="where the output of libraries goes")] = Path("simmerge.log"),
) -> None:
    """Merge and evaluate every pair with every arm, or search for the best merge; labels that are there are kept.

    An interrupted search goes on with the same command.
    """
    config = _config(locals())
    # Names and files first: what is wrong with them is said before any library is loaded.
    from simmerge_ray.base.errors import TaskError
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.plans.operators.specs import parse_arms
    from simmerge_ray.search.evaluation import load_tasks
    from simmerge_ray.search.objectives import parse_objective
    from simmerge_ray.search.space import make_space

    parse_arms(config.arms)
    checkpoints = load_catalogue(catalogue)
    files = load_tasks(tasks) if tasks is not None else {}
    if not files and not lm_eval:
        raise TaskError("no tasks: name a directory with --tasks, or tasks of lm-evaluation-harness with --lm-eval")
    if budget is not None:
        make_space(checkpoints, config)
        for text in () if lm_eval else config.objectives:  # a group of lm-eval is several tasks: checked later
            parse_objective(text, files)
    from simmerge_ray.base.progress import narrated

    with narrated(log) as narrator:
        from simmerge_ray.pipelines.dataset import plan_search, search_stage

        if dry_run:
            _, estimate = plan_search(catalogue, tasks, out, config)
            for line in estimate.lines():
                narrator.console.print(line, highlight=False, soft_wrap=True, markup=False)
            return
        search_stage(catalogue, tasks, out, config, narrator)


def _config(given: dict[str, Any]) -> SearchConfig:
    """The options as they were given, by name.

    Raises:
        ConfigError: with every option that is wrong.
    """
    from simmerge_ray.base.config import SearchConfig, check_config
    from simmerge_ray.selector.planning.space import parse_ways

    names = (
        *SHARED_NAMES, "pairs", "lm_eval_include", "lm_eval_fewshot", "max_trials", "max_hours", "max_gpu_hours",
        "budget", "sampler", "layer_groups", "shards",
    )  # fmt: skip
    values: dict[str, Any] = {name: given[name] for name in names}
    excluded = [tuple(pair.split(",")) for pair in given["exclude"] or ()]
    values |= {"exclude": excluded, "ways": parse_ways(given["ways"])}
    values |= {"lm_eval": given["lm_eval"] or (), "members": given["member"] or ()}
    values |= {key: value for key, value in (("arms", given["arm"]), ("objectives", given["objective"])) if value}
    config = check_config(SearchConfig, values, "options")
    if config.lm_eval_include is not None:
        config = config.model_copy(update={"lm_eval_include": config.lm_eval_include.resolve()})
    return config
