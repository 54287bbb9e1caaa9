"""`simmerge catalogue ...`: start, extend and inspect a catalogue file. No torch; only `show` reads weights, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from simmerge_ray.base.storage import file_size
from simmerge_ray.base.tables import Column, TextTable
from simmerge_ray.checkpoints.size import num_elements
from simmerge_ray.cli.places import CatalogueArgument
from simmerge_ray.cli.shown import JsonOption, Shown, WideOption

if TYPE_CHECKING:
    from simmerge_ray.checkpoints.catalogue import Catalogue
    from simmerge_ray.checkpoints.headers import TensorSpec
    from simmerge_ray.checkpoints.references import CheckpointRef

catalogue_app = typer.Typer(help="Start, extend and inspect a catalogue of checkpoints.", no_args_is_help=True)

_NONE = "-"
# Rows of `show`, and their names in config.json.
_ARCHITECTURE = {
    "model type": ("model_type",),
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden size": ("hidden_size", "n_embd"),
    "vocabulary": ("vocab_size",),
}


CheckpointId = Annotated[str, typer.Argument(metavar="ID", help="checkpoint id: letters, digits, _ . -")]


@catalogue_app.command("add")
def add_to_catalogue(
    catalogue: CatalogueArgument,
    checkpoint_id: CheckpointId,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="checkpoint directory, or hub id owner/name (fetched to the cache)")
    ],
    adapter: Annotated[str | None, typer.Option(help="PEFT LoRA adapter of PATH: directory or hub id")] = None,
    task: Annotated[str | None, typer.Option(help="what it was fine-tuned for")] = None,
    base: Annotated[bool, typer.Option("--base", help="the common ancestor of the others")] = False,
) -> None:
    """Add a checkpoint; refused, and the file unchanged, if it cannot be merged with those already there."""
    from dataclasses import replace

    from simmerge_ray.checkpoints.catalogue import add_checkpoint, check_addition
    from simmerge_ray.checkpoints.references import locate_checkpoint

    check_addition(catalogue, checkpoint_id, as_base=base)  # before anything is fetched
    ref = replace(locate_checkpoint(path, adapter=adapter), id=checkpoint_id)
    extended = add_checkpoint(catalogue, ref, task, as_base=base)
    typer.echo(f"{checkpoint_id} added; {catalogue} holds {_contents(extended)}")


@catalogue_app.command("remove")
def remove_from_catalogue(catalogue: CatalogueArgument, checkpoint_id: CheckpointId) -> None:
    """Take a checkpoint, or the base, out of a catalogue; its files stay."""
    from simmerge_ray.checkpoints.catalogue import remove_checkpoint

    left = remove_checkpoint(catalogue, checkpoint_id)
    typer.echo(f"{checkpoint_id} removed; {catalogue} holds {_contents(left)}")


@catalogue_app.command("list")
def list_checkpoints(catalogue: CatalogueArgument, wide: WideOption = False, as_json: JsonOption = False) -> None:
    """List the checkpoints of a catalogue, the base first."""
    from simmerge_ray.checkpoints.catalogue import load_catalogue, shown_path
    from simmerge_ray.checkpoints.headers import read_headers

    found = load_catalogue(catalogue, draft=True)
    told, rows = [], []
    for ref in found.all_refs:
        specs = read_headers(ref)
        task = "(base)" if ref == found.base else found.own_task[ref.id]
        count, size, dtype = num_elements(specs), _num_bytes(ref, specs), _dtypes(specs)
        adapter = shown_path(ref.adapter, catalogue.parent) if ref.adapter else None
        path = shown_path(ref.path, catalogue.parent)
        told.append([ref.id, task, count, dtype, size, adapter, path])
        units = _in_units(count), dtype, _in_units(size) + "B"
        rows.append([ref.id, task or _NONE, *units, adapter or _NONE, path])
    columns = [
        Column("id"), Column("task"), Column("parameters", right=True), Column("dtype", optional=True),
        Column("size", right=True), Column("adapter", optional=True), Column("path"),
    ]  # fmt: skip
    shown = Shown(None, wide, as_json)
    with shown.narrated() as narrator:
        narrator.table(TextTable(str(catalogue), columns, rows))
    shown.result([dict(zip((column.name for column in columns), row, strict=True)) for row in told])


@catalogue_app.command("show")
def show_checkpoint(catalogue: CatalogueArgument, checkpoint_id: CheckpointId, as_json: JsonOption = False) -> None:
    """Show a checkpoint: architecture, weights, identity. The first time, its digest reads all weights."""
    from rich.console import Console

    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.digests import cached_digest
    from simmerge_ray.checkpoints.headers import read_headers
    from simmerge_ray.checkpoints.references import read_config
    from simmerge_ray.checkpoints.tokenizers import tokenizer_digest

    found = load_catalogue(catalogue, draft=True)
    ref = found.ref(checkpoint_id)
    specs = read_headers(ref)
    console = Console(markup=False, highlight=False, emoji=False, stderr=as_json)
    with console.status(f"digest of {checkpoint_id}"):
        digest = cached_digest(ref)
    rows = {"id": ref.id, "path": str(ref.path), "adapter": str(ref.adapter or _NONE)}
    if ref == found.base:
        rows |= {"base": "(this is the base)"}
    else:
        rows |= {"base": ref.base_id or _NONE, "task": found.own_task[ref.id] or _NONE}
    config = read_config(ref)
    for row, keys in _ARCHITECTURE.items():
        rows[row] = str(next((config[key] for key in keys if config.get(key) is not None), _NONE))
    rows |= {
        "tensors": str(len(specs)),
        "parameters": f"{_in_units(num_elements(specs))} ({num_elements(specs)})",
        "dtype": _dtypes(specs),
        "size": _in_units(_num_bytes(ref, specs)) + "B",
        "digest": digest,
        "tokenizer digest": tokenizer_digest(ref),
    }
    if as_json:
        Shown(as_json=True).result(rows)
        return
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"{name:<{width}}  {value}", soft_wrap=True)


def _contents(catalogue: Catalogue) -> str:
    count = len(catalogue.checkpoints)
    return f"{count} checkpoint{'s' if count != 1 else ''}{' and a base' if catalogue.base else ''}"


def _dtypes(specs: Mapping[str, TensorSpec]) -> str:
    """The dtypes of the tensors, that of most bytes first."""
    num_bytes: Counter[str] = Counter()
    for spec in specs.values():
        num_bytes[spec.dtype] += spec.end - spec.begin
    return ", ".join(sorted(num_bytes, key=lambda dtype: (-num_bytes[dtype], dtype)))


def _num_bytes(ref: CheckpointRef, specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of the weight files, the adapter's included."""
    files = {spec.file for spec in specs.values()}
    if ref.adapter is not None:
        files |= set(ref.adapter.glob("*.safetensors"))
    return sum(file_size(file) for file in files)


def _in_units(count: int) -> str:
    """A count with a decimal prefix: 134515008 is `134.5 M`."""
    if count < 1000:
        return f"{count} "
    value, prefix = count / 1e3, "k"
    for larger in "MGT":
        if round(value, 1) >= 1000:
            value, prefix = value / 1e3, larger
    return f"{value:.1f} {prefix}"
