"""`simmerge plan`: rank merges of a catalogue, or the arms for one pair, without merging or evaluating anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.base.config import RankingConfig, RankingFiles
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import Output, Place, check_outputs
from simmerge_ray.base.tables import Column, TextTable
from simmerge_ray.cli.options import changed_options, with_config_options
from simmerge_ray.cli.places import PathOrUri, place_argument, place_option
from simmerge_ray.cli.shown import JsonOption, Shown, WideOption

if TYPE_CHECKING:
    from simmerge_ray.base.progress import Narrator
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
    wide: WideOption = False,
    as_json: JsonOption = False,
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

    checkpoints, shown = load_catalogue(catalogue), Shown(None, wide, as_json)
    with shown.narrated() as narrator:
        if pair:
            result = _plan_pair(checkpoints, files, pair, config.tasks, out, narrator)
        else:
            result = _plan_catalogue(checkpoints, files, config, top, out, narrator)
    shown.result(result)


def _plan_catalogue(
    checkpoints: Catalogue, files: RankingFiles, config: RankingConfig, top: int, out: Place | None, narrator: Narrator
) -> dict[str, Any]:
    from simmerge_ray.selector.planning.files import default_selector, ranking_json, read_parents, write_plans
    from simmerge_ray.selector.planning.request import read_sources

    request = read_sources(files, checkpoints, config.propagator).request(config)
    warnings = trust_lines(request, files.selector)
    narrator.print_lines(warnings)
    with narrator.bar("steps of merges looked at") as report:
        ranking = request.rank(top, report)
    _print_ranking(ranking, request, read_parents(files.selector or default_selector()), narrator)
    if out is not None:
        paths = write_plans(out, ranking, checkpoints)
        told = f"{len(paths)} plans written to {out}; make the first with: simmerge merge {paths[0]} OUT"
        narrator.print_lines([told])
    return {"selector": warnings[0], "warnings": warnings[1:]} | ranking_json(ranking)


def _print_ranking(
    ranking: Ranking, request: PlanRequest, parents: Mapping[str, Mapping[str, float]], narrator: Narrator
) -> None:
    pool, num_plans = request.pool, request.space.num_plans()
    rows = [(str(number), *_row(one)) for number, one in enumerate(ranking.plans, 1)]
    if ranking.best_fixed.plan.id != ranking.plans[0].plan.id:
        rows.append(("", *_row(ranking.best_fixed, "best fixed arm: ")))
    columns = [
        Column(""), Column("plan"), Column("predicted", right=True), Column("interval", right=True),
        Column("why", optional=True),
    ]  # fmt: skip
    narrator.table(TextTable(f"predicted utility, {tasks_text(pool)}", columns, rows))
    searched = "all" if ranking.width is None else f"of {num_plans} plans, a beam of width {ranking.width}:"
    lines = [
        f"{searched} {ranking.num_scored} scored by second_order, the first {ranking.num_reranked} ranked by "
        f"{ranking.plans[0].propagator}; interval: 95 % of the spread of the selector's ensemble and of the labels' "
        f"error; ranked by the prediction less {request.config.caution:g} x the spread"
    ]
    if all(one.unlike for one in ranking.plans):
        lines = []
    elif ranking.best_fixed.plan.id == ranking.plans[0].plan.id:
        lines.append("the first plan is that of the best fixed arm")
    lines += [f"approximate in the first plan: {line}" for line in ranking.plans[0].approximate]
    lines.append(best_singles(pool, tuple(ranking.plans[0].by_task), request.sources.table, parents))
    narrator.print_lines(lines)


def trust_lines(request: PlanRequest, path: Place | None = None) -> list[str]:
    """What comes before any number: which selector speaks, does it know such checkpoints, and has choosing paid?

    Args:
        path: of the selector; None for the packaged one.
    """
    from simmerge_ray.plans.keeping import keeps
    from simmerge_ray.selector.planning.files import speaker

    selector, ids = request.sources.selector, request.space.ids
    fixed, lines = selector.best_fixed, [speaker(path, selector)]
    unlike, num = len(request.unlike_pairs), len(request.looked_at)
    drawn = "" if num == len(ids) * (len(ids) - 1) // 2 else ", drawn evenly from all,"
    if unlike:
        lines.append(
            f"warning: {unlike} of {num} pairs{drawn} are unlike the checkpoints that the selector was trained on: "
            f"for merges with them no number is shown and their order says nothing; the best fixed arm, {fixed}, is "
            "the safe choice, and `simmerge auto` chooses without a selector"
        )
    if selector.override.never:
        lines.append(
            f"best fixed arm {fixed}: {selector.override.why_never}; where the first plan has other arms, measure it "
            "beside that of the best fixed arm"
        )
    if keeps(selector.arms):
        lines.append(
            "these are merges; of a pair (--left, --right) the selector also says whether to keep one of them instead"
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

    if one.unlike:
        return prefix + fold_text(one.plan), "not known", "", ""
    low, high = one.interval
    why = ", ".join(f"{group} {change:+.3f}" for group, change in one.why)
    return prefix + fold_text(one.plan), f"{one.utility:.3f}", f"{low:.3f}-{high:.3f}", why


def best_singles(
    pool: TaskPool, tasks: Sequence[str], table: SignalTable, parents: Mapping[str, Mapping[str, float]]
) -> str:
    """The best checkpoint as it is on the tasks that the first plan counts on, as far as they were measured there."""
    if len(pool.tasks) == 1:
        return best_single(pool.tasks[0], table, parents)
    worth = {
        name: pool.objective.value({task: parents[task][name] for task in tasks})
        for name in table.checkpoint_ids
        if all(name in parents.get(task, {}) for task in tasks)
    }
    if not worth:
        return (
            "what a checkpoint as it is reaches on these tasks, the base too, is not known here, and it is often more "
            "than a merge: `simmerge auto --tasks DIR --evaluate N` measures both on the same items"
        )
    best = max(sorted(worth), key=lambda name: worth[name])
    return (
        f"best single checkpoint of {len(worth)} measured on the first plan's tasks, {', '.join(tasks)}: {best}, "
        f"{worth[best]:.3f}; the base was not among them"
    )


def best_single(task: str, table: SignalTable, parents: Mapping[str, Mapping[str, float]]) -> str:
    """For one task the best "merge" is often a checkpoint alone: which one, as measured, else by its probes' loss."""
    measured = {name: u for name, u in parents.get(task, {}).items() if name in table.checkpoint_ids}
    unknown = [name for name in table.checkpoint_ids if name not in measured]
    if measured:
        best = max(sorted(measured), key=lambda name: measured[name])
        rest = f"; not measured: {', '.join(unknown)}" if unknown else ""
        return f"best single checkpoint on {task}: {best}, measured {measured[best]:.3f}{rest}"
    loss = table.single("loss", task)
    best = min(sorted(loss), key=lambda name: loss[name])
    return (
        f"no checkpoint was measured alone on {task}; {best} has the lowest loss there, {loss[best]:.3f} nats: "
        "measure it before you merge"
    )


