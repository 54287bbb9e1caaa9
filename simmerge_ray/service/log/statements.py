"""Statements of the hot path as the driver takes them.

To execute a statement SQLAlchemy looks its text up, orders its parameters and wraps its result; for statements that
take the database tens of microseconds this costs several times as much. Here that is done once for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ClauseElement


class Statement:
    """A statement in the words of one database.

    It is for columns whose values the drivers of SQLite and PostgreSQL take and give as they are: text, integers,
    floats, bytes.
    """

    def __init__(self, statement: ClauseElement, dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        self._text = str(compiled)
        self._fixed = {name: value for name, value in compiled.params.items() if value is not None}
        self._order: list[str] | None = compiled.positiontup if compiled.positional else None

    def run(self, connection: Connection, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Execute it once, in the connection's transaction, and fetch all rows. Raises SQLAlchemy's DBAPIError."""
        rows: list[tuple[Any, ...]] = self._executed(connection, self._given(values), many=False)
        return rows

    def run_many(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Execute it for each row. Raises as `run`."""
        self._executed(connection, [self._given(row) for row in rows], many=True)

    def _given(self, values: Mapping[str, Any]) -> Any:
        given = {**self._fixed, **values}
        return given if self._order is None else tuple([given[name] for name in self._order])

    def _executed(self, connection: Connection, given: Any, many: bool) -> Any:
        if not connection.in_transaction():
            connection.begin()
        driver: Any = connection.dialect.loaded_dbapi
        cursor = connection.connection.cursor()
        try:
            if many:
                cursor.executemany(self._text, given)
                return None
            cursor.execute(self._text, given)
            return cursor.fetchall()
        except driver.Error as error:
            if connection.dialect.is_disconnect(error, connection.connection, cursor):
                connection.invalidate(error)  # else the rollback would fail, and say so in place of the reason
            # Without the parameters: they are the requests of others.
            raise DBAPIError.instance(self._text, None, error, driver.Error, dialect=connection.dialect) from error
        finally:
            cursor.close()
