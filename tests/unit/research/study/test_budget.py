from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.budget import CandidateArms, StudyCosts, break_even, candidate_arms, curves
from tests.unit.selector.made_up import planted

RATES = np.array([0.2, 0.4, 0.6, 0.8])


def pools(num: int = 30, good: bool = True) -> list[CandidateArms]:
    generator = np.random.default_rng(0)
    made = []
    for number in range(num):
        items = tuple((generator.random((4, 200)) < RATES[:, None]).astype(float) for _ in range(2))
        made.append(CandidateArms((f"b{number % 3}", (str(number),)), items, RATES if good else -RATES))
    return made


def by(rows, strategy):
    return {row["evaluations"]: row for row in rows if row["strategy"] == strategy}


def test_a_good_prediction_needs_no_evaluation_and_random_search_gets_there():
    rows = curves(pools(), (1, 2, 4))
    predicted, drawn = by(rows, "predicted"), by(rows, "random")
    assert predicted[0]["utility"] == pytest.approx(0.8, abs=0.03)
    assert drawn[0]["utility"] == pytest.approx(0.5, abs=0.03)
    # The best of two of four: 0.8 in half of the draws, 0.6 in a third, 0.4 in the rest.
    assert drawn[2]["utility"] == pytest.approx(0.8 / 2 + 0.6 / 3 + 0.4 / 6, abs=0.03)
    assert drawn[4]["utility"] == pytest.approx(predicted[4]["utility"])
    assert predicted[0]["interval"][0] <= predicted[0]["utility"] <= predicted[0]["interval"][1]


def test_optuna_measures_every_candidate_in_the_end_and_chooses_like_the_others():
    rows = curves(pools(8), (1, 4))
    found = by(rows, "Optuna")
    assert found[4]["utility"] == pytest.approx(by(rows, "random")[4]["utility"])
    assert 0.2 <= found[0]["utility"] < found[4]["utility"]
    assert found[4]["utility"] == by(curves(pools(8), (1, 4)), "Optuna")[4]["utility"]


def test_a_bad_prediction_is_made_good_by_evaluations():
    predicted = by(curves(pools(good=False), (1, 4)), "predicted")
    assert predicted[0]["utility"] == pytest.approx(0.2, abs=0.03)
    assert predicted[4]["utility"] == pytest.approx(0.8, abs=0.03)


def test_few_items_cost_their_share_and_more_of_them_choose_better():
    rows = [row for row in curves(pools(), (1,)) if row["strategy"] == "few items"]
    assert [row["evaluations"] for row in rows] == pytest.approx([4 * n / 100 for n in (8, 16, 32)])
    assert rows[0]["utility"] < rows[-1]["utility"] and rows[0]["regret"] > rows[-1]["regret"] >= 0


@pytest.mark.slow
def test_nothing_is_gained_by_choosing_among_equals():
    generator = np.random.default_rng(1)
    same = [
        CandidateArms(("b", (str(n),)), ((generator.random((6, 200)) < 0.5).astype(float),), np.zeros(6))
        for n in range(200)
    ]
    for row in curves(same, (1, 6)):
        assert row["utility"] == pytest.approx(0.5, abs=0.01)


def test_break_even():
    rows = curves(pools(), (1, 2, 3, 4))
    found = break_even(rows, StudyCosts(evaluation=10.0, signals=4.0, labels=100.0))
    needed = found["random_evaluations"]
    assert needed in (3, 4)  # with noise in the choice three may be as good
    assert found["merges"] == int(np.ceil(100 / (10 * needed - 4)))
    assert break_even(rows, StudyCosts(1.0, 50.0, 100.0))["merges"] is None


def test_pools_of_a_dataset():
    dataset = planted(num_checkpoints=4)
    predicted = dataset.utilities.copy()
    predicted[0] = np.nan
    made = candidate_arms(dataset, predicted, {"c0": "b"})
    assert len(made) == 5 and all(len(one.items) == 2 for one in made)
    assert made[0].items[0].shape == (3, 100)
    with pytest.raises(LabelError):
        curves([], (1,))
