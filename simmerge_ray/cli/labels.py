"""`simmerge labels ...`: make labels; list, check and merge label stores.

Only `make` needs torch and Ray.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from simmerge_ray.base.config import LabelsConfig, SearchConfig
from simmerge_ray.base.errors import LabelError, SimmergeError, unknown_name
from simmerge_ray.base.storage import Output, as_place, check_outputs, jsonl_bytes, list_objects
from simmerge_ray.base.tables import Column, TextTable
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import CatalogueArgument, PathOrUri, place_option
from simmerge_ray.cli.search import DryRunOption, StoreOption, TasksOption, run_search_command
from simmerge_ray.cli.shown import JsonOption, Shown, WideOption

if TYPE_CHECKING:
    from simmerge_ray.search.labels import LabeledPlan, LabelStore

labels_app = typer.Typer(help="Make labels; list, check and merge label stores.", no_args_is_help=True)

StoreUri = Annotated[
    str, typer.Argument(metavar="STORE", help="directory or URI that `simmerge labels make` wrote labels to")
]


@labels_app.command("make")
@with_config_options
def make_labels(
    catalogue: CatalogueArgument,
    out: StoreOption,
    config: LabelsConfig,
    tasks: TasksOption = None,
    probes: Annotated[
        PathOrUri | None,
        place_option(help="directory of <task>.jsonl, a `text` a line: measures what every merge keeps as well"),
    ] = None,
    dry_run: DryRunOption = False,
    wide: WideOption = False,
    as_json: JsonOption = False,
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Merge and evaluate every pair with every arm; existing labels are kept.

    An interrupted run goes on with the same command. `simmerge search` looks for the best merge instead.
    """
    shown = Shown(log, wide, as_json)
    run_search_command(catalogue, tasks, out, SearchConfig(**config.model_dump()), dry_run, shown, probes)


