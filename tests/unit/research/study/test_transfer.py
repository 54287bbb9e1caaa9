from __future__ import annotations

from dataclasses import replace

import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.transfer import transfer
from tests.unit.selector.made_up import planted

CONFIG = TrainConfig(num_members=2, num_epochs=150)


def renamed(dataset, prefix: str):
    contexts = tuple(replace(c, left=f"{prefix}{c.left}", right=f"{prefix}{c.right}") for c in dataset.contexts)
    return replace(dataset, contexts=contexts)


def found(learnable_small: bool):
    small = renamed(planted(num_checkpoints=12, learnable=learnable_small), "s-")
    large = renamed(planted(num_checkpoints=9, seed=1), "l-")
    bases = {c.left: c.left[0] for c in (*small.contexts, *large.contexts)}
    bases |= {c.right: c.right[0] for c in (*small.contexts, *large.contexts)}
    return transfer(small, large, CONFIG, bases)


def test_what_was_learned_elsewhere_holds_where_the_rule_is_the_same():
    result = found(learnable_small=True)
    for fixed in ("best fixed of the small bases", "best fixed of the large base"):
        gain = result["gains"][f"transferred - {fixed}"]
        assert gain["gain"] > 0.1 and gain["interval"][0] > 0
    assert result["share"] > 0.7 and result["num_merges"] == 36
    own = result["gap_closed"]["own"] - result["gap_closed"]["best fixed of the small bases"]
    assert result["gains"]["own - best fixed of the small bases"]["gain"] == pytest.approx(own)


def test_nothing_is_transferred_from_noise():
    result = found(learnable_small=False)
    transferred = result["gains"]["transferred - best fixed of the large base"]["gain"]
    assert transferred < 0.5 * result["gains"]["own - best fixed of the large base"]["gain"]


def test_it_abstains_from_merges_that_are_unlike_the_small_ones():
    small = renamed(planted(num_checkpoints=12), "s-")
    large = renamed(planted(num_checkpoints=9, seed=1), "l-")
    contexts = (*small.contexts, *large.contexts)
    bases = {name: name[0] for c in contexts for name in (c.left, c.right)}
    near = transfer(small, large, CONFIG, bases)
    assert near["unlike"] < 0.2
    far = transfer(small, replace(large, features=large.features + 50), CONFIG, bases)
    assert far["unlike"] == 1.0
    assert far["gap_closed"]["abstaining"] == far["gap_closed"]["best fixed of the small bases"]


def test_other_arms_are_refused():
    small, large = planted(), planted(seed=1)
    with pytest.raises(LabelError, match="other arms"):
        transfer(small, replace(large, arms=("a", "b", "c")), CONFIG, {})
