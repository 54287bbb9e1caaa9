"""One replica without HTTP: decisions, rewards and everything that is asked of them, on a real log."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from simmerge_ray.base.errors import BanditError, PlanError, StoreError
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.selector.planning.files import SHORTLIST
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.log.database import upgrade_database
from simmerge_ray.service.schemas import (
    ArmRequest,
    DecisionRequest,
    DiscountRequest,
    PlansRequest,
    RankRequest,
    ReasonRequest,
    Refused,
    RewardRequest,
)
from tests.unit.service.published import PublishedFiles, write_published

T = TypeVar("T")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> PublishedFiles:
    return write_published(tmp_path_factory.mktemp("published"))


def run(files: PublishedFiles, root: Path, use: Callable[[Learner], Awaitable[T]], **settings: Any) -> T:
    """Start a replica, use it, stop it."""
    upgrade_database(f"sqlite:///{root}/service.db")
    clock = settings.pop("clock", None)

    async def main() -> T:
        learner = Learner(files.settings(root, **settings), *([clock] if clock else []))
        await learner.start()
        try:
            return await use(learner)
        finally:
            await learner.stop()

    return asyncio.run(main())


async def ids(learner: Learner) -> list[str]:
    return [one.id for one in (await learner.catalogue()).checkpoints]


async def a_pair(learner: Learner, **changes: Any) -> DecisionRequest:
    left, right = (await ids(learner))[:2]
    return DecisionRequest(left=left, right=right, **changes)


def test_a_decision_says_everything_and_its_reward_is_learned(files, tmp_path):
    async def use(learner: Learner) -> None:
        status, decision = await learner.decide(await a_pair(learner))
        assert status == 201 and decision.arm in ("linear", "ties")
        assert sum(decision.propensities.values()) == pytest.approx(1, abs=1e-10)
        assert {one.arm for one in decision.arms} == {"linear", "ties"}
        assert all(one.expected is not None and one.expected_sd > 0 for one in decision.arms)
        before = {one.arm: one.count for one in (await learner.policy()).arms}
        status, answer = await learner.reward(decision.decision_id, RewardRequest(utility=0.7))
        assert status == 201 and answer.utility == 0.7 and answer.status == "created"
        policy = await learner.policy()
        after = {one.arm: one.count for one in policy.arms}
        assert after[decision.arm] == before[decision.arm] + 1 and sum(after.values()) == sum(before.values()) + 1
        assert (policy.num_decisions, policy.num_rewards, policy.num_open) == (1, 1, 0)
        record = await learner.get(decision.decision_id)
        assert record.decision == decision and record.status == "rewarded" and record.utility == 0.7
        assert [event.kind for event in record.events] == ["decision", "reward"]

    run(files, tmp_path, use)


def test_what_was_acknowledged_is_there_after_a_restart_and_the_policy_is_the_same(files, tmp_path):
    async def first(learner: Learner) -> Any:
        for number in range(12):
            _, decision = await learner.decide(await a_pair(learner))
            await learner.reward(decision.decision_id, RewardRequest(utility=number / 12))
        return await learner.policy()

    async def second(learner: Learner) -> Any:
        return await learner.policy()

    before = run(files, tmp_path, first, snapshot_every=5)
    after = run(files, tmp_path, second)
    assert after == before
    assert before.regret is not None and before.regret.num == 12


def test_a_retry_is_told_the_same_and_a_key_stands_for_one_request(files, tmp_path):
    async def use(learner: Learner) -> None:
        request = await a_pair(learner)
        answers = await asyncio.gather(*(learner.decide(request, "key-1") for _ in range(5)))
        assert sorted(status for status, _ in answers) == [200, 200, 200, 200, 201]
        assert len({decision.model_dump_json() for _, decision in answers}) == 1
        with pytest.raises(Refused) as refused:
            await learner.decide(await a_pair(learner, explore=False), "key-1")
        assert refused.value.status == 409
        assert (await learner.policy()).num_decisions == 1

    run(files, tmp_path, use)


def test_rewards_by_the_table(files, tmp_path):
    now = [1000.0]

    async def use(learner: Learner) -> None:
        async def refused(call: Awaitable[Any]) -> int:
            with pytest.raises(Refused) as error:
                await call
            return error.value.status

        given = RewardRequest(utility=0.5)
        assert await refused(learner.reward("nothing", given)) == 404
        _, one = await learner.decide(await a_pair(learner))
        assert (await learner.reward(one.decision_id, given))[0] == 201
        status, again = await learner.reward(one.decision_id, given)
        assert status == 200 and again.status == "replayed"
        assert await refused(learner.reward(one.decision_id, RewardRequest(utility=0.6))) == 409
        assert (await learner.void(one.decision_id, ReasonRequest(reason="measured on the wrong items")))[0] == 201
        assert (await learner.get(one.decision_id)).status == "open"
        assert (await learner.reward(one.decision_id, RewardRequest(utility=0.6)))[0] == 201
        assert (await learner.get(one.decision_id)).utility == 0.6
        _, two = await learner.decide(await a_pair(learner))
        assert (await learner.close(two.decision_id, ReasonRequest(reason="infeasible: NaN")))[0] == 201
        assert await refused(learner.reward(two.decision_id, given)) == 410
        assert (await learner.get(two.decision_id)).closed_reason == "infeasible: NaN"
        _, three = await learner.decide(await a_pair(learner, ttl_seconds=10))
        now[0] += 11
        assert (await learner.get(three.decision_id)).status == "expired"
        assert await refused(learner.reward(three.decision_id, given)) == 410
        listed = await learner.recent(limit=2)
        assert [row.decision_id for row in listed.decisions] == [three.decision_id, two.decision_id]
        rest = await learner.recent(limit=2, before=listed.next_before)
        assert [row.status for row in rest.decisions] == ["rewarded"] and rest.next_before is None

    run(files, tmp_path, use, clock=lambda: now[0])


def test_without_exploration_the_best_arm_has_all_the_probability(files, tmp_path):
    async def use(learner: Learner) -> None:
        _, decision = await learner.decide(await a_pair(learner, explore=False))
        assert decision.propensities[decision.arm] == 1 and not decision.explored
        await learner.reward(decision.decision_id, RewardRequest(utility=0.5))
        assert (await learner.policy()).regret is None  # it says nothing off policy
        assert (await learner.curve()).num == 0

    run(files, tmp_path, use)


def test_plans_are_ranked_and_one_is_drawn_with_its_probability(files, tmp_path):
    async def use(learner: Learner) -> None:
        some = (await ids(learner))[:4]
        answer = await learner.plans(PlansRequest(checkpoints=some, ways="2-3", top=5))
        assert len(answer.plans) == 5 and answer.exhaustive and answer.num_considered > 5
        _, decision = await learner.decide(DecisionRequest(checkpoints=some, ways="3"))
        assert decision.kind == "plan" and decision.plan is not None and decision.plans is not None
        assert len(decision.plans) <= 32 and decision.plan.propensity == decision.propensities[decision.plan.id]
        assert sum(decision.propensities.values()) == pytest.approx(1, abs=1e-9)
        assert len(decision.plan.plan["steps"]) == 2
        before = (await learner.policy()).arms
        await learner.reward(decision.decision_id, RewardRequest(utility=0.4))
        assert (await learner.policy()).arms == before  # only merges of two are learned from
        _, pair = await learner.decide(DecisionRequest(checkpoints=some, ways=2))
        await learner.reward(pair.decision_id, RewardRequest(utility=0.4))
        assert sum(one.count for one in (await learner.policy()).arms) == sum(one.count for one in before) + 1
        assert (await learner.recent()).decisions[0].kind == "plan"

    run(files, tmp_path, use)


def test_a_new_arm_is_played_and_a_discount_widens(files, tmp_path):
    async def use(learner: Learner) -> None:
        status, _ = await learner.add_arm(ArmRequest(arm="ties(density=0.2)", sibling="ties"))
        assert status == 201
        with pytest.raises(Refused) as refused:
            await learner.add_arm(ArmRequest(arm="ties(density=0.20)"))
        assert refused.value.status == 409
        with pytest.raises(BanditError, match="unknown arm 'tees'"):
            await learner.add_arm(ArmRequest(arm="slerp", sibling="tees"))
        _, decision = await learner.decide(await a_pair(learner))
        assert "ties(density=0.2)" in decision.propensities
        await learner.reward(decision.decision_id, RewardRequest(utility=0.9))
        before = {one.arm: one.entropy for one in (await learner.policy()).arms}
        await learner.discount(DiscountRequest(factor=0.5, reason="the items have changed"))
        after = {one.arm: one.entropy for one in (await learner.policy()).arms}
        assert [arm for arm in after if after[arm] > before[arm]] == [decision.arm]  # priors stay whole

    run(files, tmp_path, use)


def test_another_selector_answers_after_it_was_published_and_the_past_is_folded_again(files, tmp_path):
    other = write_published(tmp_path / "other", seed=1)

    async def use(learner: Learner) -> None:
        _, decision = await learner.decide(await a_pair(learner))
        await learner.reward(decision.decision_id, RewardRequest(utility=0.9))
        version = await learner.publish(other.selector)
        assert version != decision.model_version and await learner.publish(other.selector) == version
        policy = await learner.policy()
        assert policy.model_version == version and policy.epoch == 1 and policy.num_rewards == 1
        counts = {one.arm: one.count for one in policy.arms}
        warm = learner.registry.load(version).warm
        assert warm is not None
        assert counts[decision.arm] == warm.posteriors[decision.arm].count + 1
        assert (await learner.decide(await a_pair(learner)))[1].model_version == version
        assert await learner.publish(files.selector) == decision.model_version  # a roll back
        assert (await learner.policy()).epoch == 2

    run(files, tmp_path, use)


def test_two_replicas_of_one_log_agree(files, tmp_path):
    upgrade_database(f"sqlite:///{tmp_path}/service.db")

    async def main() -> None:
        replicas = [Learner(files.settings(tmp_path)) for _ in range(2)]
        await asyncio.gather(*(one.start() for one in replicas))
        for number in range(10):
            _, decision = await replicas[number % 2].decide(await a_pair(replicas[0]))
            await replicas[1 - number % 2].reward(decision.decision_id, RewardRequest(utility=0.1 * number))
        states = [await one.policy() for one in replicas]
        assert states[0] == states[1] and states[0].num_rewards == 10
        await asyncio.gather(*(one.stop() for one in replicas))

    asyncio.run(main())


def test_a_database_that_is_away_is_said_and_found_again(files, tmp_path):
    async def main() -> None:
        learner = Learner(files.settings(tmp_path))
        await learner.start()
        with pytest.raises(StoreError, match="simmerge db upgrade"):
            await learner.decide(DecisionRequest(left="s1-c0", right="s1-c1"))
        with pytest.raises(StoreError):
            await learner.ready()
        assert (await learner.catalogue()).arms == ["linear", "ties"]  # the page still has something to show
        upgrade_database(f"sqlite:///{tmp_path}/service.db")
        assert (await learner.decide(await a_pair(learner)))[0] == 201
        await learner.stop()

    asyncio.run(main())


def test_names_that_are_not_known(files, tmp_path):
    async def use(learner: Learner) -> None:
        left = (await ids(learner))[0]
        with pytest.raises(PlanError, match="unknown checkpoint 'nobody'"):
            await learner.decide(DecisionRequest(left=left, right="nobody"))
        with pytest.raises(PlanError, match="unknown checkpoint 'nobody'"):
            await learner.plans(PlansRequest(checkpoints=[left, "nobody"]))
        with pytest.raises(PlanError, match="unknown task"):
            await learner.rank(RankRequest(left=left, right=(await ids(learner))[1], task="nothing"))
        with pytest.raises(Refused, match="unknown signal"):
            await learner.signals("nothing")

    run(files, tmp_path, use)


def test_what_is_shown_of_a_pair_and_of_the_signals(files, tmp_path):
    async def use(learner: Learner) -> None:
        left, right = (await ids(learner))[:2]
        ranked = await learner.rank(RankRequest(left=left, right=right))
        assert {one.arm for one in ranked.arms} == {"linear", "ties"}
        utilities = [one.utility for one in ranked.arms]
        assert utilities == sorted(utilities, reverse=True)
        assert ranked.why and all(np.isfinite(one.effect) for one in ranked.why)
        assert (await learner.policy()).num_decisions == 0
        matrix = await learner.signals("weight_cosine_global")
        assert matrix.values[0][0] is None and isinstance(matrix.values[0][1], float)
        assert matrix.checkpoints == await ids(learner)

    run(files, tmp_path, use)


def test_a_drawn_arm_is_called_better_only_where_more_is_expected_of_it(files, tmp_path):
    async def use(learner: Learner) -> None:
        seen = set()
        for _ in range(60):
            _, decision = await learner.decide(await a_pair(learner, explore=True))
            expected = {one.arm: one.expected for one in decision.arms}
            advantage = expected[decision.arm] - expected[decision.best_fixed]
            start = decision.reason.split(" ")[0]
            seen.add(start)
            if decision.arm != decision.best_fixed:
                assert start == ("expected" if advantage > 0 else "a") and f"{advantage:+.3f}" in decision.reason
        assert len(seen) == 2, seen  # the best fixed arm, and one other

    run(files, tmp_path, use, floor=0.4)


def test_of_checkpoints_unlike_those_of_the_training_the_service_gives_no_number(files, tmp_path):
    selector = read_selector(files.selector)
    far = PublishedFiles(tmp_path / "far", files.signals)
    shutil.copytree(files.selector, far.selector)
    for place, one in ((far.selector, selector), (far.selector / SHORTLIST, read_selector(files.selector / SHORTLIST))):
        replace(one, novelty=replace(one.novelty, limit=-1.0)).write(tmp_path / "changed" / place.name)
        for name in ("selector.json", "selector.safetensors"):
            shutil.copy(tmp_path / "changed" / place.name / name, place / name)

    async def use(learner: Learner) -> None:
        _, decision = await learner.decide(await a_pair(learner))
        assert "not trained for such checkpoints" in decision.reason
        assert all(one.utility is None and one.interval is None for one in decision.arms)
        plans = (await learner.plans(PlansRequest(ways=2))).plans
        assert plans and all(one.utility is None and one.interval is None and not one.why for one in plans)

    run(far, tmp_path, use)
