"""Backup, restore, export and pruning of an event log, by the commands that people type."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sqlalchemy import insert, select
from typer.testing import CliRunner

from simmerge_ray.base.errors import ConfigError, OutputError, SimmergeError
from simmerge_ray.cli.app import app
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.log import maintenance
from simmerge_ray.service.log.database import events, log_head, open_database, writing
from simmerge_ray.service.log.events import (
    ArmAdded,
    DecisionClosed,
    DecisionMade,
    EncoderEpoch,
    RewardGiven,
    RewardVoided,
)
from simmerge_ray.service.log.outcomes import Status
from simmerge_ray.service.log.replica import Replica
from tests.unit.service.event_logs import ARMS, all_rows, bits, decision, encode, folded_bits, opened, prior

NOW = 5_000_000.0


def db(*arguments: object) -> str:
    """The output of `simmerge db ...`; its errors are raised."""
    result = CliRunner().invoke(app, ["db", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def filled(url: str, namespace: str = "default") -> None:
    """Decisions that are open, rewarded, rewarded again, closed, closed after a void, and over."""
    clock = iter(range(10**6))
    with opened(url, namespace=namespace, clock=lambda: float(next(clock))) as log:
        for arm in ARMS:
            log.append(ArmAdded(arm, prior()))
        for i in range(8):
            answer = {"kind": "pair", "left": "ä", "right": f"b{i}", "tasks": ["t"], "arm": "linear"}
            log.append(decision(f"d{i}", seed=i, expires_at=1000.0 if i == 7 else None, answer=answer), key=f"k{i}")
        for i in (0, 1, 2, 5):
            log.append(RewardGiven(f"d{i}", i / 10))
        for i in (2, 5):
            log.append(RewardVoided(f"d{i}", "mistyped"))
        log.append(RewardGiven("d2", 0.9))
        log.append(DecisionClosed("d5", "infeasible"))
        log.append(DecisionClosed("d6", "expired"))


def rows_of(url: str, namespace: str = "default") -> list[tuple[object, ...]]:
    with opened(url, namespace=namespace) as log:
        return [tuple(row) for row in all_rows(log)]


@pytest.mark.parametrize("name", ["backup.parquet", "backup.db"])
def test_a_backup_is_restored_byte_for_byte(database, name, tmp_path):
    filled(database)
    filled(database, "other")
    copy, fresh = tmp_path / name, f"sqlite:///{tmp_path}/fresh.db"
    if name == "backup.db" and database.startswith("postgresql"):
        with pytest.raises(ConfigError, match="a backup of PostgreSQL is a Parquet file"):
            db("backup", database, copy)
        return
    assert "events of default" in db("backup", database, copy)
    assert [path.name for path in tmp_path.glob("*backup*")] == [name]
    assert "events of other" in db("restore", fresh, copy)
    for namespace in ("default", "other"):
        assert rows_of(fresh, namespace) == rows_of(database, namespace) != []
    with opened(fresh) as log:
        assert bits(dict(Replica(log, encode).catch_up().posteriors)) == folded_bits(all_rows(log))
        head = log.head()
        assert log.append(decision("d0", seed=0), key="k0").status == Status.CONFLICT  # keys are remembered
        assert log.append(decision("new")).row.seq == head + 1
    with pytest.raises(ConfigError, match="namespace 'default' of .* has events already"):
        db("restore", fresh, copy)
    with pytest.raises(OutputError, match="exists already"):
        db("backup", database, copy)


def test_the_file_alone_is_enough_where_the_environment_names_the_database(database, tmp_path, monkeypatch):
    filled(database)
    monkeypatch.setenv("SIMMERGE_DATABASE", database)
    assert "events of default" in db("backup", tmp_path / "copy.parquet")
    assert "decisions" in db("export", tmp_path / "decisions.parquet")
    for given in ([], [database]):
        with pytest.raises(ConfigError, match="name the FILE"):
            db("backup", *given)
    monkeypatch.delenv("SIMMERGE_DATABASE")
    with pytest.raises(ConfigError, match="name the FILE"):
        db("backup", tmp_path / "copy.parquet")


def test_a_backup_of_sqlite_can_be_restored_into_postgresql(tmp_path, postgres_server, request):
    source = f"sqlite:///{tmp_path}/log.db"
    db("upgrade", source)
    filled(source)
    db("backup", source, tmp_path / "copy.db")
    db("backup", source, tmp_path / "copy.parquet")
    from sqlalchemy import text

    from simmerge_ray.service.log.database import make_engine

    admin = make_engine(f"{postgres_server}/postgres").execution_options(isolation_level="AUTOCOMMIT")
    for name in ("copy.db", "copy.parquet"):
        target = "restored_" + name.split(".")[1]
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {target}"))
            connection.execute(text(f"CREATE DATABASE {target}"))
        db("restore", f"{postgres_server}/{target}", tmp_path / name)
        assert rows_of(f"{postgres_server}/{target}") == rows_of(source)
    admin.dispose()


def test_a_backup_is_one_state_while_others_write(database, tmp_path):
    filled(database)
    child = (
        "import sys\nfrom tests.unit.service.event_logs import decision, opened\n"
        "with opened(sys.argv[1]) as log:\n"
        "    for i in range(10**9):\n        log.append(decision(f'c{i}'))\n        print(i, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", child, database], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        heads = [maintenance.backup(database, tmp_path / f"{i}.parquet")["default"] for i in range(3)]
        writer.kill()
    assert heads == sorted(heads)
    for i, head in enumerate(heads):
        target = f"sqlite:///{tmp_path}/{i}.db"
        maintenance.restore(target, tmp_path / f"{i}.parquet")
        assert rows_of(target) == rows_of(database)[:head]


def test_files_that_are_no_whole_backup_are_refused(tmp_path):
    source, target = f"sqlite:///{tmp_path}/log.db", f"sqlite:///{tmp_path}/fresh.db"
    db("upgrade", source)
    filled(source)
    copy = tmp_path / "copy.parquet"
    db("backup", source, copy)
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be read"):
        db("restore", target, copy)
    copy.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    with pytest.raises(ConfigError, match="damaged|cannot be read"):
        db("restore", target, copy)
    table = pq.read_table(copy := write(tmp_path / "whole.parquet", whole))
    pq.write_table(table.slice(0, 5), tmp_path / "short.parquet")
    with pytest.raises(ConfigError, match="damaged: it has"):
        db("restore", target, tmp_path / "short.parquet")
    pq.write_table(table.take([1, 0, *range(2, len(table))]), tmp_path / "swapped.parquet")
    with pytest.raises(ConfigError, match="out of order"):
        db("restore", target, tmp_path / "swapped.parquet")
    other = table.replace_schema_metadata({**table.schema.metadata, b"simmerge_schema": b"0000"})
    pq.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match="schema version 0000"):
        db("restore", target, tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match="no backup of an event log"):
        db("restore", target, write(tmp_path / "some.txt", b"PAR what?" * 500))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        db("restore", target, tmp_path / "absent.parquet")
    connection = sqlite3.connect(tmp_path / "log.db")
    connection.execute("SELECT * FROM events").fetchone()
    with pytest.raises(ConfigError, match="in use"):
        db("restore", target, tmp_path / "log.db")
    connection.close()
    assert rows_of(target) == []  # none of them left anything
    db("restore", target, copy)
    assert rows_of(target) == rows_of(source)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_decisions_are_exported_with_their_rewards(database, tmp_path):
    filled(database)
    assert "has 8 decisions" in db("export", database, tmp_path / "d.parquet")
    table = {row["id"]: row for row in pq.read_table(tmp_path / "d.parquet").to_pylist()}
    found = {name: (row["status"], row["utility"]) for name, row in table.items()}
    nothing = {"d3": ("open", None), "d4": ("open", None), "d7": ("expired", None)}
    closed = {"d5": ("closed", None), "d6": ("expired", None)}
    assert found == {"d0": ("rewarded", 0.0), "d1": ("rewarded", 0.1), "d2": ("rewarded", 0.9), **nothing, **closed}
    one = table["d5"]
    assert (one["left"], one["right"], one["tasks"], one["arm"]) == ("ä", "b5", ["t"], "linear")
    assert one["arms"] == list(ARMS) and one["propensities"] == [0.1, 0.2, 0.7] and one["propensity"] == 0.1
    assert (one["closed_reason"], one["explored"], one["model_version"]) == ("infeasible", True, "m0")
    with opened(database) as log:
        num_events = log.head()
    assert f"has {num_events} events" in db("export", database, tmp_path / "e.parquet", "--table", "events")
    db("restore", f"sqlite:///{tmp_path}/again.db", tmp_path / "e.parquet")  # raw events are a backup
    assert rows_of(f"sqlite:///{tmp_path}/again.db") == rows_of(database)
    with pytest.raises(ConfigError, match="no namespace 'typo' in the database; known: default"):
        db("export", database, tmp_path / "x.parquet", "--namespace", "typo")
    assert not (tmp_path / "x.parquet").exists()


def test_pruning_changes_no_fold_whatever_encoder_comes(database, tmp_path):
    filled(database)
    with opened(database) as log:
        before = all_rows(log)
        replica = Replica(log, encode)
        replica.catch_up()
        replica.save_snapshot()
        assert "would remove features of 2 decisions" in db(
            "prune", database, "--older-than-days", 1, "--keep-snapshots", 0, "--dry-run"
        )
        assert all_rows(log) == before
        assert "removed features of 2 decisions" in db("prune", database, "--older-than-days", 1)
        assert "features of 0 decisions" in db("prune", database, "--older-than-days", 1)
        after = all_rows(log)
        changed = [new.subject for old, new in zip(before, after, strict=True) if old != new]
        assert changed == ["d5", "d6"] and sum(len(row.data) for row in after) < sum(len(row.data) for row in before)
        for old, new in zip(before, after, strict=True):
            assert old._replace(body="", data=b"") == new._replace(body="", data=b"")
            if old != new:
                was, now = old.event, new.event
                assert isinstance(was, DecisionMade) and isinstance(now, DecisionMade)
                assert now.features.size == now.z.size == 0 and was.features.size
                assert (now.request, now.answer, now.propensities) == (was.request, was.answer, was.propensities)
        assert folded_bits(after) == folded_bits(before)
        priors = {arm: prior(epoch=1) for arm in ARMS}
        log.append(EncoderEpoch(1, len(priors["linear"].moment), 1.0, priors, Noise(0.01), "m1"))
        epoch = all_rows(log)[-1]
        assert folded_bits([*after, epoch]) == folded_bits([*before, epoch])
        assert bits(dict(replica.catch_up().posteriors)) == folded_bits([*before, epoch])
        assert log.append(RewardGiven("d5", 0.5)).status == Status.GONE
        assert log.append(RewardGiven("d3", 0.5)).status == Status.CREATED
        db("prune", database, "--keep-snapshots", 0)
        assert bits(dict(Replica(log, encode).catch_up().posteriors)) == folded_bits(all_rows(log))
        assert json.loads(db("status", database, "--json"))["namespaces"][0]["snapshots"] == []


def test_what_was_closed_lately_is_kept(database):
    filled(database)
    assert maintenance.prune(database, "default", before=0.0, keep_snapshots=8).decisions == 0


def test_the_status_says_what_is_there(empty_database):
    if empty_database.startswith("sqlite"):
        with pytest.raises(ConfigError, match="there is no database file"):
            db("status", empty_database)
        assert not Path(empty_database.removeprefix("sqlite:///")).exists()
    else:
        assert "schema version none (this program needs" in db("status", empty_database)
    assert "0001" in db("upgrade", empty_database)
    assert "namespace" not in db("status", empty_database)
    filled(empty_database)
    with opened(empty_database) as log:
        replica = Replica(log, encode)
        head = replica.catch_up().seq
        replica.save_snapshot()
    said = db("status", empty_database)
    assert f"namespace default: {head} events, 1970-01-01 00:00" in said and "1 snapshots" in said
    found = json.loads(db("status", empty_database, "--json"))
    (one,) = found["namespaces"]
    assert found["schema"] == "0001" and found["size_bytes"] > 0 and one["snapshots"] == [head]
    assert one["counts"] == {"arm_added": 3, "decision": 8, "decision_closed": 2, "reward": 5, "reward_voided": 2}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status", "mysql://here/x"], 2),
        (["upgrade", "nonsense"], 2),
        (["backup", "sqlite:////absent/x.db", "out.parquet"], 2),
        (["restore", "sqlite:////absent/x.db", "absent.parquet"], 2),
        (["export", "sqlite:////absent/x.db", "out.csv", "--table", "rows"], 2),
        (["upgrade", "sqlite:////absent/directory/x.db"], 1),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, code, tmp_path, simmerge):
    result = simmerge("db", *arguments, cwd=tmp_path)
    assert result.returncode == code and "Traceback" not in result.stderr
    if "--table" not in arguments:
        assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_backup_that_fails_leaves_no_file(database, tmp_path, monkeypatch):
    filled(database)
    engine = open_database(database)
    row = dict(rows_as_mappings(engine)[0])
    row |= {"seq": 10**6, "body": "{", "subject": "zzz", "idempotency_key": None, "kind": "decision"}
    with writing(engine) as connection:
        connection.execute(insert(events), [row])
    engine.dispose()
    with pytest.raises((SimmergeError, ValueError)):
        db("export", database, tmp_path / "d.parquet")
    assert [path.name for path in tmp_path.iterdir() if "parquet" in path.name] == []
    with pytest.raises(OutputError, match="cannot be written"):
        db("backup", database, tmp_path / "absent" / "b.parquet")


def rows_as_mappings(engine):
    with engine.connect() as connection:
        assert connection.execute(select(log_head.c.seq)).scalar() > 0
        return connection.execute(select(events).order_by(events.c.seq)).mappings().all()


def test_numbers_survive_the_way_through_parquet(tmp_path):
    url, copy = f"sqlite:///{tmp_path}/log.db", tmp_path / "b.parquet"
    db("upgrade", url)
    with opened(url, clock=lambda: 1.1e9 + 1 / 3) as log:
        log.append(decision("d", level=5e-324, z=np.array([0.1, -0.0, 1e308])))
    db("backup", url, copy)
    db("restore", f"sqlite:///{tmp_path}/b.db", copy)
    assert rows_of(f"sqlite:///{tmp_path}/b.db") == rows_of(url)
