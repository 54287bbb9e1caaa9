"""`simmerge plan`: rank merges of a catalogue, or the arms for one pair, without merging or evaluating anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.base.config import RankingConfig, RankingFiles
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import Output, Place, check_outputs
from simmerge_ray.cli.options import changed_options, with_config_options
from simmerge_ray.cli.places import PathOrUri, place_argument, place_option

if TYPE_CHECKING:
    from simmerge_ray.checkpoints.catalogue import Catalogue
    from simmerge_ray.selector.planning.recommender import Recommendation
    from simmerge_ray.selector.planning.request import PlanRequest
    from simmerge_ray.selector.planning.scorer import RankedPlan, Ranking
    from simmerge_ray.selector.planning.tasks import TaskPool
    from simmerge_ray.signals.table import SignalTable

_PAIR = "Arms for one pair"
_TOP = 10
_OF_A_PAIR = {"--selector", "--task"}  # options that count with --left and --right, too


@with_config_options
def plan(
    catalogue: Annotated[PathOrUri, place_argument(help="catalogue YAML")],
    files: RankingFiles,
    config: RankingConfig,
    out: Annotated[
        PathOrUri | None, place_option(help="directory for plan-1.json, ...; of a pair: the file for the safe choice")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="plans to show and to write")] = _TOP,
    left: Annotated[str | None, typer.Option(help="checkpoint id", rich_help_panel=_PAIR)] = None,
    right: Annotated[str | None, typer.Option(help="checkpoint id", rich_help_panel=_PAIR)] = None,
) -> None:
    """Rank the merges of a catalogue, or (--left, --right) the arms for one pair, without merging anything."""
    if (left is None) != (right is None):
        raise ConfigError("--left and --right name a pair: give both, or neither to rank the plans of the catalogue")
    pair = (left, right) if left is not None and right is not None else None
    given = [*changed_options(files), *changed_options(config), *(["--top"] if top != _TOP else [])]
    if pair and (ignored := [flag for flag in given if flag not in _OF_A_PAIR]):
        raise ConfigError(f"{', '.join(ignored)}: not for one pair; leave out --left and --right, or these options")
    if out is not None:
        check_outputs([Output(out, is_file=bool(pair))], {"CATALOGUE": catalogue})
    from simmerge_ray.checkpoints.catalogue import load_catalogue

    checkpoints = load_catalogue(catalogue)
    if pair:
        _plan_pair(checkpoints, files, pair, config.tasks, out)
    else:
        _plan_catalogue(checkpoints, files, config, top, out)


def _plan_catalogue(
    checkpoints: Catalogue, files: RankingFiles, config: RankingConfig, top: int, out: Place | None
) -> None:
    from simmerge_ray.selector.planning.files import default_selector, read_parents, write_plans
    from simmerge_ray.selector.planning.request import read_sources

    request = read_sources(files, checkpoints, config.propagator).request(config)
    ranking = request.rank(top)
    _print_ranking(ranking, request, read_parents(files.selector or default_selector()))
    if out is not None:
        paths = write_plans(out, ranking, checkpoints)
        typer.echo(f"{len(paths)} plans written to {out}; make the first with: simmerge merge {paths[0]} OUT")


def _print_ranking(ranking: Ranking, request: PlanRequest, parents: Mapping[str, Mapping[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    pool, num_plans = request.pool, request.space.num_plans()
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=False)
    shown = Table(title=f"predicted utility, {tasks_text(pool)}", title_justify="left")
    for column in ("", "plan", "predicted", "interval", "why"):
        numeric = column in ("", "predicted", "interval")
        shown.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for number, one in enumerate(ranking.plans, 1):
        shown.add_row(str(number), *_row(one))
    if ranking.best_fixed.plan.id != ranking.plans[0].plan.id:
        shown.add_section()
        shown.add_row("", *_row(ranking.best_fixed, "best fixed arm: "))
    console.print(shown)
    searched = "all" if ranking.width is None else f"of {num_plans} plans, a beam of width {ranking.width}:"
    lines = [
        f"{searched} {ranking.num_scored} scored by second_order, the first {ranking.num_reranked} ranked by "
        f"{ranking.plans[0].propagator}; interval: 95 % of the spread of the selector's ensemble; "
        f"ranked by the prediction less {request.config.caution:g} x the spread"
    ]
    if ranking.best_fixed.plan.id == ranking.plans[0].plan.id:
        lines.append("the first plan is that of the best fixed arm")
    lines += [f"approximate in the first plan: {line}" for line in ranking.plans[0].approximate]
    if len(pool.tasks) == 1:
        lines.append(best_single(pool.tasks[0], request.sources.table, parents))
    lines += trust_lines(request)
    for line in lines:
        console.print(line, soft_wrap=True)


def trust_lines(request: PlanRequest) -> list[str]:
    """How far the predictions can be relied on: has choosing paid, and does the selector know such checkpoints?"""
    from simmerge_ray.plans.keeping import keeps

    selector, ids = request.sources.selector, request.space.ids
    fixed, lines = selector.best_fixed, []
    if selector.override.never:
        lines.append(
            f"to leave the best fixed arm, {fixed}, has not paid on checkpoints that were left out: where the first "
            "plan has other arms, measure it beside that of the best fixed arm (`simmerge auto` does)"
        )
    if keeps(selector.arms):
        lines.append(
            "these are merges; of a pair (--left, --right) the selector also says whether to keep one of them instead"
        )
    unlike, num = len(request.unlike_pairs()), len(ids) * (len(ids) - 1) // 2
    if unlike:
        lines.append(
            f"{unlike} of {num} pairs are unlike the checkpoints that the selector was trained on: of merges with them "
            f"it knows little; the best fixed arm, {fixed}, is the safe choice"
        )
    return lines


def tasks_text(pool: TaskPool) -> str:
    if pool.own is not None:
        return f"{'worst of' if pool.objective.name == 'worst' else 'mean over'} the members' own tasks"
    if len(pool.tasks) == 1:
        return pool.tasks[0]
    return f"{pool.objective.name} of {', '.join(pool.tasks)}"


def _row(one: RankedPlan, prefix: str = "") -> tuple[str, str, str, str]:
    from simmerge_ray.plans.plan import fold_text

    low, high = one.interval
    why = ", ".join(f"{group} {change:+.3f}" for group, change in one.why)
    return prefix + fold_text(one.plan), f"{one.utility:.3f}", f"{low:.3f}-{high:.3f}", why


def best_single(task: str, table: SignalTable, parents: Mapping[str, Mapping[str, float]]) -> str:
    """For one task the best "merge" is often a checkpoint alone: which one, as measured, else by its probes' loss."""
    measured = {name: u for name, u in parents.get(task, {}).items() if name in table.checkpoint_ids}
    unknown = [name for name in table.checkpoint_ids if name not in measured]
    if measured:
        best = max(sorted(measured), key=lambda name: measured[name])
        rest = f"; not measured: {', '.join(unknown)}" if unknown else ""
        return f"best single checkpoint on {task}: {best}, measured {measured[best]:.3f}{rest}"
    loss = {
        left: row.features["loss_left"]
        for (left, _, of), row in table.rows.items()
        if of == task and left in table.checkpoint_ids
    }
    best = min(sorted(loss), key=lambda name: loss[name])
    return (
        f"no checkpoint was measured alone on {task}; {best} has the lowest loss there, {loss[best]:.3f} nats: "
        "measure it before you merge"
    )


