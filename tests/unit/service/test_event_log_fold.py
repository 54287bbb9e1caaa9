"""The state is the fold of the log: to the bit, wherever it was interrupted, whatever was voided or encoded anew."""

from __future__ import annotations

import re
import tempfile
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import select, text, update

from simmerge_ray.base.errors import StoreError
from simmerge_ray.service.bandit.policy import NeuralLinearTS, Noise
from simmerge_ray.service.log.database import CHANGES_OF_THE_PAST, snapshots, upgrade_database, writing
from simmerge_ray.service.log.events import (
    Activation,
    ArmAdded,
    DecisionClosed,
    Discounted,
    EncoderEpoch,
    Event,
    RewardGiven,
    RewardVoided,
    WarmStart,
    voided_seq,
)
from simmerge_ray.service.log.fold import EFFECTS, Basis, Decisions, State, basis_of, fold, setups_of
from simmerge_ray.service.log.outcomes import Known, Outcome, Status, proposal_of
from simmerge_ray.service.log.replica import Replica
from simmerge_ray.service.log.snapshots import KEPT, dump, load, newest_snapshot
from tests.unit.service.event_logs import (
    ARMS,
    DIMENSIONS,
    all_rows,
    bits,
    decision,
    encode,
    folded_bits,
    opened,
    prior,
)

NOISE = Noise(0.04)


def test_every_kind_of_event_has_a_row_and_the_index_finds_those_that_change_the_past():
    assert set(EFFECTS) == {kind.kind for kind in Event.__subclasses__()}
    changes = {kind for kind, effect in EFFECTS.items() if effect.basis is not None}
    assert set(re.findall("'(.*?)'", str(CHANGES_OF_THE_PAST))) == changes


@st.composite
def histories(draw):
    """Events of a service's life, most of which are accepted; None: a replica looks (and may take a snapshot)."""
    events, epoch, decided = [ArmAdded("linear", prior()), WarmStart({"ties": prior()}, NOISE)], 0, 0
    for step in range(draw(st.integers(1, 40))):
        what = draw(st.sampled_from("ddddrrrrrrvvcaxxewm...s"))
        target = f"d{draw(st.integers(0, max(0, decided - 1)))}"
        if what == "d":
            late = draw(st.integers(0, epoch))  # a replica that had not seen the newest epoch
            learns = draw(st.sampled_from([("linear",), ("ties",), ("linear", "ties"), ()]))
            events.append(decision(f"d{decided}", epoch=late, seed=decided, learns=learns))
            decided += 1
        elif what == "r":
            events.append(RewardGiven(target, draw(st.floats(0, 1))))
        elif what == "v":
            events.append(RewardVoided(target, f"wrong {step}"))
        elif what == "c":
            events.append(DecisionClosed(target, "infeasible"))
        elif what == "a":
            events.append(ArmAdded(draw(st.sampled_from(ARMS)), prior(epoch, 2.0), epoch))
        elif what == "x":
            events.append(Discounted(draw(st.floats(0.01, 1))))
        elif what == "e" and epoch < 2:
            epoch += 1
            events.append(EncoderEpoch(epoch, DIMENSIONS[epoch], 0.5, {"ties": prior(epoch, 3.0)}, NOISE, f"m{epoch}"))
        elif what == "w":
            events.append(WarmStart({"ties": prior(epoch, draw(st.floats(0.5, 2)))}, Noise(0.02), epoch))
        elif what == "m":
            events.append(Activation(f"m{step}"))
        else:
            events.append(what)
    return events


def rows_of(events):
    """The rows of a log of these events, without a database."""
    known, rows = Known(), []
    for event in events:
        if isinstance(event, str):
            continue
        entry = proposal_of(event, 0.0)
        verdict = known.judge(entry)
        if not isinstance(verdict, Outcome):
            rows.append(entry.row(*verdict, len(rows) + 1))
            known.add(rows[-1])
    return rows


