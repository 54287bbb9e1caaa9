"""Appending: what is acknowledged, in which order, and what a second try is answered."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sqlalchemy import insert, select, update

from simmerge_ray.base.errors import BanditError, ConfigError, StoreError
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.log.database import events, log_head, open_database, writing
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import (
    Activation,
    ArmAdded,
    DecisionClosed,
    Discounted,
    EncoderEpoch,
    RewardGiven,
    RewardVoided,
    WarmStart,
    decode,
    encode,
)
from simmerge_ray.service.log.outcomes import Status
from simmerge_ray.service.log.replica import Replica
from tests.unit.service import event_logs
from tests.unit.service.event_logs import all_rows, decision, opened, prior

EVENTS = [
    decision("d", request={"text": "ü\0<script>", "float64": [1, 2]}, expires_at=1.5),
    decision("d", z=np.array([-0.0, 5e-324, 1 / 3]), features=np.zeros((0, 2)), level=-0.0, learns=()),
    RewardGiven("d", 1 / 3),
    RewardVoided("d", "wrong split", 7),
    DecisionClosed("d", "infeasible: tokenizers differ"),
    Activation("m1", {"path": "x"}),
    ArmAdded("ties", prior()),
    Discounted(0.75, "shift"),
    EncoderEpoch(1, 4, 2.0, {"ties": prior(1)}, Noise(0.1), "m2"),
    WarmStart({"ties": prior().updated(np.ones(3), 0.3), "slerp": prior()}, Noise(0.2)),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_an_event_comes_back_bit_for_bit(event):
    body, data = encode(event)
    again = decode(event.kind, 1, body, data)
    assert type(again) is type(event) and encode(again) == (body, data)
    if event.kind == "decision":
        for name in ("features", "z"):
            assert getattr(again, name).tobytes() == getattr(event, name).tobytes()
            assert getattr(again, name).shape == getattr(event, name).shape
        assert again.request == event.request and again.propensities == event.propensities
        assert math.copysign(1, again.level) == math.copysign(1, event.level)


def test_events_of_another_version_are_refused_and_not_skipped():
    for kind, version in (("reward", 2), ("banana", 1)):
        with pytest.raises(StoreError, match="another version"):
            decode(kind, version, "{}", b"")


def test_events_that_no_posterior_can_take_are_not_made():
    with pytest.raises(BanditError, match="not a finite number"):
        decision("d", z=np.array([1.0, math.nan, 0.0]))
    with pytest.raises(BanditError, match="discount factor"):
        Discounted(0.0)
    with pytest.raises(BanditError, match="different dimensions"):
        WarmStart({"a": prior(0), "b": prior(1)}, Noise(1.0))


def test_the_table_of_outcomes(database):
    now = [100.0]
    with opened(database, clock=lambda: now[0]) as log:

        def status(event, key=None, payload=None):
            return log.append(event, key, payload).status

        assert status(RewardGiven("d", 0.5)) == Status.UNKNOWN
        first = log.append(decision("d", expires_at=200.0), "k1", {"left": "a"})
        assert (first.status, first.row.seq) == (Status.CREATED, 1)
        retried = log.append(decision("other", seed=5), "k1", {"left": "a"})
        assert retried.status == Status.REPLAYED and retried.row == first.row
        assert status(decision("other"), "k1", {"left": "b"}) == Status.CONFLICT
        assert status(RewardGiven("d", 0.5), "k1") == Status.CONFLICT
        for bad in (math.nan, math.inf, -0.1, 1.1, "0.5", True, None):
            assert status(RewardGiven("d", bad)) == Status.INVALID
        assert status(RewardVoided("d", "none")) == Status.CONFLICT
        assert status(RewardGiven("d", 1), "k2") == Status.CREATED
        assert status(RewardGiven("d", 1.0), "k2") == status(RewardGiven("d", 1.0)) == Status.REPLAYED
        assert status(RewardGiven("d", 0.5), "k2") == status(RewardGiven("d", 0.5)) == Status.CONFLICT
        assert status(DecisionClosed("d", "late")) == Status.CONFLICT
        voided = log.append(RewardVoided("d", "typo"))
        assert voided.status == Status.CREATED and voided.row.event.reward_seq == 2
        assert status(RewardVoided("d", "typo")) == Status.REPLAYED
        assert status(RewardVoided("d", "other")) == Status.CONFLICT
        now[0] = 300.0
        assert status(RewardGiven("d", 1.0), "k2") == Status.REPLAYED  # the retry of a voided one is not a new one
        assert status(RewardGiven("d", 0.7), "k3") == Status.CREATED  # a correction may come later than the deadline
        assert status(decision("e", expires_at=200.0)) == Status.CREATED
        assert status(RewardGiven("e", 0.5)) == Status.GONE
        now[0] = 150.0
        assert status(DecisionClosed("e", "infeasible")) == Status.CREATED
        assert status(DecisionClosed("e", "infeasible")) == Status.REPLAYED
        assert status(RewardGiven("e", 0.5)) == Status.GONE
        assert status(ArmAdded("ties", prior())) == Status.CREATED
        assert status(ArmAdded("ties", prior())) == Status.REPLAYED
        assert status(ArmAdded("ties", prior(ridge=2.0))) == Status.CONFLICT
        assert status(Discounted(0.5)) == status(Discounted(0.5)) == Status.CREATED
        assert status(Discounted(0.5), "k4") == Status.CREATED and status(Discounted(0.5), "k4") == Status.REPLAYED
        assert [row.seq for row in all_rows(log)] == list(range(1, log.head() + 1))
        kinds = [row.kind for row in log.history("d")]
        assert kinds == ["decision", "reward", "reward_voided", "reward"]


def test_names_that_no_column_can_take_are_refused_before_they_meet_others(database):
    with opened(database) as log:
        for name in ("", "x" * 201, "a\0b", "\ud800"):
            with pytest.raises(ConfigError):
                log.submit(decision(name))
            with pytest.raises(ConfigError):
                log.submit(Discounted(0.5), name)
        with pytest.raises(ValueError):
            log.submit(decision("d", request={"x": math.nan}))
        assert log.head() == 0
    with pytest.raises(StoreError, match="closed"):
        log.submit(Discounted(0.5))


def test_namespaces_do_not_see_each_other(database):
    with opened(database, namespace="a") as one, opened(database, namespace="b") as two:
        for log in (one, two):
            assert log.append(decision("d"), "key").row.seq == 1
        assert one.append(RewardGiven("d", 0.5)).row.seq == 2
        assert two.head() == 1 and len(all_rows(two)) == 1


def test_appends_that_come_together_share_a_commit(database, monkeypatch):
    with opened(database) as log:
        log.append(Activation("m0"))
        begun, held, sizes = threading.Event(), threading.Event(), []
        transaction = log._transaction

        def slow(entries):
            begun.set()
            held.wait(60)
            sizes.append(len(entries))
            return transaction(entries)

        monkeypatch.setattr(log, "_transaction", slow)
        futures = [log.submit(decision("d0"))]
        assert begun.wait(60)
        futures += [log.submit(decision(f"d{i}")) for i in range(1, 20)]
        futures += [log.submit(RewardGiven("d3", 0.5)), log.submit(RewardGiven("absent", 0.5))]
        assert futures[5].cancel()  # nobody waits any more: it is not appended
        assert not any(future.done() for future in futures if not future.cancelled())
        held.set()
        statuses = [future.result(60).status for future in futures if not future.cancelled()]
        assert statuses == [Status.CREATED] * 20 + [Status.UNKNOWN]
        assert sizes == [1, 20]
        assert [row.subject for row in all_rows(log)][1:4] == ["d0", "d1", "d2"]


def test_an_event_that_the_database_refuses_fails_alone(database, monkeypatch):
    with opened(database) as log:
        related = log._related

        def blind(connection, entries):  # as if the check had missed what the unique constraint holds
            return [row for row in related(connection, entries) if row.subject != "d1"]

        log.append(decision("d1"))
        monkeypatch.setattr(log, "_related", blind)
        begun, held = threading.Event(), threading.Event()
        blocker = log._transaction
        monkeypatch.setattr(log, "_transaction", lambda entries: (begun.set(), held.wait(60), blocker(entries))[2])
        futures = [log.submit(Activation("m1"))]
        assert begun.wait(60)
        futures += [log.submit(decision(name)) for name in ("d0", "d1", "d2")]
        held.set()
        with pytest.raises(StoreError, match="(?i)unique"):
            futures[2].result(60)
        assert [futures[i].result(60).status for i in (0, 1, 3)] == [Status.CREATED] * 3
        assert [row.subject for row in all_rows(log)] == ["d1", None, "d0", "d2"]


def test_every_request_sent_several_times_at_once_counts_once(database):
    """Two processes' worth of logs, eight threads, each decision and reward one to five times, in any order."""
    with opened(database) as one, opened(database) as two:
        one.append(ArmAdded("linear", prior()))
        generator = np.random.default_rng(0)
        jobs = [i for i in range(25) for _ in range(generator.integers(1, 6))]
        generator.shuffle(jobs)

        def send(job):
            number, i = job
            log = (one, two)[number % 2]
            # What a client does: a decision with its key, then the reward with its own.
            made = log.append(decision(f"d{i}-{number}", seed=i), f"decide-{i}", {"pair": i})
            reward = RewardGiven(made.row.subject, i / 25)
            return i, made, log.append(reward, f"reward-{i}"), log.append(reward)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(send, enumerate(jobs)))
        for i in range(25):
            own = [answer[1:] for answer in answers if answer[0] == i]
            assert len({made.row for made, _, _ in own}) == 1 and len({reward.row for _, reward, _ in own}) == 1
            assert sum(made.status == Status.CREATED for made, _, _ in own) == 1
            created = [a.status for _, first, second in own for a in (first, second)].count(Status.CREATED)
            assert created == 1
        rows = all_rows(one)
        assert [row.seq for row in rows] == list(range(1, 52))
        assert Replica(two, event_logs.encode).catch_up().posteriors["linear"].count == 25