def _plan_pair(
    checkpoints: Catalogue, files: RankingFiles, pair: tuple[str, str], tasks: Sequence[str], out: Place | None
) -> None:
    """Rank the arms for one pair, say which to take and why, and write the plan of that one."""
    from rich.console import Console

    from simmerge_ray.plans.keeping import arm_plan
    from simmerge_ray.plans.plan import resolve_plan, write_plan
    from simmerge_ray.selector.planning.files import default_selector
    from simmerge_ray.selector.planning.recommender import Recommender
    from simmerge_ray.selector.planning.request import check_unchanged

    left, right = pair
    recommender = Recommender.load(files.selector or default_selector(), files.signals)
    check_unchanged(checkpoints, recommender.table, pair)
    answer = recommender.recommend(left, right, tasks)
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(_pair_table(answer, recommender.selector.best_fixed, f"{left} + {right}"))
    for line in _pair_lines(answer):
        console.print(line, soft_wrap=True)
    if out is not None:
        resolved = resolve_plan(arm_plan(left, right, answer.choice.arm), checkpoints)
        write_plan(out, resolved, answer.chosen.predicted)
        what = "make it" if resolved.plan.is_merge else "no merge is needed; copy the checkpoint"
        typer.echo(f"plan written to {out}; {what} with: simmerge merge {out} OUT")


def _pair_table(answer: Recommendation, best_fixed: str, title: str) -> Any:
    """Predictions, best first; `*` marks the safe choice, which need not be the first."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    intervals = any(row.interval for row in answer.ranked)
    columns = ("", "arm", "predicted utility", "sd", *(["interval"] if intervals else []), *answer.ranked[0].by_task)
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "arm") else "right")
    for row in answer.ranked:
        name = f"{row.arm} (best fixed)" if row.arm == best_fixed else row.arm
        interval = ["{:.3f}-{:.3f}".format(*row.interval)] if row.interval else []
        by_task = [f"{u:.3f}" for u, _ in row.by_task.values()]
        mark = "*" if row.arm == answer.choice.arm else ""
        table.add_row(mark, name, f"{row.utility:.3f}", f"{row.sd:.3f}", *interval, *by_task)
    return table


def _pair_lines(answer: Recommendation) -> list[str]:
    lines = [f"* take {answer.choice.arm}: {answer.choice.reason}"]
    if answer.ranked[0].interval:
        known = answer.choice.distance <= answer.limit
        lines.append(
            f"interval: {100 * answer.level:g} % of the merges of checkpoints that were left out of the training "
            f"measured within it{'' if known else '; that says nothing of checkpoints unlike those'}"
        )
    return lines
