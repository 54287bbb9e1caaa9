"""One replica where something ends in the middle, comes twice, or has a past."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest

from simmerge_ray.base.errors import StoreError
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.log.database import upgrade_database
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.schemas import ArmRequest, DecisionRequest, Refused, RewardRequest
from tests.unit.service.published import PublishedFiles, write_published

T = TypeVar("T")
PAIR = DecisionRequest(left="s1-c00", right="s1-c01")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> PublishedFiles:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> PublishedFiles:
    """Another version of the selector, over the same table."""
    return write_published(tmp_path_factory.mktemp("others"), seed=1)


def run(files: PublishedFiles, root: Path, use: Callable[[Learner], Awaitable[T]], **settings: Any) -> T:
    """Start a replica, use it, stop it."""
    upgrade_database(f"sqlite:///{root}/service.db")

    async def main() -> T:
        learner = Learner(files.settings(root, **settings))
        await learner.start()
        try:
            return await use(learner)
        finally:
            await learner.stop()

    return asyncio.run(main())


@pytest.mark.parametrize("failing", [1, 2])
def test_a_log_whose_beginning_was_interrupted_is_gone_on_with(files, others, tmp_path, monkeypatch, failing):
    append, calls = EventLog.append, []

    def interrupted(self: EventLog, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) >= failing:
            raise StoreError("the disk is full")
        return append(self, *arguments)

    async def cannot(learner: Learner) -> None:
        with pytest.raises(StoreError, match="the disk is full"):
            await learner.decide(PAIR)

    monkeypatch.setattr(EventLog, "append", interrupted)
    run(files, tmp_path, cannot)
    monkeypatch.setattr(EventLog, "append", append)

    async def can(learner: Learner) -> str:
        status, decision = await learner.decide(PAIR)
        assert status == 201
        return decision.model_version

    # Whoever comes next ends what was begun: with the selector that the log names, else with its own.
    expected = files if failing == 2 else others
    assert run(others, tmp_path, can) == read_selector(expected.selector).version


async def named(learner: Learner) -> str:
    return (await learner.policy()).model_version


def test_a_retry_of_a_new_arm_is_told_the_same(files, tmp_path):
    async def use(learner: Learner) -> None:
        request = ArmRequest(arm="ties(density=0.2)", sibling="ties")
        first = await learner.add_arm(request, "key")
        assert first[0] == 201
        for key in ("key", None):
            status, again = await learner.add_arm(request, key)
            assert status == 200 and again.seq == first[1].seq
        for other in (ArmRequest(arm="ties(density=0.2)"), ArmRequest(arm="linear")):
            with pytest.raises(Refused) as refused:
                await learner.add_arm(other)
            assert refused.value.status == 409

    run(files, tmp_path, use)


def test_what_is_said_at_every_start_takes_no_newer_selector_back(files, others, tmp_path):
    async def use(learner: Learner) -> None:
        first = await learner.publish(files.selector, only_new=True)
        second = await learner.publish(others.selector, only_new=True)
        assert first != second == await named(learner)
        await learner.publish(files.selector, only_new=True)  # as a replica that starts again does
        assert await named(learner) == second
        await learner.publish(files.selector)  # as somebody who wants it does
        assert await named(learner) == first

    run(files, tmp_path, use)


def test_the_mean_context_is_of_the_present_encoder(files, others, tmp_path):
    async def use(learner: Learner) -> None:
        assert all(one.mean is None for one in (await learner.policy()).arms)
        _, decision = await learner.decide(PAIR)
        await learner.reward(decision.decision_id, RewardRequest(utility=0.5))
        assert all(one.mean is not None for one in (await learner.policy()).arms)
        await learner.publish(others.selector)
        assert all(one.mean is None for one in (await learner.policy()).arms)
        _, again = await learner.decide(PAIR)
        by_arm = {one.arm: one for one in again.arms}
        for one in (await learner.policy()).arms:  # of one decision the mean context is its own
            expected = by_arm[one.arm].expected
            assert one.mean is not None and expected is not None
            level = expected - one.mean
            assert level == pytest.approx(by_arm["linear"].expected - first_mean(await learner.policy()), abs=1e-12)

    run(files, tmp_path, use)


def first_mean(policy: Any) -> float:
    return next(one.mean for one in policy.arms if one.arm == "linear")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE events SET body = '{}' WHERE seq = 1", r"event 1 \('activation'\) cannot be read"),
        ("UPDATE events SET body = '{\"model_version\": 5}' WHERE seq = 1", "version is 5; it must be text"),
        ("UPDATE events SET data = x'00' WHERE seq = 2", r"event 2 \('warm_start'\) cannot be read"),
        ("UPDATE events SET kind = 'x' WHERE seq = 3", "event 3, 'x' of version 1"),
    ],
)
def test_a_damaged_log_is_told_with_its_event_and_the_remedy(files, tmp_path, change, says):
    run(files, tmp_path, lambda learner: learner.decide(PAIR))
    with closing(sqlite3.connect(tmp_path / "service.db")) as database, database:
        database.execute("DELETE FROM snapshots")
        database.execute(change)
    with pytest.raises(StoreError, match=rf"{says}.*simmerge db restore"):
        run(files, tmp_path, lambda learner: learner.decide(PAIR))
