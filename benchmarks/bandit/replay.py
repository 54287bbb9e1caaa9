"""Sixty rounds of an unseen domain: regret of the bandit beside policies that do not learn, replayed from labels.

`python -m benchmarks.bandit.replay RUN --out DIR [--orders 40] [--rounds 60]`, where RUN is the directory of a finished
`simmerge demo`. For every domain the selector is trained on the merges without a checkpoint of it, and the policies are
started from that; then the other merges come one by one, in random orders (again from the start where there are fewer
than the rounds). One arm serves both parents' tasks. A reward is what one half of the items shows, regret is counted on
the other; both halves take both roles. Prints a table, writes `replay.json` and the curves `bandit-replay.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

POLICIES = ("uniform", "best fixed", "static selector", "greedy", "cold", "warm", "warm, safe", "oracle")
POWER, RIDGE, COLD_SPREAD, THRESHOLD = 1.0, 1.0, 0.1, 0.02
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Start:
    """What policies know before the first round of an unseen domain, and the merges that they are asked about.

    warm, prior: posteriors by arm, and one that knows nothing but how far arms usually differ. fixed: column of the
    best fixed arm. static: (M, K) predictions. gaps: by row of the dataset.
    """

    dataset: Any
    asked: Any
    warm: Mapping[str, Any]
    prior: Any
    noise: Any
    fixed: int
    static: np.ndarray
    gaps: Mapping[int, float]

    def rounds(self, first_half: bool) -> Any:
        from simmerge_ray.bandit.environment import rounds_of

        asked = self.asked
        return rounds_of(self.dataset, asked.rows, asked.z, asked.level, self.gaps, first_half)

    def order(self, number: int, num_rounds: int) -> np.ndarray:
        """Merges in random order, and again from the start where there are fewer than the rounds."""
        generator = np.random.default_rng([number, len(self.asked.rows)])
        times = -(-num_rounds // len(self.asked.rows))
        return np.concatenate([generator.permutation(len(self.asked.rows)) for _ in range(times)])[:num_rounds]


def starts(run: Path) -> dict[str, Start]:
    """By the domain that was left out of a finished demo run."""
    from simmerge_ray.config import TrainConfig
    from simmerge_ray.labels import LabelStore
    from simmerge_ray.runs import RunLayout
    from simmerge_ray.selector.dataset import build_dataset
    from simmerge_ray.selector.splits import Fold
    from simmerge_ray.signals.table import read_signal_table

    layout = RunLayout(run)
    dataset = build_dataset(read_signal_table(layout.signals), LabelStore(layout.labels).read())
    found = {}
    for task in sorted({context.task for context in dataset.contexts}):
        touching = {tuple(sorted((c.left, c.right))) for c in dataset.contexts if c.task == task}
        unseen = [tuple(sorted((c.left, c.right))) in touching for c in dataset.contexts]
        rows = range(len(unseen))
        fold = Fold(task, tuple(i for i in rows if not unseen[i]), tuple(i for i in rows if unseen[i]))
        found[task] = start_of(dataset, fold, TrainConfig())
    return found


def start_of(dataset: Any, fold: Any, config: Any) -> Start:
    from simmerge_ray.bandit.posterior import GaussianPosterior
    from simmerge_ray.bandit.warm_start import merge_values, merges_of, out_of_fold_level, warm_posteriors
    from simmerge_ray.selector.evaluation import Scoring
    from simmerge_ray.selector.splits import checkpoint_folds, pairs_of
    from simmerge_ray.selector.train import fit_models, usable_folds

    training = dataset.subset(fold.training)
    (model,) = fit_models(dataset, [fold.training], config)
    inner = usable_folds(checkpoint_folds(pairs_of(training.contexts), config.num_folds, config.seed))
    known = merges_of(training, model, range(len(training.contexts)))
    level = merge_values(out_of_fold_level(training, inner, config), known)
    warm, noise = warm_posteriors(known, dataset.arms, level, RIDGE, POWER)
    every = Scoring.of(dataset.contexts, dataset.arms)
    asked = merges_of(dataset, model, fold.tested)
    predicted = model.predict(dataset.features, [context.task for context in dataset.contexts])[0]
    return Start(
        dataset,
        asked,
        warm,
        GaussianPosterior.prior(asked.z.shape[1], noise.variance / COLD_SPREAD**2),
        noise,
        Scoring.of(training.contexts, dataset.arms).best_fixed(len(dataset.arms)),
        np.array([predicted[list(rows)].mean(0) for rows in asked.rows]),
        dict(zip(every.rows.tolist(), every.gap.tolist(), strict=True)),
    )


def play_domain(name: str, start: Start, num_rounds: int, num_orders: int) -> dict[str, np.ndarray]:
    """Regret (orders x halves, rounds, 2) by policy: in utility, and in GapClosed (NaN where that is not defined)."""
    from simmerge_ray.bandit.environment import (
        Always,
        Bandit,
        Highest,
        Player,
        expected_uniform,
        obtained,
        oracle,
        regret,
        replay,
    )
    from simmerge_ray.bandit.policy import NeuralLinearTS, SafeRule

    arms, warm, noise = start.dataset.arms, start.warm, start.noise
    found: dict[str, list[np.ndarray]] = {policy: [] for policy in POLICIES}
    for first_half in (True, False):
        whole = start.rounds(first_half)
        for number in range(num_orders):
            order = start.order(number, num_rounds)
            rounds, key = whole.ordered(order), f"{name}/{number}/{first_half}"
            players: dict[str, Player] = {
                "best fixed": Always(start.fixed),
                "static selector": Highest(start.static[order]),
                "greedy": Bandit(NeuralLinearTS(warm, noise), key, explore=False),
                "cold": Bandit(NeuralLinearTS(dict.fromkeys(arms, start.prior), noise), key),
                "warm": Bandit(NeuralLinearTS(warm, noise), key),
                "warm, safe": Bandit(NeuralLinearTS(warm, noise, SafeRule(arms[start.fixed], THRESHOLD)), key),
            }
            values = {policy: obtained(replay(player, rounds), rounds) for policy, player in players.items()}
            values |= {"uniform": expected_uniform(rounds), "oracle": oracle(rounds)}
            for policy, value in values.items():
                both = np.stack([regret(value, rounds), regret(value, rounds, as_gap_closed=True)], axis=-1)
                found[policy].append(both)
    return {policy: np.array(values) for policy, values in found.items()}


def table(results: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Per policy: regret over all rounds, and against uniform and best fixed with an interval over clusters."""
    clusters = list(results)
    totals = {
        name: np.array([np.nansum(results[cluster][name], axis=1).mean(0) for cluster in clusters]) for name in POLICIES
    }
    rounds = next(iter(results.values()))["uniform"].shape[1]
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(clusters), size=(NUM_RESAMPLES, len(clusters)))
    rows = []
    for name in POLICIES:
        ahead = (totals[name] - totals["best fixed"])[:, 1] / rounds
        low, high = np.quantile(ahead[drawn].mean(1), [0.025, 0.975])
        rows.append(
            {
                "policy": name,
                "utility": float(totals[name][:, 0].mean()),
                "gap_closed": float(totals[name][:, 1].mean()),
                "of_uniform": float(totals[name][:, 0].sum() / totals["uniform"][:, 0].sum()),
                "against_best_fixed": float(ahead.mean()),
                "interval": [float(low), float(high)],
            }
        )
    return rows


