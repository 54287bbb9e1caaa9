"""`simmerge plan`: rank merges of a catalogue, or the arms for one pair, without merging or evaluating anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.base.errors import ConfigError, PlanError, SelectorError, unknown_name
from simmerge_ray.cli.places import PathOrUri, place_argument, place_option

if TYPE_CHECKING:
    from simmerge_ray.checkpoints.catalogue import Catalogue
    from simmerge_ray.selector.models.model import Selector
    from simmerge_ray.selector.planning.recommender import Recommendation
    from simmerge_ray.selector.planning.scorer import PlanScorer, RankedPlan, Ranking
    from simmerge_ray.selector.planning.space import PlanSpace
    from simmerge_ray.selector.planning.tasks import TaskPool
    from simmerge_ray.signals.propagation.interface import Propagator
    from simmerge_ray.signals.table import SignalTable

_SPACE, _SCORING, _PAIR = "Which plans", "How they are scored", "Arms for one pair"


# Options that `simmerge auto` has, too.
SelectorOption = Annotated[
    PathOrUri | None, place_option(help="directory that `simmerge train` wrote; default: the one in the package")
]
SignalsOption = Annotated[PathOrUri, place_option(help="signal table (Parquet)")]
WaysOption = Annotated[str, typer.Option(help="checkpoints of a merge: 2, or 2-4", rich_help_panel=_SPACE)]
MustContainOption = Annotated[list[str] | None, typer.Option(help="checkpoint id; repeatable", rich_help_panel=_SPACE)]
ExcludeOption = Annotated[list[str] | None, typer.Option(help="checkpoint id; repeatable", rich_help_panel=_SPACE)]
ArmOption = Annotated[
    list[str] | None,
    typer.Option(help="choose from these, e.g. 'ties(density=0.2)'; default: all known", rich_help_panel=_SPACE),
]
WeightingOption = Annotated[
    str, typer.Option(help="equal: every member counts the same; halving", rich_help_panel=_SPACE)
]
ObjectiveOption = Annotated[str, typer.Option(help="mean, worst, a task, or math=2,code=1", rich_help_panel=_SCORING)]
PropagatorOption = Annotated[
    str, typer.Option(help="ranks the shortlist: second_order, virtual, curved, exact", rich_help_panel=_SCORING)
]
SignaturesOption = Annotated[
    str | None, typer.Option(help="default: `signatures` beside the table", rich_help_panel=_SCORING)
]
ProbesOption = Annotated[
    PathOrUri | None, place_option(help="probe files, for curved and exact", rich_help_panel=_SCORING)
]
BudgetOption = Annotated[
    int, typer.Option(min=1, help="plans; if there are more, a beam of about so many", rich_help_panel=_SCORING)
]
ShortlistOption = Annotated[int, typer.Option(min=1, help="plans that the propagator ranks", rich_help_panel=_SCORING)]
CautionOption = Annotated[
    float, typer.Option(min=0, help="rank by the prediction less so many spreads", rich_help_panel=_SCORING)
]
AggregateOption = Annotated[str, typer.Option(help="last step, mean or sum over steps", rich_help_panel=_SCORING)]


def plan(
    signals: SignalsOption,
    catalogue: Annotated[PathOrUri | None, place_argument(metavar="CATALOGUE", help="catalogue YAML")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="count on these tasks; default: the members' own; repeatable")
    ] = None,
    selector: SelectorOption = None,
    out: Annotated[
        PathOrUri | None, place_option(help="directory for plan-1.json, ...; of a pair: the file for the safe choice")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="plans to show and to write")] = 10,
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
    left: Annotated[str | None, typer.Option(help="checkpoint id", rich_help_panel=_PAIR)] = None,
    right: Annotated[str | None, typer.Option(help="checkpoint id", rich_help_panel=_PAIR)] = None,
    catalogue_option: Annotated[
        PathOrUri | None, place_option("--catalogue", help="the same as CATALOGUE", rich_help_panel=_PAIR)
    ] = None,
) -> None:
    """Rank the merges of a catalogue, or (--left, --right) the arms for one pair, without merging anything."""
    if (catalogue is None) == (catalogue_option is None):
        raise ConfigError("give the catalogue once: `simmerge plan catalogue.yaml ...`")
    path = catalogue or catalogue_option
    assert path is not None
    if (left is None) != (right is None):
        raise ConfigError("--left and --right name a pair: give both, or neither to rank the plans of the catalogue")
    if left is not None and right is not None:
        plan_pair(path, selector, signals, left, right, task or (), out)
        return
    from simmerge_ray.checkpoints.catalogue import load_catalogue

    # Names first, then files, from small to large: what is wrong is said before anything is computed.
    chosen_ways = check_names(ways, propagator, probes)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; plans go into a directory")
    request = plan_request(
        load_catalogue(path), selector, signals, task or (), chosen_ways, must_contain or (), exclude or (), arm or (),
        weighting, objective, propagator, signatures, probes,
    )  # fmt: skip
    ranking = request.scorer.rank(request.space, request.pool, top, budget, shortlist, aggregate, caution)
    _print_ranking(ranking, request, caution)
    if out is not None:
        from simmerge_ray.selector.planning.files import write_plans

        paths = write_plans(out, ranking, request.checkpoints)
        typer.echo(f"{len(paths)} plans written to {out}; make the first with: simmerge merge {paths[0]} OUT")


@dataclass(frozen=True)
class PlanRequest:
    """Plans to be ranked, checked against the artifacts that they need. directory: of the selector."""

    directory: PathOrUri
    selector: Selector
    checkpoints: Catalogue
    table: SignalTable
    space: PlanSpace
    pool: TaskPool
    scorer: PlanScorer


def check_names(ways: str, propagator: str, probes: PathOrUri | None) -> tuple[int, int]:
    """What can be checked of the options before any file is read; the fewest and most checkpoints of a merge.

    Raises:
        ConfigError: saying which option.
    """
    from simmerge_ray.base.config import parse_ways
    from simmerge_ray.signals.propagation.interface import NAMES

    chosen_ways = parse_ways(ways)
    if propagator not in NAMES:
        raise ConfigError(unknown_name("propagator", propagator, NAMES))
    if propagator in ("curved", "exact") and probes is None:
        raise ConfigError(f"propagator {propagator!r} runs the probes; give --probes, the directory of the signals'")
    return chosen_ways


def plan_request(
    checkpoints: Catalogue,
    selector: PathOrUri | None,
    signals: PathOrUri,
    tasks: Sequence[str],
    ways: tuple[int, int],
    must_contain: Sequence[str],
    exclude: Sequence[str],
    arms: Sequence[str],
    weighting: str,
    objective: str,
    propagator: str,
    signatures: str | None,
    probes: PathOrUri | None,
) -> PlanRequest:
    """Read what a ranking needs.

    Args:
        selector: its directory; None takes the one in the package.

    Raises:
        InputError: an artifact is missing or does not fit, or a name is unknown; nothing has been computed.
    """
    from simmerge_ray.selector.models.model import read_selector
    from simmerge_ray.selector.planning.files import SHORTLIST, default_selector
    from simmerge_ray.selector.planning.space import plan_space, scorable_arms
    from simmerge_ray.selector.planning.tasks import task_pool
    from simmerge_ray.signals.table import read_signal_table

    directory = selector or default_selector()
    if not directory.exists():
        read_selector(directory)  # it raises, and says what makes one
    first = _shortlist(directory / SHORTLIST)
    second = first if propagator == "second_order" else read_selector(directory)
    table = read_signal_table(signals)
    trained, given = (one.get("weights", "exact") for one in (second.provenance, table.provenance))
    if trained != given:
        raise SelectorError(
            f"the selector was trained with {trained} weight signals, the table has {given} ones; "
            f"compute it with --weights {trained}"
        )
    _check_catalogue(checkpoints, table)
    chosen = scorable_arms(arms, second.arms, checkpoints.base is not None)
    space = plan_space(checkpoints.ids, chosen, ways, weighting, must_contain, exclude)
    pool = task_pool(objective, tasks, table.tasks, table.checkpoint_ids, checkpoints.own_task)

    from simmerge_ray.selector.planning.scorer import PlanScorer

    scorer = PlanScorer(table, _propagator(propagator, table, checkpoints, probes, signatures, signals), second, first)
    return PlanRequest(directory, second, checkpoints, table, space, pool, scorer)


def _shortlist(path: PathOrUri) -> Any:
    from simmerge_ray.selector.models.model import read_selector

    try:
        return read_selector(path)
    except SelectorError:
        if path.exists():
            raise
        raise SelectorError(
            f"no selector of the shortlist at {path}; `simmerge train` writes one with the selector: train again"
        ) from None


def _check_catalogue(checkpoints: Catalogue, table: SignalTable) -> None:
    """Refuse a table of other checkpoints, or of other contents under their names.

    Raises:
        PlanError: naming a checkpoint.
    """
    known = table.provenance["checkpoints"]
    for ref in checkpoints.all_refs:
        if ref.id not in known:
            raise PlanError(f"checkpoint {ref.id!r} is not in the signal table; `simmerge signals` on this catalogue")
    for name, digest in checkpoints.digests().items():
        if known[name] != digest:
            raise PlanError(f"checkpoint {name!r} has changed since its signals; run `simmerge signals` again")


def _propagator(
    name: str,
    table: SignalTable,
    checkpoints: Catalogue,
    probes: PathOrUri | None,
    signatures: str | None,
    signals: PathOrUri,
) -> Propagator:
    """Build a propagator with what it needs, and no more."""
    from simmerge_ray.signals.propagation.bound import Bound
    from simmerge_ray.signals.propagation.second_order import SecondOrder

    if name == "bound":
        return Bound(table)
    if name == "second_order":
        return SecondOrder(table)
    from simmerge_ray.signals.propagation.evidence import read_evidence, stored_evidence
    from simmerge_ray.signals.propagation.table import PROPAGATORS
    from simmerge_ray.signals.signature import SignatureStore

    store = SignatureStore(signatures or str(signals.parent / "signatures"))
    if probes is None:
        return PROPAGATORS[name](stored_evidence(table, checkpoints, store))
    from simmerge_ray.checkpoints.probes import load_probe_sets

    return PROPAGATORS[name](read_evidence(table, checkpoints, load_probe_sets(probes), store))


def _print_ranking(ranking: Ranking, request: PlanRequest, caution: float) -> None:
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
        f"ranked by the prediction less {caution:g} x the spread"
    ]
    if ranking.best_fixed.plan.id == ranking.plans[0].plan.id:
        lines.append("the first plan is that of the best fixed arm")
    lines += [f"approximate in the first plan: {line}" for line in ranking.plans[0].approximate]
    if len(pool.tasks) == 1:
        lines.append(best_single(pool.tasks[0], request.table, _parents(request.directory)))
    lines += trust_lines(request)
    for line in lines:
        console.print(line, soft_wrap=True)


def trust_lines(request: PlanRequest) -> list[str]:
    """How far the predictions can be relied on: has choosing paid, and does the selector know such checkpoints?"""
    from simmerge_ray.selector.models.novelty import unlike_pairs

    selector, ids = request.selector, request.space.ids
    fixed, lines = selector.best_fixed, []
    if selector.override.never:
        lines.append(
            f"to leave the best fixed arm, {fixed}, has not paid on checkpoints that were left out: where the first "
            "plan has other arms, measure it beside that of the best fixed arm (`simmerge auto` does)"
        )
    unlike, num = len(unlike_pairs(selector, request.table, ids, request.pool)), len(ids) * (len(ids) - 1) // 2
    if unlike:
        lines.append(
            f"{unlike} of {num} pairs are unlike the checkpoints that the selector was trained on: of merges with them "
            f"it knows little; the best fixed arm, {fixed}, is the safe choice"
        )
    return lines


def tasks_text(pool: TaskPool) -> str:
    if pool.own is not None:
        return (
            "worst of the members' own tasks" if pool.objective.name == "worst" else "mean over the members' own tasks"
        )
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


def _parents(selector: PathOrUri) -> Mapping[str, Mapping[str, float]]:
    import json

    from simmerge_ray.selector.planning.files import PARENTS

    path = selector / PARENTS
    return json.loads(path.read_text()) if path.exists() else {}


def plan_pair(
    catalogue: PathOrUri,
    selector: PathOrUri | None,
    signals: PathOrUri,
    left: str,
    right: str,
    tasks: Sequence[str],
    out: PathOrUri | None,
) -> None:
    """Rank the arms for one pair, say which to take and why, and write the plan of that one."""
    from rich.console import Console

    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.plans.operators.specs import parse_arm
    from simmerge_ray.plans.plan import pair_plan, resolve_plan, write_plan
    from simmerge_ray.selector.planning.files import default_selector
    from simmerge_ray.selector.planning.recommender import Recommender

    checkpoints = load_catalogue(catalogue)
    recommender = Recommender.load(selector or default_selector(), signals)
    answer = recommender.recommend(left, right, tasks)
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(_pair_table(answer, recommender.best_fixed, f"{left} + {right}"))
    for line in _pair_lines(answer):
        console.print(line, soft_wrap=True)
    if out is not None:
        resolved = resolve_plan(pair_plan(left, right, parse_arm(answer.choice.arm)), checkpoints)
        write_plan(out, resolved, answer.chosen.predicted)
        typer.echo(f"plan written to {out}; make it with: simmerge merge {out} OUT")


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
