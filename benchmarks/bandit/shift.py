"""Rounds of known domains, then a shift to an unseen one: does retraining the encoder help, and does exploring?

`python -m benchmarks.bandit.shift DATASET --out DIR [--arm LABEL ...] [--orders 1] [--rounds 120]` on labels of several
bases. The bases are halved at random; labels of one half without the unseen domain are all that the selector starts
from, and the merges of the other half come online, in random order: first `--rounds` of known domains, then as many
with a checkpoint of the unseen one. The retrained encoder learns labels and rewards so far at the shift and again
half-way after it, and the whole log is folded again with it, as in `service.retraining`; the frozen one stays. Both
halves of the bases are online once, and so is every domain unseen. Regret is per round, by base;
prints a table with intervals over clusters, writes `bandit-shift.json` and the curves `bandit-shift.png`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bandit.arguments import arguments_of
from benchmarks.measuring import markdown
from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.markdown import with_interval
from simmerge_ray.research.bandit.clusters import (
    Cluster,
    Knowledge,
    best_fixed_column,
    draw_regret,
    drawn_clusters,
    gaps_of,
    interval,
    learned,
    load_with_later_arms,
    repeated,
)
from simmerge_ray.research.bandit.replay import (
    Bandit,
    Rounds,
    expected_uniform,
    obtained,
    regret,
    replay,
    rounds_of,
)
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.rewards import RewardedMerge
from simmerge_ray.selector.data.scoring import units_of
from simmerge_ray.selector.data.splits import domain_folds
from simmerge_ray.service.bandit.policy import NeuralLinearTS
from simmerge_ray.service.bandit.warm_start import merges_of

LEARNERS = tuple((explore, retrained) for explore in (True, False) for retrained in (False, True))
BEFORE, FIRST, SECOND = "before", "after, first half", "after, second half"
CONFIG = TrainConfig(num_members=3, num_epochs=200, num_folds=3)  # trained many times over, so smaller than the default


def name_of(explore: bool, retrained: bool) -> str:
    """Of a learner, for people."""
    return f"{'Thompson' if explore else 'greedy'}, {'retrained' if retrained else 'frozen'}"


NAMES = ("uniform", "best fixed", *(name_of(*one) for one in LEARNERS))


@dataclass(frozen=True)
class Stream:
    """Merges that come online. known: labels that are there before. units: rows of the dataset, round by round.

    parts: rounds of `BEFORE`, `FIRST` and `SECOND`, one after the other.
    """

    dataset: SelectionDataset
    known: SelectionDataset
    units: tuple[tuple[int, ...], ...]
    parts: tuple[range, ...]
    gaps: Mapping[int, float]

    def rounds(self, knowledge: Knowledge, first_half: bool) -> Rounds:
        """All rounds as a selector sees them."""
        rows = sorted({row for unit in self.units for row in unit})
        merges = merges_of(self.dataset, knowledge.model, rows)
        whole = rounds_of(self.dataset, merges.rows, merges.z, merges.level, self.gaps, first_half)
        place = {unit: number for number, unit in enumerate(merges.rows)}
        return whole.ordered([place[unit] for unit in self.units])

    def rewarded(self, played: Sequence[int], rounds: Rounds) -> list[RewardedMerge]:
        """The log so far, as training data."""
        found = []
        for number, column in enumerate(played):
            rows, contexts = list(self.units[number]), [self.dataset.contexts[row] for row in self.units[number]]
            members, tasks = (contexts[0].left, contexts[0].right), tuple(one.task for one in contexts)
            utility = float(rounds.reward[number, column])
            found.append(RewardedMerge(members, tasks, rounds.arms[column], utility, self.dataset.features[rows]))
        return found


def halves_of(bases: Sequence[str], seed: int = 0) -> list[frozenset[str]]:
    """Two random halves. Raises ValueError for a single base."""
    names = sorted(set(bases))
    if len(names) < 2:
        raise ValueError(f"the labels are of one base ({', '.join(names)}); a shift needs a second one to start from")
    mixed = [names[place] for place in np.random.default_rng([seed, len(names)]).permutation(len(names))]
    return [frozenset(mixed[0::2]), frozenset(mixed[1::2])]


def stream_of(
    dataset: SelectionDataset, base_of: Mapping[str, str], online: frozenset[str], domain: str, number: int, rounds: int
) -> Stream:
    """One random order of the merges of the bases that are online."""
    fold = next(one for one in domain_folds(dataset.contexts) if one.name == domain)
    unseen = set(fold.tested)
    is_online = [base_of[context.left] in online for context in dataset.contexts]
    known = dataset.subset([row for row in fold.training if not is_online[row]])
    units = [tuple(unit) for unit in units_of(dataset.contexts, per_merge=True) if is_online[unit[0]]]
    seen, new = ([unit for unit in units if (unit[0] in unseen) == side] for side in (False, True))
    drawn = [part[place] for part in (seen, new) for place in repeated(len(part), rounds, number)]
    middle = rounds + rounds // 2
    parts = (range(rounds), range(rounds, middle), range(middle, 2 * rounds))
    return Stream(dataset, known, tuple(drawn), parts, gaps_of(dataset))


def learn(
    stream: Stream,
    start: Knowledge,
    first_half: bool,
    explore: bool,
    key: str,
    config: TrainConfig | None = None,
) -> np.ndarray:
    """(T,) columns played by one learner; with a config its encoder is retrained between the parts."""
    rounds, policy = stream.rounds(start, first_half), NeuralLinearTS(start.warm, start.noise)
    played: list[int] = []
    for part in stream.parts:
        if config is not None and played:
            known = learned(stream.known, config, stream.rewarded(played, rounds))
            rounds, policy = stream.rounds(known, first_half), NeuralLinearTS(known.warm, known.noise)
            player = Bandit(policy, key)
            for number, column in enumerate(played):  # the old log, folded with the new encoder
                player.learn(number, column, float(rounds.reward[number, column]), rounds)
        player, here = Bandit(policy, f"{key}/{part.start}", explore), rounds.ordered(part)
        columns = replay(player, here)
        player.learn(len(columns) - 1, int(columns[-1]), float(here.reward[-1, columns[-1]]), here)
        played += columns.tolist()
    return np.array(played)


def play(stream: Stream, num: int, config: TrainConfig = CONFIG) -> dict[str, np.ndarray]:
    """(2, T) regret in utility by policy, for both halves of the items; `num` is of the order."""
    start = learned(stream.known, config)
    found: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for first_half in (True, False):
        rounds, fixed = stream.rounds(start, first_half), best_fixed_column(stream.known)
        found["uniform"].append(regret(expected_uniform(rounds), rounds))
        found["best fixed"].append(regret(rounds.truth[:, fixed], rounds))
        for explore, retrained in LEARNERS:
            played = learn(stream, start, first_half, explore, f"{num}/{first_half}", config if retrained else None)
            found[name_of(explore, retrained)].append(regret(obtained(played, rounds), rounds))
    return {name: np.array(values) for name, values in found.items()}


def by_cluster(
    streams: Sequence[tuple[Stream, str, Mapping[str, np.ndarray]]], base_of: Mapping[str, str]
) -> dict[Cluster, dict[str, np.ndarray]]:
    """By base and unseen domain, and policy: (2 halves x orders, T) regret, NaN in the rounds of other bases."""
    found: dict[Cluster, dict[str, list[np.ndarray]]] = {}
    for stream, domain, regrets in streams:
        bases = np.array([base_of[stream.dataset.contexts[unit[0]].left] for unit in stream.units])
        for base in sorted(set(bases.tolist())):
            of = found.setdefault((base, domain), {name: [] for name in regrets})
            for name, values in regrets.items():
                of[name] += list(np.where(bases == base, values, np.nan))
    return {one: {name: np.array(values) for name, values in of.items()} for one, of in found.items()}


def table(results: Mapping[Cluster, Mapping[str, np.ndarray]], parts: Sequence[range]) -> list[dict[str, Any]]:
    """Regret a round by policy and part, and of retrained less frozen, with intervals over clusters."""
    weights = drawn_clusters(list(results))
    rows = []
    for part, rounds in zip((BEFORE, FIRST, SECOND), parts, strict=True):
        count = np.array([np.sum(~np.isnan(of["uniform"][:, rounds])) for of in results.values()], dtype=float)
        totals = {name: np.array([np.nansum(of[name][:, rounds]) for of in results.values()]) for name in NAMES}
        for how in ("Thompson", "greedy"):
            totals[f"{how}, retrained - frozen"] = totals[f"{how}, retrained"] - totals[f"{how}, frozen"]
        for how in ("frozen", "retrained"):
            totals[f"Thompson - greedy, {how}"] = totals[f"Thompson, {how}"] - totals[f"greedy, {how}"]
        totals["Thompson, frozen - best fixed"] = totals["Thompson, frozen"] - totals["best fixed"]
        for name, total in totals.items():
            low, high = interval(weights, total, count)
            rows.append({"part": part, "policy": name, "regret": total.sum() / count.sum(), "interval": [low, high]})
    return rows


def draw(results: Mapping[Cluster, Mapping[str, np.ndarray]], shift: int, out: Path) -> Path:
    """Mean regret of the rounds so far times their number, with 95 % intervals over clusters.

    A cluster has some of the rounds only, so a sum over rounds would not weigh the same clusters in each.
    """
    weights, curves = drawn_clusters(list(results)), {}
    for name in NAMES:
        values = np.array([np.nansum(of[name], axis=0) for of in results.values()])
        count = np.array([np.sum(~np.isnan(of[name]), axis=0) for of in results.values()], dtype=float)
        values, count = np.cumsum(values, axis=1), np.cumsum(count, axis=1)
        numbers = np.arange(1, values.shape[1] + 1)
        curves[name] = numbers * values.sum(0) / count.sum(0), numbers * interval(weights, values, count)
    label = "round (dotted: the shift, where retrained first; half-way after it, again)"
    return draw_regret(curves, label, out / "bandit-shift.png", (shift + 0.5, shift + shift // 2 + 0.5))


def main() -> None:
    parser = arguments_of(__doc__, orders=1, rounds=120)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    loaded = load_with_later_arms(arguments.dataset, arguments.arm)
    dataset, base_of, streams = loaded.dataset, loaded.base_of, []
    bases = [base_of[context.left] for context in dataset.contexts]
    for online in halves_of(bases):
        for domain in sorted({context.task for context in dataset.contexts}):
            for number in range(arguments.orders):
                stream = stream_of(dataset, base_of, online, domain, number, arguments.rounds)
                streams.append((stream, domain, play(stream, number)))
                print(f"{domain}, {len(online)} bases online, order {number}", flush=True)
    results = by_cluster(streams, base_of)
    rows = table(results, streams[0][0].parts)
    shown: dict[str, list[str]] = {}
    for row in rows:
        cell = with_interval(row["regret"], row["interval"], signed=True, digits=4)
        shown.setdefault(row["policy"], [row["policy"]]).append(cell)
    print(markdown(("policy", BEFORE, FIRST, SECOND), list(shown.values())))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bandit-shift.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(draw(results, arguments.rounds, arguments.out))


if __name__ == "__main__":
    main()
