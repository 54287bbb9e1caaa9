"""How large the study must be: its power, simulated from the labels of a finished `simmerge demo`.

`python -m benchmarks.selection.power RUN [--studies 200]` prints the spread of a merge's gain over the best fixed arm
(one model unseen) and, for several sizes and true gains, how often the lower end of the 95 % interval is above 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SIZES = ((5, 5), (6, 8), (8, 12), (12, 8), (12, 12), (20, 8))
GAINS = (4.0, 6.0)
BASE_SDS = (0.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--studies", type=int, default=200)
    arguments = parser.parse_args()

    from simmerge_ray.base.config import TrainConfig
    from simmerge_ray.base.runs import RunLayout
    from simmerge_ray.research.study.power import estimate_spread, pilot_gains, simulate_power
    from simmerge_ray.search.labels import LabelStore
    from simmerge_ray.selector.data.dataset import build_dataset
    from simmerge_ray.signals.table import read_signal_table

    layout = RunLayout(arguments.run)
    dataset = build_dataset(read_signal_table(layout.signals), LabelStore(layout.labels).read())
    spreads = {model: estimate_spread(*pilot_gains(dataset, TrainConfig(model=model))) for model in ("mlp", "ridge")}
    print("| model | merges | mean gain | sd, a checkpoint | sd, pair and items |\n|---|---|---|---|---|")
    for model, spread in spreads.items():
        print(f"| {model} | {spread.num_merges} | {spread.mean:.1f} | {spread.checkpoint:.1f} | {spread.rest:.1f} |")
    print("\n| true gain | bases | experts a base | sd of bases | power | half-width | 1.96 x true error |")
    print("|---|---|---|---|---|---|---|")
    for gain in GAINS:
        for num_bases, num_experts in SIZES:
            for base_sd in BASE_SDS:
                found = simulate_power(spreads["mlp"], num_bases, num_experts, gain, base_sd, arguments.studies)
                print(
                    f"| {gain:g} | {num_bases} | {num_experts} | {base_sd:g} | {found.power:.2f} | "
                    f"{found.half_width:.1f} | {1.96 * found.error:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
