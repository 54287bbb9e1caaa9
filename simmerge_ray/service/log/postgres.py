"""PostgreSQL that hangs is an error after some seconds, with a reason, and never a wait for ever.

Three things can hang. The server's machine, or the network to it: the kernel says so (`tcp_user_timeout`, keepalives).
Another transaction that holds the head row: the server says so (`lock_timeout`, `statement_timeout`), and it ends a
transaction whose client has stopped in the middle of it. And the server's processes, while its machine goes on to take
packets: only who waits can notice that, so every wait for an answer has an end here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from time import monotonic
from typing import Any, TypeVar

import psycopg

CONNECT_S = 5
LOCK_S = 8.0
STATEMENT_S = 10.0
ANSWER_S = 15.0  # longer than the server needs to say that it took too long
STOPPED_CLIENT_S = 30.0
T = TypeVar("T")


class ImpatientConnection(psycopg.Connection[Any]):
    """Closes itself where the server is silent for `patience_s`; None: it waits."""

    patience_s: float | None = None

    def wait(self, gen: Generator[Any, Any, T], *arguments: Any, **options: Any) -> T:
        """As `psycopg.Connection.wait`. Raises psycopg.OperationalError after too long a silence."""
        if self.patience_s is None:
            return super().wait(gen, *arguments, **options)
        try:
            return super().wait(_within(gen, self.patience_s), *arguments, **options)
        except TimeoutError:
            self.pgconn.finish()  # nobody knows where it stands
            raise psycopg.OperationalError(f"the server did not answer within {self.patience_s:g} s") from None


def connector(patient: bool) -> Callable[..., ImpatientConnection]:
    """What SQLAlchemy's event `do_connect` asks for a connection.

    patient: for work that may take minutes: statements have no limit; locks and clients that stopped have.
    """

    def connect(_dialect: Any, _record: Any, arguments: Any, options: Mapping[str, Any]) -> ImpatientConnection:
        network = {
            "connect_timeout": CONNECT_S,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": int(1000 * ANSWER_S),
        }
        made: ImpatientConnection = ImpatientConnection.connect(*arguments, **{**network, **options})
        made.patience_s = None if patient else ANSWER_S
        if "options" not in options:  # of the URL, which may have limits of its own
            limits = {"lock_timeout": LOCK_S, "idle_in_transaction_session_timeout": STOPPED_CLIENT_S}
            limits |= {} if patient else {"statement_timeout": STATEMENT_S}
            for name, seconds in limits.items():
                made.execute("SELECT set_config(%s, %s, false)", (name, f"{int(1000 * seconds)}ms"))
            made.commit()
        return made

    return connect


def _within(gen: Generator[Any, Any, T], seconds: float) -> Generator[Any, Any, T]:
    """The same generator, with an end. psycopg wakes it up several times a second while it waits."""
    deadline = monotonic() + seconds
    try:
        state = next(gen)
        while True:
            ready = yield state
            if not ready and monotonic() > deadline:
                raise TimeoutError
            state = gen.send(ready)
    except StopIteration as end:
        return end.value
