"""What was acknowledged is there after a crash; what cannot be stored is not acknowledged, and the reason is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import Engine, event, inspect, text
from sqlalchemy.exc import OperationalError

from simmerge_ray.base.errors import ConfigError, StoreError
from simmerge_ray.service.log import database as database_module
from simmerge_ray.service.log import postgres as postgres_module
from simmerge_ray.service.log.database import metadata, open_database, upgrade_database, writing
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import ArmAdded, RewardGiven
from simmerge_ray.service.log.outcomes import Status
from simmerge_ray.service.log.replica import Replica
from tests.unit.service.event_logs import all_rows, bits, decision, encode, folded_bits, opened, prior

ROOT = Path(__file__).parents[3]

# Four threads decide and reward for ever; a line is written when the log has acknowledged, never before.
CHILD = """
import os, sys, threading
from simmerge_ray.service.log.events import RewardGiven
from tests.unit.service.event_logs import decision, opened

with opened(sys.argv[1]) as log:
    def work(thread):
        for i in range(10**9):
            name = f"{os.getpid()}-{thread}-{i}"
            log.append(decision(name, seed=i))
            os.write(1, f"decision {name}\\n".encode())
            log.append(RewardGiven(name, (i % 100) / 100))
            os.write(1, f"reward {name}\\n".encode())
    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""


def test_whatever_was_acknowledged_survives_kill_9(database):
    acknowledged: list[str] = []
    with opened(database) as log:
        log.append(ArmAdded("linear", prior()))
        replica = Replica(log, encode)
        for kill_after in (1, 40, 90):
            command = [sys.executable, "-c", CHILD, database]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
                assert child.stdout is not None
                for _ in range(kill_after):
                    acknowledged.append(child.stdout.readline().strip())
                child.send_signal(signal.SIGKILL)
                acknowledged += child.stdout.read().split("\n")[:-1]
            rows = all_rows(log)
            stored = [f"{row.kind} {row.subject}" for row in rows]
            assert len(acknowledged) >= kill_after and set(acknowledged) <= set(stored)
            assert len(set(stored)) == len(stored) and [row.seq for row in rows] == list(range(1, len(rows) + 1))
            assert bits(dict(replica.catch_up().posteriors)) == folded_bits(rows)
            assert log.append(decision(f"after {kill_after}")).status == Status.CREATED


def test_a_full_disk_is_told_and_nothing_is_acknowledged_until_there_is_room(tmp_path):
    url = f"sqlite:///{tmp_path}/log.db"
    upgrade_database(url)
    engine = open_database(url)
    pages = [40]
    event.listen(engine, "connect", lambda one, _: one.execute(f"PRAGMA max_page_count={pages[0]}").close())
    engine.dispose()
    log = EventLog(engine)
    acknowledged, refused = [], []
    for i in range(200):
        try:
            log.append(decision(f"d{i}"))
            acknowledged.append(f"d{i}")
        except StoreError as error:
            assert "full" in str(error)
            refused.append(f"d{i}")
    assert acknowledged and refused
    assert [row.subject for row in all_rows(log)] == acknowledged
    pages[0] = 10_000
    engine.dispose()
    assert [log.append(decision(name)).status for name in refused] == [Status.CREATED] * len(refused)
    assert {row.subject for row in all_rows(log)} == {f"d{i}" for i in range(200)}
    log.close()
    engine.dispose()


def test_a_disk_that_cannot_be_written_is_told(tmp_path):
    url = f"sqlite:///{tmp_path}/log.db"
    upgrade_database(url)
    with opened(url) as log:
        log.append(ArmAdded("linear", prior()))
        with opened(f"sqlite:///file:{tmp_path}/log.db?mode=ro&uri=true") as frozen:
            with pytest.raises(StoreError, match="appending to the event log failed: .*readonly"):
                frozen.append(decision("d0"))
            assert Replica(frozen, encode).catch_up().seq == 1
        assert log.append(decision("d0")).status == Status.CREATED
    with pytest.raises(StoreError, match="unable to open"):
        open_database(f"sqlite:///{tmp_path}/absent/log.db")


def test_a_writer_that_does_not_let_go_is_waited_for_and_then_told(tmp_path, monkeypatch):
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.2)
    url = f"sqlite:///{tmp_path}/log.db"
    upgrade_database(url)
    other = open_database(url)
    with opened(url) as log:
        with writing(other), pytest.raises(StoreError, match="locked"):
            log.append(decision("d0"))
        assert log.append(decision("d0")).status == Status.CREATED
    other.dispose()


def test_a_server_that_goes_away_and_comes_back(postgres_server):
    admin = database_module.make_engine(f"{postgres_server}/postgres").execution_options(isolation_level="AUTOCOMMIT")

    def tell(*statements):
        with admin.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    throw_out = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'away'"
    tell("DROP DATABASE IF EXISTS away", "CREATE DATABASE away")
    upgrade_database(f"{postgres_server}/away")
    with opened(f"{postgres_server}/away") as log:
        log.append(ArmAdded("linear", prior()))
        replica = Replica(log, encode)
        replica.catch_up()
        tell(throw_out)
        assert log.append(decision("d0")).status == Status.CREATED
        tell("ALTER DATABASE away ALLOW_CONNECTIONS false", throw_out)
        with pytest.raises(StoreError, match="not currently accepting connections"):
            log.append(RewardGiven("d0", 0.5))
        with pytest.raises(StoreError):
            replica.catch_up()
        tell("ALTER DATABASE away ALLOW_CONNECTIONS true")
        assert log.append(RewardGiven("d0", 0.5)).status == Status.CREATED
        assert replica.catch_up().num_rewards == 1
    admin.dispose()