def slow_posteriors(rows):
    """By the words of the definition, with `GaussianPosterior` alone."""
    events = [(row.seq, row.event) for row in rows]
    voided = {event.reward_seq for _, event in events if isinstance(event, RewardVoided)}
    epochs = [event for _, event in events if isinstance(event, EncoderEpoch)]
    now = epochs[-1].epoch if epochs else 0
    made = {event.decision_id: event for _, event in events if event.kind == "decision"}
    priors, posteriors = {}, {}

    def start(arm, own, epoch):
        if epoch != now:
            own = epochs[-1].priors.get(arm) or type(own).prior(epochs[-1].num_dimensions, epochs[-1].ridge)
        priors[arm] = posteriors[arm] = own

    for seq, event in events:
        if isinstance(event, ArmAdded) and event.arm not in posteriors:
            start(event.arm, event.prior, event.epoch)
        elif isinstance(event, WarmStart):
            for arm, own in event.priors.items():
                start(arm, own, event.epoch)
        elif isinstance(event, EncoderEpoch):
            for arm, own in event.priors.items():
                if arm not in posteriors:
                    start(arm, own, event.epoch)
        elif isinstance(event, Discounted):
            posteriors = {arm: one.discounted(event.factor, priors[arm]) for arm, one in posteriors.items()}
        elif isinstance(event, RewardGiven) and seq not in voided:
            decided = made[event.decision_id]
            z, level = (decided.z, decided.level) if decided.epoch == now else encode(now, decided.features)
            for arm in decided.learns:
                posteriors[arm] = posteriors[arm].updated(z, event.utility - level)
    return posteriors


@settings(max_examples=150)
@given(histories())
def test_the_fold_is_its_definition_and_a_snapshot_anywhere_changes_nothing(events):
    rows = rows_of(events)
    whole = fold(rows, encode)
    expected = bits(slow_posteriors(rows))
    assert bits(dict(whole.view().posteriors)) == expected
    basis = basis_of(rows)
    for cut in range(0, len(rows), 3):
        state = State(basis, encode)
        for row in rows[:cut]:
            assert state.apply(row)
        state = load(dump(state), basis, encode)
        for row in rows[cut:]:
            assert state.apply(row)
        assert dump(state) == dump(whole)


@given(histories())
def test_every_view_of_the_log_counts_the_same(events):
    rows = rows_of(events)
    view = fold(rows, encode).view()
    courses = Decisions.of(rows).values()
    statuses = Counter(course.status(None, 0.0) for course in courses)
    assert (len(courses), statuses["open"], statuses["closed"]) == (view.num_decisions, view.num_open, view.num_closed)
    assert statuses["rewarded"] == view.num_rewards
    given = {row.seq: row.event.utility for row in rows if row.kind == RewardGiven.kind}
    voided = {voided_seq(row) for row in rows if row.kind == RewardVoided.kind}
    assert dict(course.reward for course in courses if course.reward) == {s: given[s] for s in given.keys() - voided}
    setups = setups_of(rows)
    assert (setups[-1].version if setups else None) == view.model_version


