"""What is said about a pair: ranks as counted by hand, the same for both orders, and nothing where nothing is known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from simmerge_ray.base.errors import PlanError
from simmerge_ray.signals.explain import Explanation, Rank, explain
from simmerge_ray.signals.features import SIGNALS, feature_columns
from simmerge_ray.signals.pair_blocks import PairSignals
from simmerge_ray.signals.table import SignalTable

TASKS = ("code", "math")


def synthetic_table(num: int = 5, with_base: bool = True, tasks: Sequence[str] = TASKS) -> SignalTable:
    """Random signals of c0, c1, ... and a base, with the symmetries of a real table."""
    generator = np.random.default_rng(0)
    ids = [*(["base"] if with_base else []), *(f"c{index:02}" for index in range(num))]
    columns = feature_columns(with_base)
    rows: dict[tuple[str, str, str], PairSignals] = {}
    of_pair = {pair: dict(zip(columns, generator.random(len(columns)), strict=True)) for pair in combinations(ids, 2)}
    for task in tasks:
        single = {name: {one: generator.random() for one in ids} for name, s in SIGNALS.items() if s.family == "single"}
        for left, right in combinations(ids, 2):
            kept = feature_columns(with_base, base_pair="base" in (left, right))
            features = {}
            for column in kept:
                signal = next(signal for signal in SIGNALS.values() if column in signal.columns)
                if signal.family == "single":
                    features[column] = single[signal.name][left if column.endswith("left") else right]
                else:
                    features[column] = of_pair[left, right][column] * (1 if signal.of_weights else generator.random())
            row = PairSignals(left, right, task, {column: float(value) for column, value in features.items()})
            rows[left, right, task], rows[right, left, task] = row, row.swap()
    provenance = {"base": "base" if with_base else None, "own_task": {"c00": "math"}, "weights": "exact"}
    return SignalTable(columns, rows, provenance)


def changed(table: SignalTable, left: str, right: str, **values: float) -> SignalTable:
    """The table with other values for one pair, on all tasks."""
    rows = dict(table.rows)
    for task in table.tasks:
        row = PairSignals(left, right, task, dict(table.get(left, right, task).features) | values)
        rows[left, right, task], rows[right, left, task] = row, row.swap()
    return SignalTable(table.columns, rows, table.provenance)


def told(explanations: list[Explanation], signal: str, task: str | None = None) -> Explanation:
    found = [one for one in explanations if one.signal == signal and one.task == task]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("with_base", [True, False])
def test_every_signal_is_told_once_per_task_and_those_of_weights_once(with_base):
    explanations = explain(synthetic_table(with_base=with_base), "c00", "c01", TASKS)
    names = [(one.signal, one.task) for one in explanations]
    reverse = {"kl_rl", "kl_greedy_rl"}  # told with the other direction
    signals = [s for s in SIGNALS.values() if s.name not in reverse and (with_base or not s.needs_base)]
    expected = [(s.name, task) for s in signals for task in ((None,) if s.of_weights else TASKS)]
    assert sorted(names, key=str) == sorted(expected, key=str)
    for one in explanations:
        assert one.numbers and one.sentence and "  " not in one.sentence


def test_the_tasks_are_those_of_the_pair_unless_others_are_asked_for():
    table = synthetic_table()
    assert {one.task for one in explain(table, "c00", "c01")} == {"math", None}
    assert {one.task for one in explain(table, "c01", "c02")} == {"code", "math", None}
    assert {one.task for one in explain(table, "c00", "c01", ["code"])} == {"code", None}


def test_ranks_count_the_other_unordered_pairs_without_the_base():
    table = synthetic_table(num=6)
    pairs = list(combinations(table.checkpoint_ids, 2))
    distance = {p: table.get(*p, "math").features["weight_l2_global"] for p in pairs}
    kl = {p: sum(table.get(*p, "math").features[f"kl_{way}_mean"] for way in ("lr", "rl")) for p in pairs}
    uneven = {p: abs(table.get(*p, "math").features["task_vector_norm_ratio_global"]) for p in pairs}
    cosine = {p: -table.get(*p, "math").features["activation_cosine_mean"] for p in pairs}
    for pair in pairs:
        explanations = explain(table, *pair, ["math"])
        for signal, task, values in (
            ("weight_l2", None, distance),
            ("kl_lr", "math", kl),
            ("task_vector_norm_ratio", None, uneven),
            ("activation_cosine", "math", cosine),
        ):
            closer_than = sum(values[pair] < values[other] for other in pairs)
            assert told(explanations, signal, task).closeness == Rank(closer_than, 14 - closer_than, 14)


def test_both_orders_of_a_pair_say_the_same():
    table = synthetic_table()
    for one, other in zip(explain(table, "c01", "c03"), explain(table, "c03", "c01"), strict=True):
        assert (one.signal, one.task, one.closeness) == (other.signal, other.task, other.closeness)
        assert set(one.sentence.split("; ")) == set(other.sentence.split("; "))


def test_the_extremes_are_named_and_shares_are_rounded_down():
    table = changed(synthetic_table(num=4), "c00", "c01", weight_l2_global=-1.0)
    assert "the closest of all 6 pairs" in told(explain(table, "c00", "c01"), "weight_l2").sentence
    high, low = ("closer", "closest"), ("farther", "farthest")
    assert Rank(1, 2, 3).words("pairs", high, low) == "farther than 66 % of the other 3 pairs"
    assert Rank(199, 1, 200).words("pairs", high, low) == "closer than 99 % of the other 200 pairs"
    assert Rank(0, 3, 3).words("pairs", high, low) == "the farthest of all 4 pairs"
    assert Rank(0, 0, 3).words("pairs", high, low) == "level with all 4 pairs"


def test_right_is_surprised_where_left_expects_what_right_does_not():
    table = synthetic_table()
    for forward, back, who in ((2.0, 1.0, "c01"), (1.0, 2.0, "c00")):
        one = told(
            explain(changed(table, "c00", "c01", kl_lr_mean=forward, kl_rl_mean=back), "c00", "c01"), "kl_lr", "math"
        )
        assert f"{who} is the more surprised" in one.sentence and "2 against 1 nats" in one.sentence
        assert one.values["kl_lr_mean"] == forward and one.values["kl_rl_mean"] == back


def test_with_one_pair_nothing_is_ranked():
    for one in explain(synthetic_table(num=2), "c00", "c01"):
        assert one.closeness is None
        assert "%" not in one.sentence and "pairs" not in one.sentence and "checkpoints" not in one.sentence


def test_a_checkpoint_that_never_moved_is_named_not_divided_by():
    table = changed(synthetic_table(), "c00", "c01", task_vector_norm_ratio_global=713.0)
    assert "only c00 moved at all" in told(explain(table, "c00", "c01"), "task_vector_norm_ratio").sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("c00", "c9"), "unknown checkpoint 'c9'"),
        (("base", "c00"), "unknown checkpoint 'base'"),
        (("c00", "c00"), "both 'c00'"),
        (("c00", "c01", ["maths"]), "did you mean 'math'"),
    ],
)
def test_what_is_not_in_the_table_is_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        explain(synthetic_table(), *arguments)
