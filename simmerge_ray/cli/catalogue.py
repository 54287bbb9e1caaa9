"""`simmerge catalogue ...`: start, extend and inspect a catalogue file. No torch; only `show` reads weights, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from simmerge_ray.base.storage import file_size
from simmerge_ray.checkpoints.size import num_elements
from simmerge_ray.cli.places import CatalogueArgument

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
    """Take a checkpoint, or the base, out of a catalogue; its files stay.

    Example: simmerge catalogue remove catalogue.yaml math-a
    """
    from simmerge_ray.checkpoints.catalogue import remove_checkpoint

    left = remove_checkpoint(catalogue, checkpoint_id)
    typer.echo(f"{checkpoint_id} removed; {catalogue} holds {_contents(left)}")


@catalogue_app.command("list")
def list_checkpoints(catalogue: CatalogueArgument) -> None:
    """List the checkpoints of a catalogue, the base first."""
    from rich.console import Console
    from rich.table import Table

    from simmerge_ray.checkpoints.catalogue import load_catalogue, shown_path
    from simmerge_ray.checkpoints.headers import read_headers

    found = load_catalogue(catalogue, draft=True)
    table = Table(title=str(catalogue), title_justify="left")
    for column in ("id", "task", "parameters", "dtype", "size", "adapter", "path"):
        right = column in ("parameters", "size")
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for ref in found.all_refs:
        specs = read_headers(ref)
        task = "(base)" if ref == found.base else found.own_task[ref.id] or _NONE
        sizes = _in_units(num_elements(specs)), _dtypes(specs), _in_units(_num_bytes(ref, specs)) + "B"
        adapter = shown_path(ref.adapter, catalogue.parent) if ref.adapter else _NONE
        table.add_row(ref.id, task, *sizes, adapter, shown_path(ref.path, catalogue.parent))
    Console(markup=False, highlight=False, emoji=False).print(table)


@catalogue_app.command("show")
def show_checkpoint(catalogue: CatalogueArgument, checkpoint_id: CheckpointId) -> None:
    """Show a checkpoint: architecture, weights, identity. The first time, its digest reads all weights."""
    from rich.console import Console
    from rich.table import Table

    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.digests import cached_digest
    from simmerge_ray.checkpoints.headers import read_headers
    from simmerge_ray.checkpoints.references import read_config
    from simmerge_ray.checkpoints.tokenizers import tokenizer_digest

    found = load_catalogue(catalogue, draft=True)
    ref = found.ref(checkpoint_id)
    specs = read_headers(ref)
    console = Console(markup=False, highlight=False, emoji=False)
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
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


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
