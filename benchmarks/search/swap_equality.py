"""Whether a swapped engine answers like a fresh engine on the written merge: every operator, dtype, ranks, tied or not.

`python -m benchmarks.search.swap_equality --out DIR [--operators linear,ties] [--ranks 1,2] [--dtypes float32,bfloat16]
[--heads tied,untied]` on the tiny checkpoints of the tests. Every cell of (head, dtype, ranks) is a process of its own:
one engine takes the merges of all operators in turn and is closed; then a fresh engine is started on every written one.
Compared are the greedy tokens after 36 prompts and the log-probabilities of the likeliest three at every place. Prints
a table and writes `swap_equality.json`; ends with an error where tokens differ or log-probabilities by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.measuring import markdown, pinned_environment, script_parser

NUM_TOKENS, NUM_TOP, TOLERANCE = 6, 3, 1e-4
PROMPTS = [[5 + (3 * a + b) % 40, 6, 7 + b, *([8] * (b % 4))] for a in range(3) for b in range(12)]


def two_way_operators() -> list[str]:
    from simmerge_ray.plans.operators.specs import OPERATOR_SPECS

    return [name for name, spec in OPERATOR_SPECS.items() if spec.max_sources is None or spec.max_sources >= 2]


def compare(swapped: list[Any], fresh: list[Any]) -> tuple[bool, float]:
    """Whether all tokens are equal, and the largest difference of log-probabilities up to the first unequal token."""
    equal, gap = True, 0.0
    for (tokens, places), (others, facing) in zip(swapped, fresh, strict=True):
        equal &= tokens == others
        for token, other, place, face in zip(tokens, others, places, facing, strict=False):
            gap = max([gap, *(abs(place[key] - face[key]) for key in place.keys() & face.keys())])
            if token != other:
                break
    return equal, gap


def run_cell(root: Path, head: str, dtype: str, ranks: int, operators: list[str]) -> list[dict[str, Any]]:
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.references import CheckpointRef
    from simmerge_ray.merging.write.directory import write_merge
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator
    from simmerge_ray.plans.operators.specs import make_arm
    from simmerge_ray.plans.plan import pair_plan, resolve_plan
    from tests import tiny

    def answers(evaluator: VllmEvaluator) -> list[Any]:
        return evaluator.greedy(PROMPTS, NUM_TOKENS, NUM_TOP)

    catalogue = load_catalogue(tiny.make_catalogue(root / "zoo", tied=head == "tied"))
    plans = {operator: resolve_plan(pair_plan("m0", "m1", make_arm(operator)), catalogue) for operator in operators}
    swapped = {}
    evaluator = VllmEvaluator(catalogue.base, dtype, 64, tensor_parallel_size=ranks)
    for operator, resolved in plans.items():
        evaluator.load(resolved)
        swapped[operator] = answers(evaluator)
    evaluator.close()
    rows = []
    for operator, resolved in plans.items():
        written = CheckpointRef("new", write_merge(resolved, root / operator).path)
        started = time.perf_counter()
        fresh = VllmEvaluator(written, dtype, 64, tensor_parallel_size=ranks)
        equal, gap = compare(swapped[operator], answers(fresh))
        fresh.close()
        row = {"head": head, "dtype": dtype, "ranks": ranks, "operator": operator, "tokens_equal": equal}
        rows.append(row | {"max_gap": gap, "fresh_s": round(time.perf_counter() - started, 2)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--operators", default="")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--heads", default="tied,untied")
    parser.add_argument("--cell", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    operators = options.operators.split(",") if options.operators else two_way_operators()
    if options.cell:
        head, dtype, ranks = options.cell.split(",")
        rows = run_cell(options.out, head, dtype, int(ranks), operators)
        (options.out / "rows.json").write_text(json.dumps(rows))
        return
    # Some virtual machines announce AMX and fault when bfloat16 uses it.
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", **pinned_environment()}
    rows = []
    for head, dtype, ranks in product(options.heads.split(","), options.dtypes.split(","), options.ranks.split(",")):
        directory = options.out / f"{head}-{dtype}-{ranks}"
        directory.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.search.swap_equality", "--out", str(directory)]
        command += ["--operators", ",".join(operators), "--cell", f"{head},{dtype},{ranks}"]
        with open(directory / "log", "wb") as log:
            ended = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        if ended != 0:
            raise SystemExit(f"{directory.name} ended with {ended}; see {directory / 'log'}")
        rows += json.loads((directory / "rows.json").read_text())
    (options.out / "swap_equality.json").write_text(json.dumps(rows, indent=1))
    cells = []
    for cell in dict.fromkeys((row["head"], row["dtype"], row["ranks"]) for row in rows):
        mine = [row for row in rows if (row["head"], row["dtype"], row["ranks"]) == cell]
        same, gap = sum(row["tokens_equal"] for row in mine), max(row["max_gap"] for row in mine)
        cells.append([*cell, len(mine), same, gap, sorted(row["fresh_s"] for row in mine)[len(mine) // 2]])
    header = ("head", "dtype", "ranks", "operators", "tokens equal", "max. difference of log-probs", "fresh engine s")
    print(markdown(header, cells))
    if bad := [row for row in rows if not row["tokens_equal"] or not row["max_gap"] <= TOLERANCE]:
        raise SystemExit(f"{len(bad)} of {len(rows)} differ: {bad[:5]}")


if __name__ == "__main__":
    main()
