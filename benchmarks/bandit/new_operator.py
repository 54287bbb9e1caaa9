"""An operator that comes at round 20: is it found when it is better, and what does it cost when it is not?

`python -m benchmarks.bandit.new_operator RUN [--orders 20] [--rounds 120]` on a finished `simmerge demo`, merges of an
unseen domain as in `replay`. The new arm is made up from the best fixed one: its utility plus 0.10 (at most 1), or, as
a decoy, the mean of all arms. Nothing is known of it: its prior knows only how far arms usually differ, or (`sibling`)
what the best fixed arm has taught, counting a tenth. Prints how often it is played after its first 15 pulls, and the
regret over all rounds beside that of the same policy without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bandit.replay import Start, starts

ARRIVAL, PULLS, BETTER, SIBLING_POWER = 20, 15, 0.10, 0.1
NEW = "new"


def with_new_arm(rounds: Any, fixed: int, better: bool) -> Any:
    """The rounds with one more arm, which exists from `ARRIVAL` on."""
    from dataclasses import replace

    def column(values: np.ndarray) -> np.ndarray:
        added = np.minimum(values[:, fixed] + BETTER, 1.0) if better else values.mean(1)
        return np.column_stack([values, added])

    exists = np.arange(len(rounds.z)) >= ARRIVAL
    return replace(
        rounds,
        arms=(*rounds.arms, NEW),
        reward=column(rounds.reward),
        truth=column(rounds.truth),
        available=np.column_stack([rounds.available, exists]),
    )


def play(
    start: Start, better: bool, explore: bool, sibling: bool, num_rounds: int, num_orders: int
) -> dict[str, float]:
    """Means over orders and halves: share of rounds with the new arm once it was played 15 times, pulls of it, extra
    regret against the same policy without the new arm, best possible gain by it."""
    from simmerge_ray.bandit.environment import Bandit, obtained, replay
    from simmerge_ray.bandit.policy import NeuralLinearTS
    from simmerge_ray.bandit.posterior import GaussianPosterior
    from simmerge_ray.bandit.warm_start import sibling_prior

    shares, pulls, costs, first = [], [], [], []
    for first_half in (True, False):
        whole = start.rounds(first_half)
        for number in range(num_orders):
            rounds = with_new_arm(whole.ordered(start.order(number, num_rounds)), start.fixed, better)
            policy = NeuralLinearTS(start.warm, start.noise)

            def arrive(round_number: int, policy: NeuralLinearTS = policy) -> None:
                if round_number == ARRIVAL:
                    fixed = policy.posterior(policy.arms[start.fixed])
                    blank = GaussianPosterior.prior(len(start.prior.moment))
                    policy.add_arm(NEW, sibling_prior(fixed, blank, SIBLING_POWER) if sibling else start.prior)

            key = f"{number}/{first_half}"
            played = replay(Bandit(policy, key, explore), rounds, on_round=arrive)
            alone = replay(Bandit(NeuralLinearTS(start.warm, start.noise), key, explore), rounds)
            is_new = played == len(rounds.arms) - 1
            learned = np.flatnonzero(np.cumsum(is_new) >= PULLS)
            after = is_new[learned[0] + 1 :] if len(learned) else is_new[:0]
            shares.append(float(after.mean()) if len(after) else np.nan)
            pulls.append(float(is_new.sum()))
            first.append(float(learned[0] - ARRIVAL) if len(learned) else np.nan)
            costs.append(float((obtained(alone, rounds) - obtained(played, rounds)).sum()))
    return {
        "share": float(np.nanmean(shares)) if not np.isnan(shares).all() else float("nan"),
        "reached": float(np.mean(~np.isnan(shares))),
        "rounds": float(np.nanmean(first)) if not np.isnan(first).all() else float("nan"),
        "pulls": float(np.mean(pulls)),
        "cost": float(np.mean(costs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=120)
    arguments = parser.parse_args()
    known = starts(arguments.run)
    print("| new arm | policy | its prior | played 15 times | after rounds | then its share | pulls | regret more |")
    print("|---|---|---|---|---|---|---|---|")
    for better in (True, False):
        for explore in (True, False):
            for sibling in (False, True):
                found = [
                    play(start, better, explore, sibling, arguments.rounds, arguments.orders)
                    for start in known.values()
                ]
                mean = {key: float(np.nanmean([one[key] for one in found])) for key in found[0]}
                print(
                    f"| {'better by 0.10' if better else 'decoy'} | {'Thompson' if explore else 'greedy'} | "
                    f"{'sibling' if sibling else 'nothing known'} | {100 * mean['reached']:.0f} % | "
                    f"{mean['rounds']:.0f} | {100 * mean['share']:.0f} % | {mean['pulls']:.0f} | {mean['cost']:+.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
