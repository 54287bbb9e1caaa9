"""How large the study must be: its power, simulated from the labels of a finished `simmerge demo`.

`python -m benchmarks.selection.power RUN [--studies 200]` prints the spread of a merge's gain over the best fixed arm
(one model unseen) and, for several sizes and true gains, how often the lower end of the 95 % interval is above 0.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from benchmarks.measuring import markdown, script_parser

SIZES = ((5, 5), (6, 8), (8, 12), (12, 8), (12, 12), (20, 8))
GAINS = (4.0, 6.0)
BASE_SDS = (0.0, 3.0)


def main() -> None:
    parser = script_parser(__doc__)
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
    rows = [
        (model, spread.num_merges, *(f"{value:.1f}" for value in (spread.mean, spread.checkpoint, spread.rest)))
        for model, spread in spreads.items()
    ]
    print(markdown(("model", "merges", "mean gain", "sd, a checkpoint", "sd, pair and items"), rows), end="\n\n")
    rows = []
    for gain, (num_bases, num_experts), base_sd in product(GAINS, SIZES, BASE_SDS):
        found = simulate_power(spreads["mlp"], num_bases, num_experts, gain, base_sd, arguments.studies)
        figures = f"{found.power:.2f}", f"{found.half_width:.1f}", f"{1.96 * found.error:.1f}"
        rows.append((f"{gain:g}", num_bases, num_experts, f"{base_sd:g}", *figures))
    header = ("true gain", "bases", "experts a base", "sd of bases", "power", "half-width", "1.96 x true error")
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
