"""`simmerge extract-lora`: the low-rank part of a fine-tune, as a PEFT adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from simmerge_ray.base.extraction import ExtractConfig
from simmerge_ray.base.storage import check_outputs
from simmerge_ray.cli.options import with_config_options
from simmerge_ray.cli.places import PathOrUri, place_option


@with_config_options
def extract_lora_command(
    finetuned: Annotated[str, typer.Argument(help="directory, URI or hub id of the fine-tuned checkpoint")],
    base: Annotated[str, typer.Option(help="the checkpoint that it was made of, likewise")],
    out: Annotated[PathOrUri, place_option(help="adapter directory to write")],
    config: ExtractConfig,
) -> None:
    """Extract a LoRA adapter from a fine-tune: the largest singular directions of the change of every matrix.

    The adapter is in PEFT's format and is a member of merges as BASE+OUT. What it keeps of the change is printed.
    Embeddings, norms and biases are left out unless they are kept whole (`--save-module`, `--bias`) or, embeddings,
    taken as well; those that changed are listed in the adapter's README.
    """
    from simmerge_ray.base.progress import narrated
    from simmerge_ray.checkpoints.references import locate_checkpoint
    from simmerge_ray.merging.extraction import adapter_output, extract_lora

    check_outputs([adapter_output(out)])  # before anything is fetched from the hub
    with narrated(None) as narrator:
        refs = [locate_checkpoint(name) for name in (finetuned, base)]
        with narrator.stage("extract") as stage:
            with narrator.bar("tensors") as report:
                made = extract_lora(refs[0], refs[1], config, out, report)
            stage.result = f"rank {config.rank}, {made.num_matrices} matrices ({made.num_bytes / 1e6:.3g} MB) -> {out}"
        narrator.print_lines(made.lines())
