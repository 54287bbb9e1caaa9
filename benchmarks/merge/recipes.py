"""Recipes as mergekit 0.1.5 makes them from the YAML that we write, and how far its weights are from ours.

`python -m benchmarks.merge.recipes CATALOGUE MEMBER MEMBER [MEMBER ...]` writes each recipe over the members (weights
of task arithmetic, one for each layer, block and tensor, a gradient over the depth, TIES, an average) with
`write_mergekit`, lets mergekit merge it in its own interpreter, and makes it with our engine. It prints a Markdown
table: the largest absolute difference of two float32 elements, and the same in units of the tensor's largest element.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.measuring import markdown, script_parser
from benchmarks.merge.mergekit_env import DEFAULT_DIRECTORY, mergekit_python
from benchmarks.merge.sides import Worker, weight_files
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.mergekit import write_mergekit
from simmerge_ray.plans.operators.specs import parse_arm
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.plans.recipe import GroupWeights, MemberWeight, Recipe
from simmerge_ray.signals.tuning.groups import groups_of, member_weight


def recipes(members: tuple[str, ...], tensors: list[str]) -> dict[str, Recipe]:
    """Recipes by name; weights are drawn once, unequal, some outside [0, 1]."""
    generator = np.random.default_rng(0)

    def numbers() -> tuple[float, ...]:
        return tuple(generator.uniform(0.1, 1.4, len(members)).round(3).tolist())

    def by(kind: str) -> tuple[MemberWeight, ...]:
        names = sorted(set(groups_of(tensors, kind).values()))
        rows = [dict(zip(names, generator.uniform(0.0, 1.4, len(names)).tolist(), strict=True)) for _ in members]
        return tuple(member_weight(row) for row in rows)

    gradients = tuple(tuple(generator.uniform(0.0, 1.2, 3).round(3).tolist()) for _ in members)
    sums = parse_arm("task_arithmetic")
    rows: Mapping[str, tuple[str, tuple[MemberWeight, ...]]] = {
        "average": ("linear", numbers()),
        "ties": ("ties(density=0.3)", numbers()),
        "scaled ties": ("ties(density=0.5, scale=1.4)", numbers()),
    }
    found = {
        "task arithmetic": Recipe(sums, members, numbers()),
        "a weight a layer": Recipe(sums, members, by("layer")),
        "a weight a block": Recipe(sums, members, by("block")),
        "a weight a tensor": Recipe(sums, members, by("tensor")),
        "gradient over the depth": Recipe(sums, members, gradients),
    }
    assert any(isinstance(weight, GroupWeights) for weight in found["a weight a layer"].weights)
    return found | {name: Recipe(parse_arm(arm), members, weights) for name, (arm, weights) in rows.items()}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("members", nargs="+")
    parser.add_argument("--venv", type=Path, default=DEFAULT_DIRECTORY, help="mergekit's environment")
    arguments = parser.parse_args()
    catalogue, members = load_catalogue(arguments.catalogue), tuple(arguments.members)
    tensors = list(read_headers(catalogue.ref(members[0])))
    table = []
    with tempfile.TemporaryDirectory(prefix="recipes-") as scratch:
        peer = Worker("mergekit", mergekit_python(arguments.venv.absolute()), 1)
        for number, (name, recipe) in enumerate(recipes(members, tensors).items()):
            resolved = resolve_plan(MergePlan(recipe=recipe), catalogue)
            file, theirs = Path(scratch) / f"{number}.yml", Path(scratch) / f"{number}"
            file.write_text(json.dumps(yaml.safe_load(write_mergekit(resolved))))  # the worker reads JSON
            peer.run({"config": str(file)}, theirs)
            merged = {key: value for one in weight_files(theirs) for key, value in load_file(one).items()}
            table.append([name, *_distance(dict(merged_tensors(resolved)), merged)])
        peer.close()
    print(markdown(("recipe", "largest difference", "of the tensor's largest", "tensors"), table))


def _distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    names = ours.keys() & theirs.keys()
    apart = {name: float((ours[name].float() - theirs[name].float()).abs().max()) for name in names}
    relative = {name: apart[name] / max(float(ours[name].float().abs().max()), 1e-30) for name in names}
    missing = sorted(theirs.keys() - ours.keys())
    assert not missing, f"only mergekit writes {missing}"
    return [f"{max(apart.values()):.1e}", f"{max(relative.values()):.1e}", str(len(names))]


if __name__ == "__main__":
    main()
