"""`simmerge signals`: the similarity signals of all pairs of a catalogue."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.base.config import SignalsConfig
from simmerge_ray.base.errors import PlanError, unknown_name
from simmerge_ray.base.storage import Output, Place, as_place, check_outputs
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import CatalogueArgument, PathOrUri, place_option
from simmerge_ray.cli.shown import JsonOption, Shown

if TYPE_CHECKING:
    from rich.console import Console

    from simmerge_ray.signals.table import SignalTable


@with_config_options
def signals(
    catalogue: CatalogueArgument,
    out: Annotated[PathOrUri, place_option(help="Parquet file to write or to append to")],
    config: SignalsConfig,
    probes: Annotated[
        PathOrUri | None,
        place_option(help="directory of <task>.jsonl with a text per line; default: the general probe set"),
    ] = None,
    signatures: Annotated[
        str | None, typer.Option(help="directory or URI that keeps signatures; default: `signatures` beside OUT")
    ] = None,
    explain: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="LEFT RIGHT", help="then explain the signals of this pair, in numbers and words"),
    ] = None,
    figures: Annotated[bool, typer.Option(help="heat maps of every signal into OUT's name + _figures")] = True,
    as_json: JsonOption = False,
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Compute the similarity signals of all pairs of a catalogue; only what is missing is computed."""
    if explain and explain[0] == explain[1]:
        raise PlanError(f"--explain needs two different checkpoints, got {explain[0]!r} twice")
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.probes import load_probe_sets

    check_outputs(_outputs(out, signatures, figures), {"CATALOGUE": catalogue, "--probes": probes})
    ids = load_catalogue(catalogue).ids
    for name in explain or ():
        if name not in ids:
            raise PlanError(unknown_name("checkpoint", name, ids))
    if probes is not None:
        load_probe_sets(probes)
    shown = Shown(log, as_json=as_json)
    with shown.narrated() as narrator:
        from simmerge_ray.pipelines.stages import figures_stage, signals_stage

        table = signals_stage(catalogue, probes, out, config, narrator, signatures)
        if figures:
            figures_stage(table, out, narrator)
        if explain:
            _print_explanation(narrator.console, table, *explain)
    if as_json:
        shown.result(_as_json(table, out, explain))


def _as_json(table: SignalTable, out: Place, pair: tuple[str, str] | None) -> dict[str, Any]:
    from simmerge_ray.signals.explain import explain

    told = [] if pair is None else [asdict(one) for one in explain(table, *pair)]
    names = {"checkpoints": list(table.checkpoint_ids), "tasks": list(table.tasks), "features": list(table.columns)}
    return (
        {"out": str(out), "num_rows": len(table.rows)} | names | ({"pair": pair, "explanation": told} if pair else {})
    )


def _outputs(out: PathOrUri, signatures: str | None, figures: bool) -> list[Output]:
    """The table and what is written beside it."""
    kept = out.parent / "signatures" if signatures is None else as_place(signatures)
    return [
        Output(out, is_file=True, starts=b"PAR1", kind="a table of signals"),
        Output(out.parent / f"{out.stem}.parts", "its parts"),
        Output(out.parent / f"{out.stem}.json", "what it was made of", is_file=True),
        Output(kept, "--signatures"),
        *([Output(out.parent / f"{out.stem}_figures", "the heat maps")] if figures else []),
    ]


def _print_explanation(console: Console, table: SignalTable, left: str, right: str) -> None:
    """The signals of a pair in numbers and words: those of each task's probes, then those of the weights."""
    from rich.padding import Padding
    from rich.text import Text

    from simmerge_ray.signals.explain import explain

    for task, explanations in groupby(explain(table, left, right), key=lambda explanation: explanation.task):
        about = f"on the probes of {task}" if task else f"weights ({table.provenance['weights']})"
        console.print(Text(f"\n{left} (left) and {right} (right), {about}", "bold underline"))
        for explanation in explanations:
            console.print(Text.assemble((explanation.title, "bold"), "  ", explanation.numbers))
            if explanation.sentence:
                console.print(Padding(Text(explanation.sentence), (0, 0, 0, 4)))
