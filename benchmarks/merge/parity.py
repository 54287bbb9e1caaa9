"""The same YAML merged by mergekit 0.1.5 and by our engine, and how far apart the weights are.

`python -m benchmarks.merge.parity FIXTURES [--operators NAME,...] [--dtype float32]` merges the 134 M checkpoints of
`benchmarks.merge.fixtures` (bf16) with each operator that both have: mergekit in its interpreter, ours by
`simmerge merge config.yml out`. It prints a Markdown table: the largest distance of two elements in ulp of bf16 (the
difference of their order-preserving integer images, so neighbours are 1 apart and +0 equals -0), the share of elements
that differ at all and by more than 1 ulp, and the tensor with the largest distance. The last column is what went wrong,
if anything did. `--dtype float32` lets both sides cast the inputs first (the output stays bf16); without it the peer
computes some operators in bf16.

The masks of DARE and DELLA are random and differ by intent: for them a second table compares, per side, the share of
elements that differ from the base and the norm of that difference.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.measuring import markdown, pinned_environment, script_parser
from benchmarks.merge.fixtures import make_fixture
from benchmarks.merge.mergekit_env import DEFAULT_DIRECTORY, mergekit_python
from benchmarks.merge.sides import OUR_PYTHON, Worker, weight_files


@dataclass(frozen=True)
class Case:
    """One YAML: parameters of the two models and of the merge; `base_model` is `base`, `a` or absent."""

    method: str
    models: tuple[Mapping[str, Any], ...] = ({}, {})
    parameters: Mapping[str, Any] | None = None
    base: str | None = None

    def config(self, checkpoints: Mapping[str, Path], dtype: str | None) -> dict[str, Any]:
        config: dict[str, Any] = {
            "merge_method": self.method,
            "models": [
                {"model": str(checkpoints[name]), "parameters": dict(parameters)}
                for name, parameters in zip("ab", self.models, strict=False)
            ],
        }
        if self.base:
            config["base_model"] = str(checkpoints[self.base])
        if self.parameters:
            config["parameters"] = dict(self.parameters)
        return config | ({"dtype": dtype, "out_dtype": "bfloat16"} if dtype else {})


def _each(**parameters: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Unequal weights, so that a mix-up of the models shows, and the same other parameters."""
    return {"weight": 0.6, **parameters}, {"weight": 0.4, **parameters}


CASES: Mapping[str, Case] = {
    "linear": Case("linear", _each()),
    "slerp": Case("slerp", parameters={"t": 0.4}, base="a"),
    "nuslerp": Case("nuslerp", _each()),
    "nuslerp, base": Case("nuslerp", _each(), base="base"),
    "task_arithmetic": Case("task_arithmetic", _each(), {"lambda": 0.9}, "base"),
    "ties": Case("ties", _each(density=0.5), {"normalize": True}, "base"),
    "ties, density 0.2": Case("ties", _each(density=0.2), {"normalize": True}, "base"),
    "breadcrumbs": Case("breadcrumbs", _each(density=0.9, gamma=0.01), base="base"),
    "breadcrumbs_ties": Case("breadcrumbs_ties", _each(density=0.9, gamma=0.01), base="base"),
    "model_stock": Case("model_stock", base="base"),
    "karcher": Case("karcher", parameters={"max_iter": 10, "tol": 1e-5}),
    "sce": Case("sce", parameters={"select_topk": 0.5}, base="base"),
    "multislerp": Case("multislerp", _each()),
    "multislerp, base": Case("multislerp", _each(), base="base"),
    "arcee_fusion": Case("arcee_fusion", ({},), base="base"),
    "nearswap": Case("nearswap", ({},), {"t": 1e-3}, "base"),
    "ram": Case("ram", parameters={"epsilon": 1e-4}, base="base"),
    "ramplus_tl": Case("ramplus_tl", parameters={"epsilon": 1e-4}, base="base"),
    "passthrough": Case("passthrough", ({"scale": 0.9},)),
}
RANDOM_CASES: Mapping[str, Case] = {
    "dare_linear": Case("dare_linear", _each(density=0.5), base="base"),
    "dare_ties": Case("dare_ties", _each(density=0.5), base="base"),
    "della_linear": Case("della_linear", _each(density=0.5, epsilon=0.15), base="base"),
    "della": Case("della", _each(density=0.5, epsilon=0.15), base="base"),
}


