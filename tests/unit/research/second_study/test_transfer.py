"""Transfer on made-up rows: what holds for both zoos carries over, what is turned round on one does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simmerge_ray.research.second_study.page import transfer_blocks
from simmerge_ray.research.second_study.transfer import CARRIED, OWN, RULE, transfer_figures
from tests.unit.selector.predictor.made_up import rows_of_bases


@pytest.fixture(scope="module")
def found():
    return transfer_figures(rows_of_bases(3), rows_of_bases(1, num_members=7, seed=5))


def test_one_law_in_both_zoos_carries_over(found):
    assert set(found["real"]) == {CARRIED, OWN, RULE}
    assert all(one["mean"] < 0.02 and one["pairs"] == found["real"][RULE]["pairs"] for one in found["real"].values())
    assert found["hypotheses"]["H10"]["holds"]
    assert [(one["zoo"], one["family"]) for one in found["families"]] == [("small", "ties"), ("real", "ties")]


def test_a_law_that_is_turned_round_does_not():
    real = rows_of_bases(1, num_members=7, seed=5)
    found = transfer_figures(rows_of_bases(3), replace(real, utility=1.0 - real.utility))
    assert found["real"][CARRIED]["mean"] > 0.1 > found["real"][OWN]["mean"]
    assert not found["hypotheses"]["H9"]["holds"]
    assert found["families"][1]["among"]["rule"]["mean"] > 0.1


def test_the_blocks_say_both_verdicts(found):
    blocks = transfer_blocks(found)
    assert "H9" in blocks["transfer-verdict"][0] and "**H10 is earned**" in blocks["transfer-verdict"][1]
    assert len(blocks["transfer-real"]) == 2 + 3 + 1 and len(blocks["transfer-families"]) == 2 + 2 + 1
