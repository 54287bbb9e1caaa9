"""`simmerge retention`: what a merge keeps of every checkpoint that it was made from, without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from simmerge_ray.base.storage import Output, check_outputs, write_json
from simmerge_ray.base.tables import TextTable, columns_of
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption
from simmerge_ray.cli.places import PathOrUri, place_option
from simmerge_ray.cli.shown import JsonOption, Shown, WideOption


def retention(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="directory, URI or hub id of a merge; or an id of the catalogue")
    ],
    catalogue: Annotated[PathOrUri, place_option(help="catalogue YAML: base and members, each with its task")],
    probes: Annotated[PathOrUri, place_option(help="directory of <task>.jsonl, a `text` a line: prompts only")],
    max_tokens: Annotated[int, typer.Option(min=1, max=256, help="longest answer in tokens")] = 16,
    examples: Annotated[int, typer.Option(min=0, help="probes to show of each member, most different first")] = 3,
    out: Annotated[PathOrUri | None, place_option(help="JSON file for all of it")] = None,
    signatures: Annotated[
        PathOrUri | None,
        place_option(
            help="members' answers are read there, and kept there; `simmerge auto` has them in OUT/signatures"
        ),
    ] = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Report what a model keeps of every member: the share of the member's own answers that it gives as well."""
    outputs = [] if out is None else [Output(out, is_file=True)]
    outputs += [] if signatures is None else [Output(signatures, "--signatures")]
    check_outputs(outputs, {"--catalogue": catalogue, "--probes": probes})
    from simmerge_ray.pipelines.retention import retention_sources

    sources = retention_sources(model, catalogue, probes)
    from simmerge_ray.pipelines.retention import retention_stage

    shown = Shown(log, wide, as_json)
    with shown.narrated() as narrator:
        rows = retention_stage(*sources, narrator, max_tokens, examples, signatures)
        content = {"model": model, "max_tokens": max_tokens, "members": rows}
        if out is not None:
            write_json(out, content)
        narrator.table(_table(model, rows))
        narrator.print_lines(_example_lines(rows))
    shown.result(content)


def _table(model: str, rows: Sequence[Mapping[str, Any]]) -> TextTable:
    columns = columns_of(
        ["member", "task"],
        ["kept", "base keeps", "answers", "KL", "nll", "repeats"],
        optional=["answers", "KL", "nll", "repeats"],
    )
    shown = []
    for row in rows:
        base = "" if row["base_retention"] is None else f"{100 * row['base_retention']:.0f} %"
        kept, repeats = f"{100 * row['retention']:.0f} %", f"{100 * row['repetition']:.0f} %"
        numbers = [str(row["num_answers"]), f"{row['kl']:.3f}", f"{row['nll']:.3f}", repeats]
        shown.append([row["member"], row["task"], kept, base, *numbers])
    return TextTable(f"what {model} keeps", columns, shown)


def _example_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row["examples"]:
            lines.append(f"\nfarthest from {row['member']} ({row['task']}), KL in nats a token:")
        for example in row["examples"]:
            lines.append(f"  {example['kl']:.2f}  {example['probe']!r}: {example['member']!r} -> {example['model']!r}")
    return lines
