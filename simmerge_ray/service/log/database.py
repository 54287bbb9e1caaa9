"""The database of the event log: its tables, its version, and how SQLite and PostgreSQL are opened.

SQLite is for processes of one machine on a local disk: write-ahead log, `synchronous=FULL` (a commit is on disk when it
returns), and `BEGIN IMMEDIATE` for writers, who therefore take turns. PostgreSQL is given by URL; there writers take
turns on the head row of their namespace.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
import tenacity
from sqlalchemy import Connection, Engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from simmerge_ray.base.errors import ConfigError, StoreError
from simmerge_ray.base.extras import require

SCHEMA_VERSION = "0001"  # of the newest migration
RESTORE = (  # what to do about damage
    "fill a new database from the last backup, e.g. `simmerge db restore sqlite:////data/new.db backup.parquet`, and "
    "serve that"
)
BUSY_TIMEOUT_S = 10.0
_MIGRATIONS = Path(__file__).parent / "migrations"
_UPGRADE_LOCK = 7_330_001  # any number that nobody else takes
_BEGIN = "simmerge_begin"  # execution option: the statement that opens a SQLite transaction

_TURNS: WeakKeyDictionary[sa.Pool, AbstractContextManager[Any]] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()

metadata = sa.MetaData()

# One row per namespace; `seq` is the number of its last committed event. Whoever appends holds this row to the commit.
log_head = sa.Table(
    "log_head",
    metadata,
    sa.Column("namespace", sa.String(200), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
)

FIRST_HEAD = text("INSERT INTO log_head (namespace, seq) VALUES (:namespace, 0) ON CONFLICT DO NOTHING")

# subject: the decision's id, an arm, an epoch; empty where nothing else can be the same. attempt: which of the events
# of this kind about this subject; a reward has the number of voided ones before it, so that two un-voided rewards of a
# decision would be the same row. digest: of what was asked, which tells a retry from a conflict.
events = sa.Table(
    "events",
    metadata,
    sa.Column("namespace", sa.String(200), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("subject", sa.String(200)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("idempotency_key", sa.String(200)),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("namespace", "subject", "kind", "attempt", name="uq_events_subject"),
    sa.UniqueConstraint("namespace", "idempotency_key", name="uq_events_idempotency_key"),
)
# A fold has to know these events before it starts. A query that repeats this very text finds them by the index.
CHANGES_OF_THE_PAST = text("kind IN ('reward_voided', 'encoder_epoch')")
sa.Index(
    "ix_events_changes",
    events.c.namespace,
    events.c.seq,
    sqlite_where=CHANGES_OF_THE_PAST,
    postgresql_where=CHANGES_OF_THE_PAST,
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("namespace", sa.String(200), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch_seq", sa.BigInteger, nullable=False),
    sa.Column("checksum", sa.String(64), nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)


def open_database(url: str, patient: bool = False) -> Engine:
    """An engine for a database whose schema is that of this program.

    patient: for work that may take minutes, not for answers: PostgreSQL's statements have no time limit.

    Raises ConfigError: a URL that is neither SQLite nor PostgreSQL, or SQLite without a file. StoreError: the database
    cannot be reached, or has no schema or one of another version.
    """
    engine = make_engine(url, patient)
    with store_errors("opening the event log"), engine.connect() as connection:
        found = schema_version(connection)
    if found != SCHEMA_VERSION:
        what = "has no event log" if found is None else f"has the schema version {found}"
        raise StoreError(
            f"the database {shown(engine)} {what}; this program needs version {SCHEMA_VERSION}: "
            "run `simmerge db upgrade` (or use the program that wrote it)"
        )
    return engine


def upgrade_database(url: str) -> None:
    """Bring a database, empty or of an older version, to this program's schema; no change if it is current.
    Raises ConfigError, StoreError: as `open_database`.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    engine = make_engine(url, patient=True)
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    try:
        with store_errors("upgrading the event log"), writing(engine) as connection:
            if engine.dialect.name == "postgresql":  # several replicas may start at once; SQLite's begin has locked
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(f"the database cannot be upgraded by this program: {error}") from error
    finally:
        engine.dispose()