@contextmanager
def stopped_server(engine: Engine) -> Iterator[None]:
    """All processes of the PostgreSQL server stand still: its machine takes packets, and nobody answers."""
    with engine.connect() as connection:
        place = Path(connection.execute(text("SHOW data_directory")).scalar_one())
    engine.dispose()
    master = int((place / "postmaster.pid").read_text().split()[0])
    stopped = [master]
    os.kill(master, signal.SIGSTOP)  # first, so that it starts no more
    try:
        for child in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if int((child / "stat").read_text().rsplit(")", 1)[1].split()[1]) == master:
                    os.kill(int(child.name), signal.SIGSTOP)
                    stopped.append(int(child.name))
        yield
    finally:
        for pid in reversed(stopped):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_a_server_that_hangs_is_told_and_nothing_waits_for_ever(postgres_server, monkeypatch):
    monkeypatch.setattr(postgres_module, "ANSWER_S", 0.5)
    monkeypatch.setattr(postgres_module, "CONNECT_S", 2)
    admin = database_module.make_engine(f"{postgres_server}/postgres").execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS hanging"))
        connection.execute(text("CREATE DATABASE hanging"))
    upgrade_database(f"{postgres_server}/hanging")
    with opened(f"{postgres_server}/hanging") as log:
        log.append(ArmAdded("linear", prior()))
        replica = Replica(log, encode)
        replica.catch_up()
        with log.engine.connect() as held:
            held.execute(text("SELECT 1"))
            with stopped_server(admin):
                with pytest.raises(OperationalError, match="did not answer within 0.5 s"):
                    held.execute(text("SELECT 1"))  # of a transaction that had begun
                with pytest.raises(StoreError, match="appending to the event log failed: .*(time|did not answer)"):
                    log.append(decision("d0"), "a key")
                with pytest.raises(StoreError, match="reading the event log failed: .*(time|did not answer)"):
                    replica.catch_up()
        # What was sent before may have been taken; the same key says which, and it is there once.
        assert log.append(decision("d0"), "a key").status in (Status.CREATED, Status.REPLAYED)
        assert replica.catch_up().num_decisions == 1
    admin.dispose()


def test_a_transaction_that_others_wait_for_is_told(postgres_server, monkeypatch):
    monkeypatch.setattr(postgres_module, "LOCK_S", 0.2)
    admin = database_module.make_engine(f"{postgres_server}/postgres").execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS waiting"))
        connection.execute(text("CREATE DATABASE waiting"))
    admin.dispose()
    upgrade_database(f"{postgres_server}/waiting")
    other = open_database(f"{postgres_server}/waiting")
    with opened(f"{postgres_server}/waiting") as log:
        log.append(ArmAdded("linear", prior()))
        with writing(other) as holding:
            holding.execute(text("SELECT seq FROM log_head FOR UPDATE"))
            with pytest.raises(StoreError, match="lock timeout"):
                log.append(decision("d0"))
        assert log.append(decision("d0")).status == Status.CREATED
    other.dispose()


def described(url: str) -> dict[str, object]:
    """Tables, columns, keys and indexes, as the database has them."""
    engine = database_module.make_engine(url)
    found = inspect(engine)
    result = {
        table: [
            [(one["name"], str(one["type"]), one["nullable"]) for one in found.get_columns(table)],
            found.get_pk_constraint(table)["constrained_columns"],
            sorted((one["name"], one["column_names"]) for one in found.get_unique_constraints(table)),
            sorted(
                (
                    one["name"],
                    one["column_names"],
                    {name: str(value) for name, value in one.get("dialect_options", {}).items()},
                )
                for one in found.get_indexes(table)
            ),
        ]
        for table in found.get_table_names()
        if table != "alembic_version"
    }
    engine.dispose()
    return result


def test_migrating_from_nothing_gives_the_tables_of_the_program(empty_database):
    upgrade_database(empty_database)
    migrated = described(empty_database)
    upgrade_database(empty_database)  # once more changes nothing
    assert described(empty_database) == migrated and set(migrated) == {"log_head", "events", "snapshots"}
    engine = database_module.make_engine(empty_database)
    metadata.drop_all(engine)
    metadata.create_all(engine)
    assert described(empty_database) == migrated
    engine.dispose()


def test_replicas_that_start_at_once_upgrade_once(empty_database):
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(upgrade_database, empty_database) for _ in range(4)]:
            future.result(60)
    open_database(empty_database).dispose()


def test_a_schema_of_another_version_is_refused(empty_database):
    with pytest.raises(StoreError, match="has no event log.*simmerge db upgrade"):
        open_database(empty_database)
    upgrade_database(empty_database)
    engine = open_database(empty_database)
    with writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreError, match="schema version 9999.*simmerge db upgrade"):
        open_database(empty_database)
    with pytest.raises(StoreError, match="9999"):
        upgrade_database(empty_database)


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://localhost/x", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_name_no_durable_database_are_refused(url):
    with pytest.raises(ConfigError, match="database|event log"):
        open_database(url)


def test_sqlite_is_set_up_to_be_durable(tmp_path):
    url = f"sqlite:///{tmp_path}/log.db"
    upgrade_database(url)
    engine = open_database(url)
    with engine.connect() as connection:
        found = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
        assert found == ["wal", 2] and connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 10_000
    engine.dispose()
