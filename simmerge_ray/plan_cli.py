"""`simmerge plan`: rank merges of a catalogue, or the arms for one pair, without merging or evaluating anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.errors import ConfigError, PlanError, SelectorError, unknown_name

if TYPE_CHECKING:
    from simmerge_ray.catalogue import Catalogue
    from simmerge_ray.plans import MergePlan
    from simmerge_ray.propagation.interface import Propagator
    from simmerge_ray.selector.plan_tasks import TaskPool
    from simmerge_ray.selector.scorer import RankedPlan, Ranking
    from simmerge_ray.signals.table import SignalTable

_SPACE, _SCORING, _PAIR = "Which plans", "How they are scored", "Arms for one pair"


def plan(
    selector: Annotated[Path, typer.Option(help="directory that `simmerge train` wrote")],
    signals: Annotated[Path, typer.Option(help="signal table (Parquet)")],
    catalogue: Annotated[Path | None, typer.Argument(metavar="CATALOGUE", help="catalogue YAML")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="count on these tasks; default: the members' own; repeatable")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="directory for plan-1.json, ...; of a pair: the file for the best plan")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="plans to show and to write")] = 10,
    ways: Annotated[str, typer.Option(help="checkpoints of a merge: 2, or 2-4", rich_help_panel=_SPACE)] = "2-3",
    must_contain: Annotated[
        list[str] | None, typer.Option(help="checkpoint id; repeatable", rich_help_panel=_SPACE)
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="checkpoint id; repeatable", rich_help_panel=_SPACE)] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="choose from these, e.g. 'ties(density=0.2)'; default: all known", rich_help_panel=_SPACE),
    ] = None,
    weighting: Annotated[
        str, typer.Option(help="equal: every member counts the same; halving", rich_help_panel=_SPACE)
    ] = "equal",
    objective: Annotated[
        str, typer.Option(help="mean, worst, a task, or math=2,code=1", rich_help_panel=_SCORING)
    ] = "mean",
    propagator: Annotated[
        str, typer.Option(help="ranks the shortlist: second_order, virtual, curved, exact", rich_help_panel=_SCORING)
    ] = "virtual",
    signatures: Annotated[
        str | None, typer.Option(help="default: `signatures` beside the table", rich_help_panel=_SCORING)
    ] = None,
    probes: Annotated[
        Path | None, typer.Option(help="probe files, for curved and exact", rich_help_panel=_SCORING)
    ] = None,
    budget: Annotated[
        int, typer.Option(min=1, help="plans; if there are more, a beam of about so many", rich_help_panel=_SCORING)
    ] = 1_000_000,
    shortlist: Annotated[
        int, typer.Option(min=1, help="plans that the propagator ranks", rich_help_panel=_SCORING)
    ] = 500,
    caution: Annotated[
        float, typer.Option(min=0, help="rank by the prediction less so many spreads", rich_help_panel=_SCORING)
    ] = 1.0,
    aggregate: Annotated[
        str, typer.Option(help="last step, mean or sum over steps", rich_help_panel=_SCORING)
    ] = "last",
    left: Annotated[str | None, typer.Option(help="checkpoint id", rich_help_panel=_PAIR)] = None,
    right: Annotated[str | None, typer.Option(help="checkpoint id", rich_help_panel=_PAIR)] = None,
    catalogue_option: Annotated[
        Path | None, typer.Option("--catalogue", help="the same as CATALOGUE", rich_help_panel=_PAIR)
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
    from simmerge_ray.catalogue import load_catalogue
    from simmerge_ray.propagation.interface import NAMES
    from simmerge_ray.selector.model import read_selector
    from simmerge_ray.selector.plan_files import SHORTLIST
    from simmerge_ray.selector.plan_space import parse_ways, plan_space, scorable_arms
    from simmerge_ray.selector.plan_tasks import task_pool
    from simmerge_ray.signals.table import read_signal_table

    # Names first, then files, from small to large: what is wrong is said before anything is computed.
    chosen_ways = parse_ways(ways)
    if propagator not in NAMES:
        raise ConfigError(unknown_name("propagator", propagator, NAMES))
    if propagator in ("curved", "exact") and probes is None:
        raise ConfigError(f"propagator {propagator!r} runs the probes; give --probes, the directory of the signals'")
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; plans go into a directory")
    checkpoints = load_catalogue(path)
    first = _shortlist(selector / SHORTLIST)
    second = first if propagator == "second_order" else read_selector(selector)
    table = read_signal_table(signals)
    trained, given = (one.get("weights", "exact") for one in (second.provenance, table.provenance))
    if trained != given:
        raise SelectorError(
            f"the selector was trained with {trained} weight signals, the table has {given} ones; "
            f"compute it with --weights {trained}"
        )
    _check_catalogue(checkpoints, table)
    arms = scorable_arms(arm or (), second.arms, checkpoints.base is not None)
    space = plan_space(checkpoints.ids, arms, chosen_ways, weighting, must_contain or (), exclude or ())
    pool = task_pool(objective, task or (), table.tasks, table.checkpoint_ids, checkpoints.own_task)

    from simmerge_ray.selector.scorer import PlanScorer

    scorer = PlanScorer(table, _propagator(propagator, table, checkpoints, probes, signatures, signals), second, first)
    ranking = scorer.rank(space, pool, top, budget, shortlist, aggregate, caution)
    _print_ranking(ranking, table, pool, selector, space.num_plans(), caution)
    if out is not None:
        from simmerge_ray.selector.plan_files import write_plans

        paths = write_plans(out, ranking, checkpoints)
        typer.echo(f"{len(paths)} plans written to {out}; make the first with: simmerge merge {paths[0]} OUT")


def _shortlist(path: Path) -> Any:
    from simmerge_ray.selector.model import read_selector

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
    probes: Path | None,
    signatures: str | None,
    signals: Path,
) -> Propagator:
    """Build a propagator with what it needs, and no more."""
    from simmerge_ray.propagation.bound import Bound
    from simmerge_ray.propagation.second_order import SecondOrder

    if name == "bound":
        return Bound(table)
    if name == "second_order":
        return SecondOrder(table)
    from simmerge_ray.propagation.evidence import read_evidence, stored_evidence
    from simmerge_ray.propagation.table import PROPAGATORS
    from simmerge_ray.signals.signature import SignatureStore

    store = SignatureStore(signatures or str(signals.parent / "signatures"))
    if probes is None:
        return PROPAGATORS[name](stored_evidence(table, checkpoints, store))
    from simmerge_ray.probes import load_probe_sets

    return PROPAGATORS[name](read_evidence(table, checkpoints, load_probe_sets(probes), store))


def _print_ranking(
    ranking: Ranking, table: SignalTable, pool: TaskPool, selector: Path, num_plans: int, caution: float
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=False)
    shown = Table(title=f"predicted utility, {_tasks_text(pool)}", title_justify="left")
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
        lines.append(best_single(pool.tasks[0], table, _parents(selector)))
    for line in lines:
        console.print(line, soft_wrap=True)


def _tasks_text(pool: TaskPool) -> str:
    if pool.own is not None:
        return (
            "worst of the members' own tasks" if pool.objective.name == "worst" else "mean over the members' own tasks"
        )
    if len(pool.tasks) == 1:
        return pool.tasks[0]
    return f"{pool.objective.name} of {', '.join(pool.tasks)}"


def _row(one: RankedPlan, prefix: str = "") -> tuple[str, str, str, str]:
    low, high = one.interval
    why = ", ".join(f"{group} {change:+.3f}" for group, change in one.why)
    return prefix + fold_text(one.plan), f"{one.utility:.3f}", f"{low:.3f}-{high:.3f}", why


def fold_text(plan: MergePlan) -> str:
    """A fold in one line: `linear: a + b + c`, or `a + b (linear) + c (ties)` where the arms differ."""
    arms = [step.arm.label for step in plan.steps]
    members = [plan.steps[0].left, *(step.right for step in plan.steps)]
    if len(set(arms)) == 1:
        return f"{arms[0]}: {' + '.join(members)}"
    return members[0] + "".join(f" + {name} ({arm})" for name, arm in zip(members[1:], arms, strict=True))


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


def _parents(selector: Path) -> Mapping[str, Mapping[str, float]]:
    import json

    from simmerge_ray.selector.plan_files import PARENTS

    path = selector / PARENTS
    return json.loads(path.read_text()) if path.exists() else {}


def plan_pair(
    catalogue: Path, selector: Path, signals: Path, left: str, right: str, tasks: Sequence[str], out: Path | None
) -> None:
    """Rank the arms for one pair, and write the plan of the best one."""
    from rich.console import Console
    from rich.table import Table

    from simmerge_ray.catalogue import load_catalogue
    from simmerge_ray.operators.specs import parse_arm
    from simmerge_ray.plans import pair_plan, resolve_plan, write_plan
    from simmerge_ray.service.recommender import Recommender

    checkpoints = load_catalogue(catalogue)
    recommender = Recommender.load(selector, signals)
    ranked = recommender.rank(left, right, tasks)
    table = Table(title=f"{left} + {right}", title_justify="left")
    for column in ("arm", "predicted utility", "sd", *ranked[0].by_task):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in ranked:
        name = f"{row.arm} (best fixed)" if row.arm == recommender.best_fixed else row.arm
        table.add_row(name, f"{row.utility:.3f}", f"{row.sd:.3f}", *(f"{u:.3f}" for u, _ in row.by_task.values()))
    Console().print(table)
    if out is not None:
        resolved = resolve_plan(pair_plan(left, right, parse_arm(ranked[0].arm)), checkpoints)
        predicted = {name: {"utility": u, "sd": sd} for name, (u, sd) in ranked[0].by_task.items()}
        write_plan(out, resolved, predicted)
        typer.echo(f"plan written to {out}; make it with: simmerge merge {out} OUT")
