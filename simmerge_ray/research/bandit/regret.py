"""Sixty rounds of an unseen domain: regret of the bandit beside policies that do not learn, replayed from labels.

Policies are started from a selector that never saw the domain; then the merges of one base come one by one, in random
orders (again from the start where there are fewer than the rounds). One arm serves both parents' tasks. A reward is
what one half of the items shows, regret is counted on the other; both halves take both roles.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.markdown import with_interval
from simmerge_ray.base.storage import Place, digest_json, write_atomically, write_json
from simmerge_ray.research.bandit import clusters
from simmerge_ray.research.bandit.clusters import Cluster, Start, drawn_clusters, interval
from simmerge_ray.research.bandit.replay import (
    Bandit,
    Highest,
    Player,
    always,
    expected_uniform,
    obtained,
    oracle,
    regret,
    replay,
)
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.selector.data.files import find_dataset
from simmerge_ray.selector.data.splits import domain_folds
from simmerge_ray.service.bandit.policy import NeuralLinearTS, SafeRule
from simmerge_ray.signals.table_files import digest_table

POLICIES = ("uniform", "best fixed", "static selector", "greedy", "cold", "warm", "warm, safe", "oracle")
THRESHOLD = 0.02

Say = Callable[[str], None]
Results = Mapping[Cluster, Mapping[str, np.ndarray]]
"""By cluster and policy (orders x halves, rounds, 2): regret in utility, and in GapClosed."""


def play(name: str, start: Start, num_rounds: int, num_orders: int) -> dict[str, np.ndarray]:
    """Regret (orders x halves, rounds, 2) by policy: in utility, and in GapClosed (NaN where that is not defined)."""
    arms, warm, noise = start.dataset.arms, start.known.warm, start.known.noise
    found: dict[str, list[np.ndarray]] = {policy: [] for policy in POLICIES}
    for first_half in (True, False):
        whole = start.rounds(first_half)
        for number in range(num_orders):
            order = start.order(number, num_rounds)
            rounds, key = whole.ordered(order), f"{name}/{number}/{first_half}"
            players: dict[str, Player] = {
                "best fixed": always(start.fixed, rounds),
                "static selector": Highest(start.static[order]),
                "greedy": Bandit(NeuralLinearTS(warm, noise), key, explore=False),
                "cold": Bandit(NeuralLinearTS(dict.fromkeys(arms, start.known.prior), noise), key),
                "warm": Bandit(NeuralLinearTS(warm, noise), key),
                "warm, safe": Bandit(NeuralLinearTS(warm, noise, SafeRule(arms[start.fixed], THRESHOLD)), key),
            }
            values = {policy: obtained(replay(player, rounds), rounds) for policy, player in players.items()}
            values |= {"uniform": expected_uniform(rounds), "oracle": oracle(rounds)}
            for policy, value in values.items():
                both = np.stack([regret(value, rounds), regret(value, rounds, as_gap_closed=True)], axis=-1)
                found[policy].append(both)
    return {policy: np.array(values) for policy, values in found.items()}


def table(results: Results) -> list[dict[str, Any]]:
    """Per policy: regret over all rounds, and against uniform and best fixed with intervals over clusters."""
    totals = {name: np.array([np.nansum(one[name], axis=1).mean(0) for one in results.values()]) for name in POLICIES}
    rounds = next(iter(results.values()))["uniform"].shape[1]
    weights = drawn_clusters(list(results))
    uniform, rows = totals["uniform"][:, 0], []
    for name in POLICIES:
        mine = totals[name][:, 0]
        ahead = (totals[name] - totals["best fixed"])[:, 1] / rounds
        rows.append(
            {
                "policy": name,
                "utility": float(mine.mean()),
                "utility_interval": interval(weights, mine).tolist(),
                "gap_closed": float(totals[name][:, 1].mean()),
                "of_uniform": float(mine.sum() / uniform.sum()),
                "of_uniform_interval": interval(weights, mine, uniform).tolist(),
                "against_best_fixed": float(ahead.mean()),
                "interval": interval(weights, ahead).tolist(),
            }
        )
    return rows


def draw(results: Results, out: Path, name: str) -> Place:
    """Mean cumulative regret of every policy with 95 % intervals over clusters."""
    weights, curves = drawn_clusters(list(results)), {}
    for policy in POLICIES:
        regrets = np.array([np.cumsum(values[policy][..., 0], axis=1).mean(0) for values in results.values()])
        curves[policy] = regrets.mean(0), interval(weights, regrets)
    return clusters.draw_regret(curves, "round", out / f"{name}.png")


def replay_dataset(
    path: Path, out: Path, name: str, arms: Sequence[str] | None, num_orders: int, num_rounds: int, say: Say = print
) -> list[dict[str, Any]]:
    """Play all clusters of a data set; `table`'s rows, also in `NAME.json`, with the curves in `NAME.png`. Results of a
    domain are kept in `NAME.parts` by the digest of all that they were made from, and not played again."""
    loaded, files = clusters.load_with_later_arms(path, arms), find_dataset(path)
    digests = {str(number): digest_table(one) for number, one in enumerate(files.signals)}
    digests |= {f"labels {number}": LabelStore(one).digest() for number, one in enumerate(files.labels)}
    content = [1, digests, list(loaded.dataset.arms), num_orders, num_rounds, THRESHOLD]
    results: dict[Cluster, Mapping[str, np.ndarray]] = {}
    for fold in domain_folds(loaded.dataset.contexts):
        part = out / f"{name}.parts" / f"{digest_json([*content, fold.name])}.npz"
        if not part.exists():
            starts = clusters.starts_of(fold, loaded.dataset, loaded.base_of).items()
            played = {cluster: play("/".join(cluster), start, num_rounds, num_orders) for cluster, start in starts}
            buffer = io.BytesIO()
            arrays: dict[str, Any] = {
                json.dumps([*key, policy]): values for key, of in played.items() for policy, values in of.items()
            }
            np.savez(buffer, **arrays)
            write_atomically(part, buffer.getvalue())
            say(f"{fold.name}: {len(played)} clusters played")
        with np.load(part) as kept:
            for key in kept.files:
                base, domain, policy = json.loads(key)
                results[base, domain] = {**results.get((base, domain), {}), policy: kept[key]}
    rows = table(results)
    write_json(out / f"{name}.json", rows)
    say(str(draw(results, out, name)))
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of `table`'s rows for people."""
    lines = ["| policy | regret, utility | regret, GapClosed | of uniform | a round against best fixed, GapClosed |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        utility, share = (with_interval(row[of], row[f"{of}_interval"], digits=2) for of in ("utility", "of_uniform"))
        ahead = with_interval(row["against_best_fixed"], row["interval"], signed=True)
        lines.append(f"| {row['policy']} | {utility} | {row['gap_closed']:.2f} | {share} | {ahead} |")
    return lines
