"""mergekit files of tiny checkpoints, compiled, and what is reported of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from simmerge_ray.base.errors import CheckpointError, PlanError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.graph import Apply, MergeGraph, Node
from simmerge_ray.merging.mergekit import ModelName, compile_mergekit, read_mergekit

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2))
DOWN0, DOWN1 = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2))
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
HERE = Path("/somewhere")


def locate(name: ModelName) -> CheckpointRef:
    if not name.path.is_dir():
        raise CheckpointError(f"{name.path} is not a directory")
    return CheckpointRef(name.id, name.path)


def compiled(root: Path, text: str, **options) -> MergeGraph:
    return compile_mergekit(read_mergekit(text, root), locate, **options)


def node(graph: MergeGraph, name: str) -> Node:
    return next(output.node for output in graph.outputs if output.name == name)


def apply(graph: MergeGraph, name: str) -> Apply:
    found = node(graph, name)
    assert isinstance(found, Apply)
    return found


def copied(root: Path, target: Path, name: str = "m0", **config) -> Path:
    """A copy of a checkpoint to change; `config` replaces entries of config.json."""
    target.mkdir()
    for file in (root / name).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | config))
    return target


def rewrite(path: Path, change) -> None:
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"})


def read_error(text: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        read_mergekit(text, HERE)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def compile_error(root: Path, text: str) -> list[str]:
    documents = read_mergekit(text, root)
    with pytest.raises(PlanError) as caught:
        compile_mergekit(documents, locate)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


LINEAR = """
merge_method: linear
models:
  - {model: m0, parameters: {weight: 0.3}}
  - {model: m1, parameters: {weight: 0.9}}
"""

STACK = """
merge_method: passthrough
slices:
  - sources: [{model: m0, layer_range: [0, 2]}]
  - sources: [{model: m1, layer_range: [1, 2]}]
  - sources: [{model: m2, layer_range: [0, 1]}]
"""