@settings(max_examples=25)
@given(histories(), st.integers(1, 5))
def test_replicas_that_look_at_any_time_agree_to_the_bit(events, page):
    """One follows the log and takes snapshots, one starts at the end from a snapshot; both equal the whole fold."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/log.db"
        upgrade_database(url)
        with opened(url) as log:
            follower = Replica(log, encode, page, at_once=0)
            futures = []
            for event in events:
                if not isinstance(event, str):
                    futures.append(log.submit(event))
                    continue
                for future in futures:
                    future.result(60)
                follower.catch_up()
                follower.settle()  # where there is a new epoch
                view = follower.catch_up()
                assert bits(dict(view.posteriors)) == folded_bits(all_rows(log))
                if event == "s":
                    follower.save_snapshot()
            for future in futures:
                future.result(60)
            rows = all_rows(log)
            late = Replica(log, encode, page).catch_up()
            follower.catch_up()
            follower.settle()
            followed = follower.catch_up()
            expected = fold(rows, encode).view()
            for view in (late, followed):
                assert bits(dict(view.posteriors)) == bits(dict(expected.posteriors))
                assert bits(dict(view.priors)) == bits(dict(expected.priors))
                assert replace(view, posteriors={}, priors={}) == replace(expected, posteriors={}, priors={})


def test_a_void_is_as_if_the_reward_had_never_been():
    start = [ArmAdded("linear", prior()), *(decision(f"d{i}", seed=i) for i in range(5))]
    rewards = [RewardGiven(f"d{i}", 0.1 + 0.2 * i) for i in range(5)]
    voided = rows_of([*start, *rewards, Discounted(0.5), RewardVoided("d1", "typo"), RewardGiven("d1", 0.9)])
    never = rows_of([*start, *(one for one in rewards if one.decision_id != "d1"), Discounted(0.5)])
    again = rows_of(
        [
            *start,
            *(one for one in rewards if one.decision_id != "d1"),
            Discounted(0.5),
            RewardGiven("d1", 0.9),
        ]
    )
    assert folded_bits(voided[:-1]) == folded_bits(never)
    assert folded_bits(voided) == folded_bits(again) != folded_bits(never)


def test_a_damaged_log_is_not_folded_over():
    rows = rows_of([ArmAdded("linear", prior()), decision("d0"), RewardGiven("d0", 0.5), decision("d1")])
    with pytest.raises(StoreError, match="event 3 follows event 1"):
        fold([rows[0], *rows[2:]], encode)
    with pytest.raises(StoreError, match="another version"):
        fold([rows[0]._replace(version=9)], encode)
    with pytest.raises(StoreError, match="'linear', which was not added"):
        fold([row._replace(seq=i) for i, row in enumerate(rows[1:3], 1)], encode)
    with pytest.raises(StoreError, match="not open"):
        fold([rows[0], rows[1], rows[2], rows[2]._replace(seq=4)], encode)


def test_a_state_that_failed_in_the_middle_is_folded_again(database):
    broken = [True]

    def fragile(epoch, features, keep):
        if broken[0]:
            raise OSError("the encoder's file is away")
        return encode(epoch, features)

    with opened(database) as log:
        for one in (ArmAdded("linear", prior()), decision("d0")):
            log.append(one)
        replica = Replica(log, fragile, at_once=0)
        assert replica.catch_up().num_open == 1
        log.append(RewardGiven("d0", 0.5))
        broken[0] = True
        log.append(decision("d1"))
        log.append(EncoderEpoch(1, 4, 1.0, {}, NOISE, "m1"))
        log.append(RewardGiven("d1", 0.25))
        for _ in range(2):
            assert (replica.catch_up().epoch, replica.catch_up().num_rewards) == (0, 2)  # the former epoch goes on
            with pytest.raises(OSError):
                replica.settle()
        broken[0] = False
        replica.settle()
        view = replica.catch_up()
        assert view.epoch == 1 and bits(dict(view.posteriors)) == folded_bits(all_rows(log))
        broken[0] = True
        log.append(decision("d2", epoch=0))  # by a replica that had not seen the new epoch: encoded when it is rewarded
        log.append(RewardGiven("d2", 0.25))
        for _ in range(2):
            with pytest.raises(OSError):
                replica.catch_up()
        broken[0] = False
        assert bits(dict(replica.catch_up().posteriors)) == folded_bits(all_rows(log))


def test_while_an_epoch_is_folded_beside_the_former_one_answers_and_learns(database):
    """Voids, arms and another epoch meanwhile, and what a replica decides that is in the new epoch already."""
    going, waiting = threading.Event(), threading.Event()

    def slow(epoch, features, keep):
        if epoch:
            waiting.set()
            assert going.wait(30)
        return encode(epoch, features)

    with opened(database) as log:
        before = [Activation("m0"), WarmStart({arm: prior() for arm in ARMS}, NOISE)]
        for one in (*before, *(decision(f"d{i}", seed=i) for i in range(4)), RewardGiven("d0", 0.5)):
            log.append(one)
        replica = Replica(log, slow, at_once=0)
        replica.catch_up()
        log.append(EncoderEpoch(1, DIMENSIONS[1], 1.0, {}, NOISE, "m1"))
        assert replica.catch_up().epoch == 0 and waiting.wait(30)
        log.append(RewardGiven("d1", 0.25))
        old = [row for row in all_rows(log) if row.kind != EncoderEpoch.kind]
        expected = folded_bits([row._replace(seq=number) for number, row in enumerate(old, 1)])
        assert bits(dict(replica.catch_up().posteriors)) == expected
        for one in (RewardVoided("d0", "wrong"), ArmAdded("late", prior()), Activation("m1"), Discounted(0.5)):
            log.append(one)
            view = replica.catch_up()
            assert (view.epoch, view.num_rewards, view.model_version, view.seq) == (0, 1, "m0", log.head())
        log.append(decision("n0", seed=9, epoch=1))  # by a replica that has swapped: learned in the new epoch alone
        log.append(RewardGiven("n0", 0.75))
        log.append(ArmAdded("new", prior(1), 1))
        known = bits(dict(view.posteriors))
        assert bits(dict(replica.catch_up().posteriors)) == known
        log.append(EncoderEpoch(2, DIMENSIONS[2], 1.0, {}, NOISE, "m2"))
        assert replica.catch_up().epoch == 0
        going.set()
        replica.settle()
        view = replica.catch_up()
        assert (view.epoch, view.model_version) == (2, "m2")
        assert bits(dict(view.posteriors)) == folded_bits(all_rows(log))
        past = log.changes_of_the_past(view.seq)
        voids = [row for row in past if row.kind == RewardVoided.kind]
        # The next replica that starts need not fold the whole log.
        assert newest_snapshot(log.engine, "default", basis_of(past), voids, view.seq, encode).seq == view.seq
        replica.close()


def test_a_view_stays_while_the_state_goes_on_and_makes_a_policy(database):
    with opened(database, clock=lambda: 1.0) as log:
        for one in (WarmStart({arm: prior() for arm in ARMS}, NOISE), decision("d0", expires_at=5.0)):
            log.append(one)
        replica = Replica(log, encode)
        before = replica.catch_up()
        kept = bits(dict(before.posteriors))
        assert replica.catch_up() is before and replica.expired(10.0) == ["d0"] and replica.expired(4.0) == []
        log.append(RewardGiven("d0", 0.5))
        after = replica.catch_up()
        assert bits(dict(before.posteriors)) == kept != bits(dict(after.posteriors)) and replica.expired(10.0) == []
        assert (after.num_decisions, after.num_rewards, after.num_open) == (1, 1, 0)
        assert after.posteriors["ties"] is before.posteriors["ties"]  # its factor is not computed again
        policy = NeuralLinearTS(after.posteriors, after.noise)
        assert policy.suggest(np.ones(3), "d1").arm in ARMS


def test_snapshots_that_are_damaged_or_too_new_are_passed_over(database):
    with opened(database) as log:
        replica = Replica(log, encode)
        replica.save_snapshot()  # nothing yet
        log.append(ArmAdded("linear", prior()))
        for i in range(12):
            log.append(decision(f"d{i}", seed=i))
            log.append(RewardGiven(f"d{i}", 0.5))
            replica.catch_up()
            replica.save_snapshot()
            replica.save_snapshot()  # a second replica at the same event

        def start(last=10**9):
            past = log.changes_of_the_past(last)
            voids = [row for row in past if row.kind == "reward_voided"]
            return newest_snapshot(log.engine, "default", basis_of(past), voids, last, encode).seq

        with log.engine.connect() as connection:
            kept = sorted(connection.execute(select(snapshots.c.seq)).scalars())
        assert kept == list(range(25 - 2 * (KEPT - 1), 26, 2))
        assert (start(), start(24), start(5)) == (25, 23, 0)
        with writing(log.engine) as connection:
            content = connection.execute(select(snapshots.c.data).where(snapshots.c.seq == 25)).scalar_one()
            flipped = content[:-1] + bytes([content[-1] ^ 1])
            connection.execute(update(snapshots).where(snapshots.c.seq == 25).values(data=flipped))
        assert start() == 23
        log.append(RewardVoided("d9", "wrong"))  # its reward is event 21
        assert start() == 19
        assert bits(dict(Replica(log, encode).catch_up().posteriors)) == folded_bits(all_rows(log))
        replica.catch_up()
        replica.save_snapshot()
        assert start() == 26
        log.append(EncoderEpoch(1, 4, 1.0, {}, NOISE, "m1"))
        assert start() == 0
        assert bits(dict(Replica(log, encode).catch_up().posteriors)) == folded_bits(all_rows(log))
    with pytest.raises(StoreError, match="format"):
        load(dump(State(Basis(), encode)).replace(b'"format":1', b'"format":2'), Basis(), encode)


def test_voids_and_epochs_are_found_by_their_index(tmp_path):
    url = f"sqlite:///{tmp_path}/log.db"
    upgrade_database(url)
    with opened(url) as log:
        assert log.append(ArmAdded("a", prior())).status == Status.CREATED
        statements: list[str] = []

        @sqlalchemy_event.listens_for(log.engine, "before_cursor_execute")
        def keep(connection, cursor, statement, parameters, context, many):
            statements.append(statement)

        log.changes_of_the_past(10)
        (asked,) = (one for one in statements if "kind IN" in one)
        with log.engine.connect() as connection:
            plan = connection.execute(text("EXPLAIN QUERY PLAN " + asked.replace("?", "1"))).all()
        assert "ix_events_changes" in str(plan)
