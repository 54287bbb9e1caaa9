"""Memory of an engine over many swaps: resident set after the 20th and the last, which may be 5 % more.

`python -m benchmarks.search.swap_memory --out DIR [--swaps 300]`: the tiny checkpoints of the tests, plans of every
operator and every pair in turn, 36 short answers after each. Prints a table; ends with an error beyond 5 %.
"""

from __future__ import annotations

import time
from itertools import cycle, islice
from pathlib import Path

import psutil

from benchmarks.measuring import markdown, script_parser
from benchmarks.search.swap_equality import PROMPTS, two_way_operators

FIRST, GROWTH = 20, 0.05


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--swaps", type=int, default=300)
    options = parser.parse_args()

    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator
    from simmerge_ray.plans.operators.specs import make_arm
    from simmerge_ray.plans.plan import pair_plans, resolve_plan
    from tests import tiny

    catalogue = load_catalogue(tiny.make_catalogue(options.out / "zoo"))
    pairs = [("m0", "m1"), ("m0", "m2"), ("m1", "m2")]
    plans = pair_plans(pairs, [make_arm(operator) for operator in two_way_operators()])
    evaluator = VllmEvaluator(catalogue.base, max_model_len=64)
    resident, started = {}, time.perf_counter()
    for number, plan in enumerate(islice(cycle(plans), options.swaps), 1):
        evaluator.load(resolve_plan(plan, catalogue))
        evaluator.generate(PROMPTS, 6)
        resident[number] = psutil.Process().memory_info().rss / 2**20
    seconds = time.perf_counter() - started
    evaluator.close()
    growth = resident[options.swaps] / resident[FIRST] - 1
    shown = sorted({1, FIRST, options.swaps // 3, 2 * options.swaps // 3, options.swaps})
    print(markdown(("swap", "RSS MiB"), [(number, f"{resident[number]:.1f}") for number in shown]))
    print(f"\n{options.swaps} swaps with answers in {seconds:.0f} s; from the {FIRST}th to the last {growth:+.2%}")
    if growth > GROWTH:
        raise SystemExit(f"memory grew by {growth:.1%}, allowed {GROWTH:.0%}")


if __name__ == "__main__":
    main()
