"""What the comparison after a swap costs: swaps with and without it, alternating, in one engine.

`python -m benchmarks.search.swap_cost DIR [--dtype float32] [--rounds 8]`, where DIR holds checkpoints `base`, `a`, `b`
(the fixtures of `benchmarks.merge.fixtures`). A swap is the linear merge of a and b streamed into the engine. Prints
medians in CPU seconds; run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.measuring import alternate, script_parser, timed


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()

    from simmerge_ray.checkpoints.references import CheckpointRef
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator
    from simmerge_ray.plans.operators.specs import make_arm
    from simmerge_ray.plans.plan import ResolvedPlan, pair_plan

    a, b = (CheckpointRef(name, options.directory / name) for name in "ab")
    resolved = ResolvedPlan(pair_plan("a", "b", make_arm("linear")), (a, b), None)
    evaluator = VllmEvaluator(CheckpointRef("base", options.directory / "base"), options.dtype, 64)

    from simmerge_ray.on_ray import vllm_worker

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

    found = alternate({"checked": swap, "bare": bare_swap}, options.rounds)
    evaluator.close()
    checked, bare = (statistics.median(seconds) for seconds in found.values())
    print(f"swap {checked:.4f} s, without the comparison {bare:.4f} s: {checked / bare - 1:+.1%}")


if __name__ == "__main__":
    main()
