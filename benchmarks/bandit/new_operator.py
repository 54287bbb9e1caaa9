"""An operator that comes at round 20: is it found when it is better, and what does it cost when it is not?

`python -m benchmarks.bandit.new_operator DATASET [--arm LABEL ...] [--later LABEL ...] [--orders 20] [--rounds 120]` on
a finished `simmerge demo` or on labels of several bases, merges of an unseen domain as in `replay`. A new arm is made
up from the best fixed one: its utility plus 0.10 (at most 1), or, as a decoy, the mean of all arms; `--later` names an
operator whose real labels are used instead, and which neither the selector nor the warm start has seen. Nothing is
known of it: its prior knows only how far arms usually differ, or (`sibling`) what the best fixed arm has taught,
counting a tenth. Prints how often it is played after its first 15 pulls, and the regret over all rounds beside that of
the same policy without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.bandit.arguments import arguments_of
from simmerge_ray.research.bandit.clusters import Start, drawn_clusters, interval, load_with_later_arms, starts
from simmerge_ray.research.bandit.replay import Bandit, Rounds, obtained, replay
from simmerge_ray.service.bandit.policy import NeuralLinearTS
from simmerge_ray.service.bandit.posterior import GaussianPosterior

ARRIVAL, PULLS, BETTER, SIBLING_POWER = 20, 15, 0.10, 0.1
NEW, MADE_BETTER, DECOY = "new", "better by 0.10", "decoy"
FIGURES = ("reached", "rounds", "share", "pulls", "cost", "ahead")


def with_new_arm(start: Start, first_half: bool, kind: str) -> Rounds:
    """Every merge once with one more arm: `MADE_BETTER`, `DECOY`, or the real one of that name."""
    if kind not in (MADE_BETTER, DECOY):
        whole = start.rounds(first_half, (kind,))
        return replace(whole, arms=(*start.dataset.arms, NEW))
    rounds = start.rounds(first_half)

    def column(values: np.ndarray) -> np.ndarray:
        added = np.minimum(values[:, start.fixed] + BETTER, 1.0) if kind == MADE_BETTER else values.mean(1)
        return np.column_stack([values, added])

    exists = np.ones((len(rounds.z), len(rounds.arms) + 1), dtype=bool)
    arms = (*rounds.arms, NEW)
    return replace(rounds, arms=arms, reward=column(rounds.reward), truth=column(rounds.truth), available=exists)


def arriving(rounds: Rounds) -> Rounds:
    """The last arm exists from round `ARRIVAL` on."""
    available = rounds.available.copy()
    available[:ARRIVAL, -1] = False
    return replace(rounds, available=available)


def play(
    start: Start, kind: str, explore: bool, siblings: Sequence[bool], num_rounds: int, num_orders: int
) -> list[dict[str, float]]:
    """For each kind of prior the means over orders and halves.

    reached: share of the runs in which the new arm was played 15 times. rounds: that this took. share: of the rounds
    after it with the new arm. pulls: of it. cost: regret more than that of the same policy without the new arm. ahead:
    truth of the new arm less that of the best fixed, a round.
    """
    found: list[list[list[float]]] = [[] for _ in siblings]
    known = start.known
    for first_half in (True, False):
        whole = with_new_arm(start, first_half, kind)
        for number in range(num_orders):
            rounds, key = arriving(whole.ordered(start.order(number, num_rounds))), f"{number}/{first_half}"
            without = replace(rounds, available=rounds.available & (np.arange(len(rounds.arms)) < len(rounds.arms) - 1))
            alone = obtained(replay(Bandit(NeuralLinearTS(known.warm, known.noise), key, explore), without), rounds)
            ahead = float((rounds.truth[:, -1] - rounds.truth[:, start.fixed]).mean())
            for place, sibling in enumerate(siblings):
                played = _played(start, rounds, Bandit(NeuralLinearTS(known.warm, known.noise), key, explore), sibling)
                is_new = played == len(rounds.arms) - 1
                enough = np.flatnonzero(np.cumsum(is_new) >= PULLS)
                after = is_new[enough[0] + 1 :] if len(enough) else is_new[:0]
                reached, passed = float(len(enough) > 0), float(enough[0] - ARRIVAL) if len(enough) else np.nan
                share, cost = _mean(after), float((alone - obtained(played, rounds)).sum())
                found[place].append([reached, passed, share, float(is_new.sum()), cost, ahead])
    return [dict(zip(FIGURES, map(_mean, zip(*one, strict=True)), strict=True)) for one in found]


def _played(start: Start, rounds: Rounds, player: Bandit, sibling: bool) -> np.ndarray:
    def arrive(number: int) -> None:
        if number == ARRIVAL:
            fixed = player.policy.posterior(player.policy.arms[start.fixed])
            blank = GaussianPosterior.prior(fixed.num_dimensions)
            player.policy.add_arm(NEW, fixed.discounted(SIBLING_POWER, blank) if sibling else start.known.prior)

    return replay(player, rounds, on_round=arrive)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Of those that are known."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def main() -> None:
    parser = arguments_of(__doc__, orders=20, rounds=120)
    parser.add_argument("--later", action="append", default=[], help="an operator that comes later; needs --arm")
    arguments = parser.parse_args()
    if arguments.later and not arguments.arm:
        parser.error("--later needs the arms of the start, --arm")
    loaded = load_with_later_arms(arguments.dataset, arguments.arm, arguments.later)
    known = starts(loaded.dataset, loaded.base_of)
    weights = drawn_clusters(list(known))
    print("| new arm | ahead | policy | its prior | 15 pulls | after rounds | then its share | pulls | regret more |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in arguments.later or (MADE_BETTER, DECOY):
        for explore in (True, False):
            every = [
                play(one, kind, explore, (False, True), arguments.rounds, arguments.orders) for one in known.values()
            ]
            for place, prior in enumerate(("nothing known", "sibling")):
                values = {name: np.array([one[place][name] for one in every]) for name in FIGURES}
                mean = {name: _mean(one) for name, one in values.items()}
                low, high = interval(weights, values["cost"])
                print(
                    f"| {kind} | {mean['ahead']:+.3f} | {'Thompson' if explore else 'greedy'} | {prior} | "
                    f"{100 * mean['reached']:.0f} % | {mean['rounds']:.0f} | {100 * mean['share']:.0f} % | "
                    f"{mean['pulls']:.0f} | {mean['cost']:+.2f} [{low:+.2f}, {high:+.2f}] |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
