"""What it is worth that a parent may be kept: labels of several bases, each base left out in turn.

`python -m benchmarks.selection.keep [docs/study/labels.parquet] [--model ridge]` prints for every policy GapClosed (one
arm per merge), its gain over the best fixed arm with a 95 % interval over bases and checkpoints, the mean utility of
both parents' tasks, and the share of merges in which it keeps a parent.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.measuring import markdown, script_parser


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("dataset", type=Path, nargs="?", default=Path("docs/study/labels.parquet"))
    parser.add_argument("--model", default="ridge")
    arguments = parser.parse_args()

    import numpy as np

    from simmerge_ray.base.config import TrainConfig
    from simmerge_ray.selector.assessment.baselines import BASELINES
    from simmerge_ray.selector.assessment.crossval import bench_of
    from simmerge_ray.selector.assessment.folds import CrossValidation
    from simmerge_ray.selector.data.dataset import with_keep
    from simmerge_ray.selector.data.files import find_dataset, read_dataset
    from simmerge_ray.selector.data.scoring import keeping_no_parent, option_scores, shares_of
    from simmerge_ray.selector.data.splits import base_folds, pairs_of

    loaded, config = read_dataset(find_dataset(arguments.dataset)), TrainConfig(model=arguments.model, num_members=3)
    plain, kept = loaded.dataset, with_keep(loaded.dataset)
    folds = base_folds(pairs_of(plain.contexts), loaded.base_of)
    without, crossval = (CrossValidation.of(one, config, folds) for one in (plain, kept))
    predicted = crossval.unseen(kept, config)
    scores = {
        "selector without keep": keeping_no_parent(without.unseen(plain, config)),
        "selector with keep, operators alone": keeping_no_parent(predicted[:, :-2]),
        "selector with keep": option_scores(predicted, kept.arms),
        "best fixed": crossval.baseline(BASELINES["best fixed"]),
        "better parent, in hindsight": crossval.baseline(BASELINES["better parent"]),
    }
    bench = bench_of(crossval, True, loaded.base_of)
    shares = {name: shares_of(values, bench.units) for name, values in scores.items()}
    rows = []
    for name, one in shares.items():
        figures = bench.measure(one, shares["best fixed"])
        low, high = figures["gain_interval"]
        utility, share = (one * kept.utilities).sum(1).mean(), one[:, -2:].sum(1).mean()
        gain = f"{figures['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
        rows.append((name, f"{figures['gap_closed']:.3f}", gain, f"{utility:.3f}", f"{share:.2f}"))
    print(markdown((arguments.model, "GapClosed", "over best fixed", "utility", "kept"), rows), end="\n\n")
    right = (predicted[:, -2:].argmax(1) == kept.utilities[:, -2:].argmax(1)).mean()
    rmse = np.sqrt(np.square(predicted - kept.utilities).mean(0))
    print(
        f"better parent named in {right:.1%} of the contexts; RMSE of {', '.join(kept.arms)}: {rmse.round(3).tolist()}"
    )


if __name__ == "__main__":
    main()