def ulp_images(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of bf16 values: neighbouring values are 1 apart, +0 equals -0."""
    signed = values.view(torch.int16).int()
    return torch.where(signed < 0, -(signed & 0x7FFF), signed)


def pairs(left: Path, right: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Equal tensors of two checkpoints.

    Raises:
        ValueError: names, sizes or dtypes are not the same.
    """
    one, other = (
        {name: tensor for file in weight_files(path) for name, tensor in load_file(file).items()}
        for path in (left, right)
    )
    if one.keys() != other.keys():
        raise ValueError(f"only one side has {', '.join(sorted(one.keys() ^ other.keys())[:3])}")
    for name, tensor in one.items():
        if {tensor.dtype, other[name].dtype} != {torch.bfloat16} or tensor.numel() != other[name].numel():
            kinds = (f"{side[name].dtype} x {side[name].numel()}" for side in (one, other))
            raise ValueError(f"{name}: {' and '.join(kinds)}")
        yield name, tensor.flatten(), other[name].flatten()


def distance(left: Path, right: Path) -> list[str]:
    """Cells: largest distance in ulp, shares of elements that differ and beyond 1 ulp, the tensor with the largest."""
    worst, num_elements, counts = (0, "-"), 0, np.zeros(2)
    for name, one, other in pairs(left, right):
        apart = (ulp_images(one) - ulp_images(other)).abs()
        counts += [int((apart > limit).sum()) for limit in (0, 1)]
        num_elements += len(apart)
        worst = max(worst, (int(apart.max()), name), key=lambda found: found[0])
    return [str(worst[0]), *(f"{share:.2e}" for share in counts / num_elements), worst[1]]


def departure(base: Path, merged: Path) -> tuple[float, float]:
    """Share of elements that differ from the base, and the Euclidean norm of the difference."""
    differences = [other.float() - one.float() for _, one, other in pairs(base, merged)]
    num_differing = sum(int(one.count_nonzero()) for one in differences)
    square = sum(float(one.square().sum(dtype=torch.float64)) for one in differences)
    return num_differing / sum(map(len, differences)), square**0.5


def merge_both(config: dict[str, Any], scratch: Path, peer: Worker) -> tuple[Path, Path]:
    """Outputs of mergekit and of ours.

    Raises:
        RuntimeError: a side failed; the message ends with what it said.
    """
    file, theirs, ours = scratch / "config.yml", scratch / "mergekit", scratch / "ours"
    file.write_text(json.dumps(config, indent=2))  # JSON is YAML
    shutil.rmtree(ours, ignore_errors=True)
    peer.run({"config": str(file)}, theirs)
    command = [str(OUR_PYTHON.with_name("simmerge")), "merge", str(file), str(ours)]
    done = subprocess.run(command, cwd=scratch, env=pinned_environment(), capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-300:]
        raise RuntimeError(f"ours ended with {done.returncode}: {said}")
    return theirs, ours


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("--venv", type=Path, default=DEFAULT_DIRECTORY, help="mergekit's environment")
    parser.add_argument("--operators", help="rows to run, separated by ';'; default all")
    parser.add_argument("--dtype", help="cast the inputs to this dtype, e.g. float32; the output stays bf16")
    arguments = parser.parse_args()
    checkpoints = make_fixture(arguments.fixtures.absolute(), "134m", arguments.venv.absolute())
    cases = CASES | RANDOM_CASES
    chosen = [name.strip() for name in arguments.operators.split(";")] if arguments.operators else list(cases)
    if unknown := [name for name in chosen if name not in cases]:
        raise SystemExit(f"unknown rows {unknown}; known: {'; '.join(cases)}")
    print(markdown(("operator", "max ulp", "share differing", "share beyond 1 ulp", "worst tensor", ""), ()))
    random_rows, base = [], checkpoints["base"]
    with tempfile.TemporaryDirectory(prefix="parity-", dir=arguments.fixtures) as name:
        peer_python = mergekit_python(arguments.venv.absolute())
        peer = Worker("mergekit", peer_python, 1)
        for row in chosen:
            try:
                both = merge_both(cases[row].config(checkpoints, arguments.dtype), Path(name).absolute(), peer)
                if row in RANDOM_CASES:
                    theirs, ours = (departure(base, one) for one in both)
                    random_rows.append([row, *(f"{x:.4f}" for two in zip(theirs, ours, strict=True) for x in two)])
                else:
                    print(f"| {' | '.join([row, *distance(*both)])} | |", flush=True)
            except (RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split()).replace("|", "/")
                print(f"| {row} | - | - | - | - | {reason} |", flush=True)
                if str(error).startswith("mergekit ended"):
                    peer.close()
                    peer = Worker("mergekit", peer_python, 1)
        peer.close()
    header = ("random masks", "differs from base, mergekit", "ours", "norm of the difference, mergekit", "ours")
    print(f"\n{markdown(header, random_rows)}" if random_rows else "")


if __name__ == "__main__":
    main()