@labels_app.command("show")
def show_labels(
    store: StoreUri,
    task: Annotated[str | None, typer.Option(help="only labels of this task")] = None,
    best: Annotated[int | None, typer.Option(min=1, metavar="N", help="only the first N rows")] = None,
    format_: Annotated[
        Literal["table", "csv", "jsonl"], typer.Option("--format", help="csv and jsonl: data alone on stdout")
    ] = "table",
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the labels, the highest utility first; then the stopped ones, then those without a utility."""
    labels = _existing(store).read()
    if task is not None:
        if not any(label.task == task for label in labels):
            raise LabelError(f"{store}: {unknown_name('task', task, {label.task for label in labels})}")
        labels = [label for label in labels if label.task == task]
    rows = sorted(map(_row, labels), key=_place)
    shown = rows[:best]
    if as_json:
        Shown(as_json=True).result(shown)
    elif format_ == "table":
        with Shown(wide=wide).narrated() as narrator:
            narrator.table(_table(shown, title=store))
    elif format_ == "csv":
        writer = csv.DictWriter(sys.stdout, fieldnames=list(shown[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(shown)
    else:
        typer.echo(jsonl_bytes(shown), nl=False)
    kinds = Counter(row["outcome"] for row in rows)
    num_tasks = len({row["task"] for row in rows})
    counts = _counts(len(rows), *(kinds[kind] for kind in ("measured", "stopped", "infeasible")))
    first = f", the first {len(shown)} shown" if len(shown) < len(rows) else ""
    typer.echo(f"{counts}; {_num(num_tasks, 'task')}{first}", err=as_json or format_ != "table")


@labels_app.command("check")
def check_labels(store: StoreUri) -> None:
    """Check every row of every file. Exit code 1 with all problems, if there are any."""
    report = _existing(store).check()
    counts = _counts(report.num_labels, report.num_measured, report.num_stopped, report.num_infeasible)
    files = f"{_num(report.num_files, 'file')}, {_num(report.num_duplicates, 'row')} more than labels"
    typer.echo(f"{counts}; {files}")
    if report.problems:
        raise SimmergeError("\n  ".join((f"{_num(len(report.problems), 'problem')} in {store}:", *report.problems)))
    typer.echo("no problems")


@labels_app.command("merge")
def merge_labels(
    into: Annotated[str, typer.Argument(metavar="INTO", help="store to copy into; begun if it is not there")],
    sources: Annotated[list[str], typer.Argument(metavar="FROM...", help="stores to copy from; left as they are")],
) -> None:
    """Copy labels into a store; refused, and nothing written, if they were not made in the same way."""
    from simmerge_ray.search.labels import LabelStore

    check_outputs([Output(as_place(into), "INTO")], {f"FROM {one}": as_place(one) for one in sources})
    others, target = [_existing(source) for source in sources], LabelStore(into)
    _label_files(into)
    for source, num_new in zip(sources, target.merge(others), strict=True):
        typer.echo(f"{source}: {_num(num_new, 'new label')}")
    typer.echo(f"{into} holds {_num(len(target.read()), 'label')}")


@labels_app.command("compact")
def compact_labels(store: StoreUri) -> None:
    """Fold the files of a store into one. Safe while a search writes to it; of conflicting rows one is kept."""
    existing = _existing(store)
    check_outputs([Output(as_place(store), "STORE")])
    num_folded = existing.compact()
    typer.echo(f"{_num(num_folded, 'file')} folded into one" if num_folded else "nothing to fold: one file already")


def _existing(uri: str) -> LabelStore:
    """The store; LabelError if there is no directory, or no label file in it."""
    from simmerge_ray.search.labels import LabelStore

    if not _label_files(uri):
        raise LabelError(f"no label files in {uri}; `simmerge labels make ... --out {uri}` makes them")
    return LabelStore(uri)


def _label_files(uri: str) -> list[str]:
    if as_place(uri).is_file():
        raise LabelError(f"{uri} is a file; a label store is the directory that holds such files")
    try:
        return list_objects(uri, ".parquet")
    except OSError as error:
        raise LabelError(f"cannot open {uri}: {error}") from None


def _row(label: LabeledPlan) -> dict[str, Any]:
    """A label as `show` lists it; the columns of csv and jsonl."""
    from simmerge_ray.search.labels import Infeasible, Stopped

    outcome = label.outcome
    evaluated = None if isinstance(outcome, Infeasible) else outcome
    kind = "infeasible" if evaluated is None else "stopped" if isinstance(evaluated, Stopped) else "measured"
    return {
        "plan": label.plan.label,
        "task": label.task,
        "outcome": kind,
        "utility": evaluated.utility if evaluated else None,
        "se": evaluated.standard_error if evaluated else None,
        "num_items": len(evaluated.items) if evaluated else 0,
        "seconds": label.seconds,
        "evaluator": label.settings.evaluator,
        "reason": outcome.reason if isinstance(outcome, Infeasible) else None,
        "same_as": label.same_as,
        "plan_id": label.plan.id,
        "key": label.key,
    }


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """A part of the items makes no rank among the whole, so stopped labels come after all measured ones."""
    rank = ("measured", "stopped", "infeasible").index(row["outcome"])
    return rank, -(row["utility"] or 0.0), row["task"], row["plan"], row["key"]


def _table(rows: Iterable[dict[str, Any]], title: str) -> TextTable:
    columns = [
        Column("plan"), Column("task"), Column("utility", right=True), Column("items", right=True, optional=True),
        Column("outcome"), Column("evaluator", optional=True), Column("seconds", right=True, optional=True),
    ]  # fmt: skip
    shown = []
    for row in rows:
        utility = "-" if row["utility"] is None else f"{row['utility']:.3f} ± {row['se']:.3f}"
        outcome = f"infeasible: {row['reason']}" if row["outcome"] == "infeasible" else row["outcome"]
        items, seconds = str(row["num_items"]), f"{row['seconds']:.1f}"
        shown.append([row["plan"], row["task"], utility, items, outcome, row["evaluator"], seconds])
    return TextTable(title, columns, shown)


def _counts(num_labels: int, num_measured: int, num_stopped: int, num_infeasible: int) -> str:
    return f"{_num(num_labels, 'label')}: {num_measured} measured, {num_stopped} stopped, {num_infeasible} infeasible"


def _num(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