def make_engine(url: str, patient: bool = False) -> Engine:
    """An engine, without connecting to the database.

    patient: as `open_database`.

    Raises ConfigError: as `open_database`.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"the database URL {url!r} cannot be read; e.g. sqlite:////var/lib/simmerge.db") from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigError("an event log in memory would be lost; give a file: sqlite:////path/to/simmerge.db")
        engine = sa.create_engine(parsed.set(drivername="sqlite+pysqlite"), connect_args={"timeout": BUSY_TIMEOUT_S})
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if backend == "postgresql":
        require("psycopg", "postgres")
        from simmerge_ray.service.log.postgres import connector

        driver = parsed.set(drivername="postgresql+psycopg")
        # A writer that waited for the head row must see what the one before it committed.
        engine = sa.create_engine(driver, pool_pre_ping=True, isolation_level="READ COMMITTED")
        event.listen(engine, "do_connect", connector(patient))
        return engine
    raise ConfigError(f"the database is {backend!r}; known: postgresql, sqlite")


def shown(engine: Engine) -> str:
    """Its URL, without driver and password."""
    return engine.url.set(drivername=engine.url.get_backend_name()).render_as_string()


def _turn(engine: Engine) -> AbstractContextManager[Any]:
    """Held by the thread of this process that writes. SQLite would let the others sleep, up to a tenth of a second."""
    if engine.dialect.name != "sqlite":
        return nullcontext()
    with _TURNS_LOCK:
        return _TURNS.setdefault(engine.pool, threading.RLock())


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes, committed at the end. SQLite: it is the only one from its start."""
    with (
        _turn(engine),
        engine.connect().execution_options(**{_BEGIN: "BEGIN IMMEDIATE"}) as connection,
        connection.begin(),
    ):
        yield connection


class KeptConnection:
    """A connection that one thread keeps from transaction to transaction, given up for another after an error.

    To take one out of the pool and give it back costs as much as several statements. PostgreSQL's are not kept: the
    pool asks each time whether the server still knows them.

    writes: as `writing`.
    """

    def __init__(self, engine: Engine, writes: bool) -> None:
        self._engine = engine.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"}) if writes else engine
        self._keeps = engine.dialect.name == "sqlite"
        self._turn = _turn(engine) if writes else nullcontext()
        self._connection: Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction, committed at the end."""
        if self._connection is None:
            self._connection = self._engine.connect()
        try:
            with self._turn, self._connection.begin():
                yield self._connection
        except BaseException:
            self._connection.invalidate()
            self.close()
            raise
        if not self._keeps:
            self.close()

    def close(self) -> None:
        """Give it back; the next transaction takes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Failures of the database become StoreError, with the database's own reason."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise store_error(doing, error) from error


def store_error(doing: str, error: Exception) -> StoreError:
    """StoreError with what the driver says, without the statement and its parameters."""
    reason = str(getattr(error, "orig", None) or error).strip().splitlines()
    said = reason[0] if reason else type(error).__name__
    damage = "malformed" in said or "not a database" in said
    return StoreError(f"{doing} failed: {said}" + (f"; {RESTORE}" if damage else ""))


def schema_version(connection: Connection) -> str | None:
    """Of the tables; None without any."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says so, not before the first INSERT
    # Where two connections turn a new file to WAL at once, one is told "locked" without the timeout's waiting.
    for attempt in tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_locked),
        stop=tenacity.stop_after_delay(BUSY_TIMEOUT_S),
        wait=tenacity.wait_random(0.001, 0.02),
        reraise=True,
    ):
        with attempt:
            connection.execute("PRAGMA journal_mode=WAL").close()
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _is_locked(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN"))
