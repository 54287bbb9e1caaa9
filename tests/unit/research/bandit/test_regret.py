"""The statistics of the benchmarks of the bandit, on small data sets of two bases and three domains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.bandit import new_operator, shift
from simmerge_ray.base.config import TrainConfig
from simmerge_ray.research.bandit.clusters import (
    drawn_clusters,
    interval,
    learned,
    load_with_later_arms,
    repeated,
    starts,
)
from simmerge_ray.research.bandit.regret import POLICIES, draw, play, table
from simmerge_ray.search.headroom import Context
from simmerge_ray.selector.data.dataset import SelectionDataset
from tests.unit.selector.made_up import ARMS, COLUMNS, write_study

CONFIG = TrainConfig(num_members=2, num_epochs=60, num_folds=3)
DOMAINS = ("s", "t", "u")
CLUSTERS = [(base, domain) for base in ("one", "two") for domain in DOMAINS]


def two_bases(num_items: int = 60) -> tuple[SelectionDataset, dict[str, str]]:
    """Three checkpoints of each domain on each base, all pairs on their own domains; a feature says what is best."""
    generator = np.random.default_rng(0)
    contexts, features, base_of = [], [], {}
    for base in ("one", "two"):
        names = [(f"{base}-{domain}{number}", domain) for domain in DOMAINS for number in range(3)]
        base_of |= {name: base for name, _ in names}
        for place, (left, of_left) in enumerate(names):
            for right, of_right in names[place + 1 :]:
                x = generator.normal(size=len(COLUMNS))
                rates = {"linear": 0.7 if x[-1] > 0 else 0.4, "nuslerp": 0.5, "ties": 0.4 if x[-1] > 0 else 0.7}
                for task in sorted({of_left, of_right}):
                    every = {arm: rates[arm] for arm in ARMS} | {"later": 0.9, "left": 0.9, "right": 0.1}
                    items = {arm: (generator.random(num_items) < rate).astype(float) for arm, rate in every.items()}
                    parents = items.pop("left"), items.pop("right")
                    contexts.append(Context(left, right, task, items, *parents))
                    features.append([x, x])
    utilities = np.array([[one.arms[arm].mean() for arm in ARMS] for one in contexts])
    return SelectionDataset(tuple(contexts), ARMS, COLUMNS, np.array(features), utilities), base_of


@pytest.fixture(scope="module")
def known():
    return starts(*two_bases(), CONFIG)


def test_a_cluster_has_the_merges_of_its_base_with_its_domain(known):
    assert sorted(known) == CLUSTERS
    for (base, domain), start in known.items():
        assert len(start.asked.rows) == 21  # of 36 pairs, less the 15 of the six other checkpoints
        for unit in start.asked.rows:
            contexts = [start.dataset.contexts[row] for row in unit]
            assert all(one.left.startswith(base) for one in contexts) and any(one.task == domain for one in contexts)
    assert known["one", "s"].known is known["two", "s"].known  # one selector for a domain


def test_the_oracle_has_no_regret_and_the_best_fixed_arm_none_against_itself(known):
    results = {one: play("/".join(one), known[one], 30, 1) for one in CLUSTERS}
    rows = {row["policy"]: row for row in table(results)}
    assert set(rows) == set(POLICIES)
    assert rows["oracle"]["utility"] == 0.0 and rows["oracle"]["utility_interval"] == [0.0, 0.0]
    assert rows["best fixed"]["interval"] == [0.0, 0.0] and rows["uniform"]["of_uniform"] == 1.0
    assert 0 < rows["static selector"]["of_uniform"] < 0.5  # the feature decides, and it was learned
    low, high = rows["warm"]["of_uniform_interval"]
    assert low <= rows["warm"]["of_uniform"] <= high


def test_curves_are_drawn(known, tmp_path):
    results = {one: play("/".join(one), known[one], 6, 1) for one in CLUSTERS[:2]}
    assert draw(results, tmp_path, "name").read_bytes().startswith(b"\x89PNG")


def test_merges_come_again_only_after_all_have_come():
    order = repeated(7, 20, number=3)
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7)) and len(order) == 20
    assert (order == repeated(7, 20, number=3)).all() and (order != repeated(7, 20, number=4)).any()


def test_samples_are_of_bases_then_of_their_domains():
    weights = drawn_clusters([("one", "s"), ("one", "t"), ("one", "u"), ("two", "s")], 4000)
    of_one = weights[:, :3].sum(1)
    assert set(of_one) <= {0.0, 3.0, 6.0}  # whole bases, as many of their domains as they have
    assert (of_one / 3 + weights[:, 3] == 2).all()
    np.testing.assert_allclose(weights.mean(0), 1.0, atol=0.06)  # 4 standard errors of 4000 draws


def test_an_interval_of_a_ratio_is_that_of_sums():
    weights = drawn_clusters(CLUSTERS)
    values, divisor = np.arange(6.0), np.full(6, 2.0)
    np.testing.assert_allclose(interval(weights, values, divisor), interval(weights, values) / 2)
    np.testing.assert_allclose(interval(weights, np.full(6, 3.0)), [3.0, 3.0])
    np.testing.assert_allclose(interval(weights, np.array([np.nan, *np.full(5, 3.0)])), [3.0, 3.0])
    assert np.isnan(interval(weights, np.full(6, np.nan))).all()


def test_labels_of_an_operator_that_comes_later_are_no_part_of_the_start(tmp_path):
    path = write_study(tmp_path, ("p", "q"))
    loaded = load_with_later_arms(path, ("linear",), ("ties",))
    assert loaded.dataset.arms == ("linear",) and loaded.dataset.utilities.shape[1] == 1
    assert set(loaded.base_of.values()) == {"p-base", "q-base"}
    assert load_with_later_arms(path).dataset.arms == ("linear", "ties")


def test_a_later_operator_that_is_better_is_found(known):
    start = known["one", "s"]
    rounds = new_operator.with_new_arm(start, True, "later")
    np.testing.assert_array_equal(rounds.reward[:, :-1], start.rounds(True).reward)
    assert not new_operator.arriving(rounds.ordered(range(21))).available[:20, -1].any()
    (found,) = new_operator.play(start, "later", True, (False,), 120, 1)
    assert found["ahead"] > 0.2 and found["reached"] == 1.0 and found["share"] > 0.8 and found["cost"] < -5


def test_what_is_made_up_is_better_or_a_mean(known):
    start = known["two", "t"]
    better, decoy = (
        new_operator.with_new_arm(start, True, kind) for kind in (new_operator.MADE_BETTER, new_operator.DECOY)
    )
    np.testing.assert_allclose(better.truth[:, -1], np.minimum(better.truth[:, start.fixed] + 0.1, 1))
    np.testing.assert_allclose(decoy.truth[:, -1], decoy.truth[:, :-1].mean(1))


def test_after_a_shift_come_merges_of_the_unseen_domain_alone():
    dataset, base_of = two_bases()
    online, other = shift.halves_of(list(base_of.values()))
    assert len(online) == len(other) == 1 and not online & other
    stream = shift.stream_of(dataset, base_of, online, "t", 0, 20)
    assert [len(part) for part in stream.parts] == [20, 10, 10]
    touching = [any(dataset.contexts[row].task == "t" for row in unit) for unit in stream.units]
    assert not any(touching[:20]) and all(touching[20:])
    assert {base_of[dataset.contexts[unit[0]].left] for unit in stream.units} == online
    assert {base_of[one.left] for one in stream.known.contexts} == other
    assert "t" not in {one.task for one in stream.known.contexts}
    with pytest.raises(ValueError, match="one base"):
        shift.halves_of(["one"])


def test_learners_share_the_start_and_a_retrained_one_differs_only_after_the_shift():
    dataset, base_of = two_bases()
    stream = shift.stream_of(dataset, base_of, frozenset({"one"}), "t", 0, 20)
    start = learned(stream.known, CONFIG)
    frozen = shift.learn(stream, start, True, True, "k")
    retrained = shift.learn(stream, start, True, True, "k", CONFIG)
    assert (frozen[:20] == retrained[:20]).all() and len(retrained) == 40
    again = shift.learn(stream, start, True, True, "k", CONFIG)
    assert (again == retrained).all()
    rounds = stream.rounds(start, True)
    rewards = stream.rewarded(frozen[:5], rounds)
    assert [one.utility for one in rewards] == [rounds.reward[i, frozen[i]] for i in range(5)]


def test_regret_is_counted_for_the_base_of_a_round(tmp_path):
    dataset, base_of = two_bases()
    stream = shift.stream_of(dataset, base_of, frozenset({"one", "two"}), "t", 0, 20)
    stream = replace(stream, known=dataset)
    regrets = {name: np.ones((2, 40)) for name in shift.NAMES}
    results = shift.by_cluster([(stream, "t", regrets)], base_of)
    assert set(results) == {("one", "t"), ("two", "t")}
    counts = [np.sum(~np.isnan(of["uniform"])) for of in results.values()]
    assert sum(counts) == 80 and all(counts)
    assert shift.draw(results, 20, tmp_path).name == "bandit-shift.png"
    rows = shift.table(results, stream.parts)
    by_name = {(row["part"], row["policy"]): row for row in rows}
    assert by_name[shift.BEFORE, "uniform"]["regret"] == 1.0
    assert by_name[shift.SECOND, "greedy, retrained - frozen"]["interval"] == [0.0, 0.0]