def draw(results: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> Path:
    """Mean cumulative regret of every policy, the band from the clusters' spread."""
    from simmerge_ray.figures import new_figure, save_figure

    figure, axes = new_figure(7, 4.5)
    axis = np.ravel(axes)[0]
    for name in POLICIES:
        curves = np.array([np.cumsum(values[name][..., 0], axis=1).mean(0) for values in results.values()])
        mean, error = curves.mean(0), curves.std(0, ddof=1) / np.sqrt(len(curves))
        (line,) = axis.plot(range(1, len(mean) + 1), mean, label=name)
        axis.fill_between(range(1, len(mean) + 1), mean - error, mean + error, alpha=0.15, color=line.get_color())
    axis.set_xlabel("round")
    axis.set_ylabel("cumulative regret (utility)")
    axis.legend()
    return save_figure(figure, out, "bandit-replay.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--orders", type=int, default=40)
    arguments = parser.parse_args()

    results = {}
    for task, start in starts(arguments.run).items():
        results[task] = play_domain(task, start, arguments.rounds, arguments.orders)
        print(f"{task}: {len(start.asked.rows)} merges", flush=True)
    rows_out = table(results)
    print("| policy | regret, utility | regret, GapClosed | of uniform | a round against best fixed, GapClosed |")
    print("|---|---|---|---|---|")
    for row in rows_out:
        low, high = row["interval"]
        print(
            f"| {row['policy']} | {row['utility']:.2f} | {row['gap_closed']:.2f} | {row['of_uniform']:.2f} | "
            f"{row['against_best_fixed']:+.3f} [{low:+.3f}, {high:+.3f}] |"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "replay.json").write_text(json.dumps(rows_out, indent=2) + "\n")
    print(draw(results, arguments.out))


if __name__ == "__main__":
    main()