def test_asyncio_callers_wait_for_the_commit(database):
    async def run(log):
        statuses = await asyncio.gather(*(log.append_async(decision(f"d{i}")) for i in range(30)))
        task = asyncio.create_task(log.append_async(decision("late")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return [one.status for one in statuses], await log.append_async(RewardGiven("d7", 0.5))

    with opened(database) as log:
        statuses, reward = asyncio.run(run(log))
        assert statuses == [Status.CREATED] * 30 and reward.status == Status.CREATED


def test_no_event_is_skipped_while_a_writer_is_held_open(database):
    """The writer that took its numbers first commits last; a reader that goes on by the last number sees both."""
    with opened(database) as log:
        log.append(decision("d0"))
        other = open_database(database)
        reader = Replica(log, event_logs.encode)
        with writing(other) as connection:
            taken = update(log_head).values(seq=log_head.c.seq + 1).returning(log_head.c.seq)
            seq = connection.execute(taken).scalar_one()
            row = connection.execute(select(events)).mappings().one()
            connection.execute(insert(events), [{**row, "seq": seq, "subject": "held"}])
            waiting = log.submit(decision("d1"))
            for _ in range(3):
                assert reader.catch_up().seq == 1
            assert not waiting.done()
        assert waiting.result(60).row.seq == seq + 1 == 3
        assert reader.catch_up().num_decisions == 3
        assert [row.subject for row in all_rows(log)] == ["d0", "held", "d1"]
        other.dispose()


def test_two_writers_and_a_reader_agree_on_one_order(database):
    with opened(database) as one, opened(database) as two, opened(database) as third:
        seen: list[str] = []
        done = threading.Event()

        def read():
            after = 0
            while True:
                last_look = done.is_set()
                for row in third.tail(after, 7):
                    assert row.seq == after + 1
                    seen.append(row.subject)
                    after = row.seq
                if last_look and after == third.head():
                    return

        def write(log: EventLog, name: str):
            futures = [log.submit(decision(f"{name}{i}")) for i in range(60)]
            return [future.result(60).row.seq for future in futures]

        with ThreadPoolExecutor(3) as pool:
            reading = pool.submit(read)
            writing_both = [pool.submit(write, log, name) for log, name in ((one, "a"), (two, "b"))]
            numbers = [future.result(120) for future in writing_both]
            done.set()
            reading.result(120)
        assert sorted(numbers[0] + numbers[1]) == list(range(1, 121))
        assert len(seen) == 120 and len(set(seen)) == 120


def test_events_are_made_of_one_look_for_a_group_and_fail_alone(database):
    looks: list[int] = []
    begun, held = threading.Event(), threading.Event()

    def look() -> int:
        looks.append(len(looks))
        if len(looks) == 1:
            begun.set()
            held.wait(60)
        if len(looks) == 4:
            raise StoreError("nothing can be read")
        return looks[-1]

    def unknown(seen: int):
        raise ConfigError(f"no such pair, at look {seen}")

    async def run(log):
        made = [asyncio.create_task(log.append_made(lambda seen: decision("d0", seq_seen=seen), None, {}))]
        await asyncio.to_thread(begun.wait, 60)
        made += [
            asyncio.create_task(
                log.append_made(lambda seen, i=i: decision(f"d{i}", seq_seen=seen), f"key{i}", {"i": i})
            )
            for i in range(1, 9)
        ]
        made.append(asyncio.create_task(log.append_made(unknown, None, {})))
        rewarded = asyncio.create_task(log.append_async(RewardGiven("d0", 0.5)))
        await asyncio.sleep(0)
        held.set()
        answers = await asyncio.gather(*made, rewarded, return_exceptions=True)
        again = await log.append_made(lambda seen: decision("other", seq_seen=seen), "key3", {"i": 3})
        failed = await asyncio.gather(log.append_made(lambda seen: decision("d9"), None, {}), return_exceptions=True)
        return answers, again, failed[0], await log.append_async(RewardGiven("d1", 0.5))

    with opened(database, look=look) as log:
        answers, again, failed, reward = asyncio.run(run(log))
        seen = [answer.row.event.seq_seen for answer in answers[:9]]
        assert seen == [0] + [1] * 8, "one look for all that came while the first was held"
        assert isinstance(answers[9], ConfigError) and str(answers[9]).endswith("look 1")
        assert answers[10].status == Status.CREATED
        assert again.status == Status.REPLAYED and again.row.subject == "d3"
        assert isinstance(failed, StoreError) and reward.status == Status.CREATED
        assert log.head() == 11
