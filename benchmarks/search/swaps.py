"""What swaps cost a live engine: the comparison after each of them, and memory over hundreds.

`python -m benchmarks.search.swaps cost DIR [--dtype float32] [--rounds 8]`, where DIR holds checkpoints `base`, `a`,
`b` (the fixtures of `benchmarks.merge.fixtures`): the linear merge of a and b streamed into the engine with and without
the comparison, alternating. Prints medians in CPU seconds; run with OMP_NUM_THREADS=1.

`python -m benchmarks.search.swaps memory DIR [--swaps 300]`, where DIR gets the tiny checkpoints of the tests: plans of
every operator and every pair in turn, 36 short answers after each. Prints the resident set after the 20th swap and the
last; ends with an error where that is more than 5 % larger.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from benchmarks.measuring import alternate, markdown, script_parser, timed

FIRST, GROWTH = 20, 0.05
PROMPTS = [[5 + (3 * a + b) % 40, 6, 7 + b, *([8] * (b % 4))] for a in range(3) for b in range(12)]


def cost(directory: Path, dtype: str, num_rounds: int) -> None:
    from simmerge_ray.checkpoints.references import CheckpointRef
    from simmerge_ray.on_ray import vllm_worker
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator
    from simmerge_ray.plans.operators.specs import make_arm
    from simmerge_ray.plans.plan import ResolvedPlan, pair_plan

    a, b, base = (CheckpointRef(name, directory / name) for name in ("a", "b", "base"))
    resolved = ResolvedPlan(pair_plan("a", "b", make_arm("linear")), (a, b), None)
    evaluator = VllmEvaluator(base, dtype, 64)

    def swap() -> float:
        return timed(lambda: evaluator.load(resolved))[1].cpu  # what else the machine does counts less

    def untouched(sample: Any, stream: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for name, tensor in stream:
            sample.tensors[name] = tensor[:0]
            yield name, tensor

    def bare_swap() -> float:
        with (
            mock.patch.object(vllm_worker, "differences", lambda *_: ()),
            mock.patch.object(vllm_worker.StreamSample, "taken", untouched),
            mock.patch.object(vllm_worker.StreamSample, "of_packs", contextlib.nullcontext),
        ):
            return swap()

    found = alternate({"checked": swap, "bare": bare_swap}, num_rounds)
    evaluator.close()
    checked, bare = (statistics.median(seconds) for seconds in found.values())
    print(f"swap {checked:.4f} s, without the comparison {bare:.4f} s: {checked / bare - 1:+.1%}")


def memory(directory: Path, num_swaps: int) -> None:
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator
    from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm
    from simmerge_ray.plans.plan import pair_plans, resolve_plan
    from tests import tiny

    catalogue = load_catalogue(tiny.make_catalogue(directory / "zoo"))
    two_way = [name for name, spec in OPERATOR_SPECS.items() if spec.max_sources is None or spec.max_sources >= 2]
    plans = pair_plans([("m0", "m1"), ("m0", "m2"), ("m1", "m2")], [make_arm(operator) for operator in two_way])
    evaluator = VllmEvaluator(catalogue.base, max_model_len=64)
    resident = {}
    for number, plan in enumerate(islice(cycle(plans), num_swaps), 1):
        evaluator.load(resolve_plan(plan, catalogue))
        evaluator.generate(PROMPTS, 6)
        resident[number] = psutil.Process().memory_info().rss / 2**20
    evaluator.close()
    growth = resident[num_swaps] / resident[FIRST] - 1
    shown = sorted({1, FIRST, num_swaps // 3, 2 * num_swaps // 3, num_swaps})
    print(markdown(("swap", "RSS MiB"), [(number, f"{resident[number]:.1f}") for number in shown]))
    print(f"\nfrom the {FIRST}th to the last of {num_swaps} swaps {growth:+.2%}")
    if growth > GROWTH:
        raise SystemExit(f"memory grew by {growth:.1%}, allowed {GROWTH:.0%}")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("what", choices=("cost", "memory"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--swaps", type=int, default=300)
    given = parser.parse_args()
    if given.what == "cost":
        cost(given.directory, given.dtype, given.rounds)
    else:
        memory(given.directory, given.swaps)


if __name__ == "__main__":
    main()