def _plan_pair(
    checkpoints: Catalogue,
    files: RankingFiles,
    pair: tuple[str, str],
    tasks: Sequence[str],
    out: Place | None,
    narrator: Narrator,
) -> dict[str, Any]:
    """Rank the arms for one pair, say which to take and why, and write the plan of that one."""
    from simmerge_ray.plans.keeping import arm_plan
    from simmerge_ray.plans.plan import resolve_plan, write_plan
    from simmerge_ray.selector.planning.files import default_selector, speaker
    from simmerge_ray.selector.planning.recommender import Recommender
    from simmerge_ray.selector.planning.request import check_unchanged

    left, right = pair
    recommender = Recommender.load(files.selector or default_selector(), files.signals)
    check_unchanged(checkpoints, recommender.table, pair)
    answer = recommender.recommend(left, right, tasks)
    said = speaker(files.selector, recommender.selector)
    narrator.print_lines([said, f"* take {answer.choice.arm}: {answer.choice.reason}"])
    if answer.known:
        narrator.table(_pair_table(answer, recommender.selector.best_fixed, f"{left} + {right}"))
        narrator.print_lines(_pair_lines(answer))
    if out is not None:
        resolved = resolve_plan(arm_plan(left, right, answer.choice.arm), checkpoints)
        write_plan(out, resolved, answer.predicted)
        what = "make it" if resolved.plan.is_merge else "no merge is needed; copy the checkpoint"
        narrator.print_lines([f"plan written to {out}; {what} with: simmerge merge {out} OUT"])
    told = ("arm", "utility", "sd", "interval", "by_task")
    arms = [{name: getattr(one, name) for name in told} for one in answer.ranked] if answer.known else []
    return {"selector": said, "pair": pair, "choice": asdict(answer.choice), "limit": answer.limit, "arms": arms}


def _pair_table(answer: Recommendation, best_fixed: str, title: str) -> TextTable:
    """Predictions, best first; `*` marks the safe choice, which need not be the first."""
    by_task = tuple(answer.ranked[0].by_task)
    columns = [Column(""), Column("arm"), *(Column(name, right=True) for name in ("predicted utility", "interval"))]
    columns += [Column(name, right=True, optional=True) for name in ("sd", *by_task)]
    rows = []
    for row in answer.ranked:
        name = f"{row.arm} (best fixed)" if row.arm == best_fixed else row.arm
        interval = "{:.3f}-{:.3f}".format(*row.interval) if row.interval else ""
        values = [f"{u:.3f}" for u, _ in row.by_task.values()]
        mark = "*" if row.arm == answer.choice.arm else ""
        rows.append([mark, name, f"{row.utility:.3f}", interval, f"{row.sd:.3f}", *values])
    return TextTable(title, columns, rows)


def _pair_lines(answer: Recommendation) -> list[str]:
    if not answer.ranked[0].interval:
        return []
    return [
        f"interval: {100 * answer.level:g} % of the merges of checkpoints that were left out of the training "
        "measured within it; never narrower than the labels' own error"
    ]
