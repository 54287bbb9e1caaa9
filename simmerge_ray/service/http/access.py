"""Access control: bearer tokens with roles and rate limits, from a YAML file or the environment.

    - {name: trainer, role: decide, token_sha256: 2c26b4...}      # tokens of the file may be given as their SHA-256
    - {name: evaluation, role: reward, token: "...", requests_per_second: 20}
    - {name: ops, role: admin, token: "..."}

`decide` asks for decisions and rankings, `reward` reports and closes, `admin` does everything; any role may look.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import ConfigError, unknown_name
from simmerge_ray.base.storage import read_text
from simmerge_ray.base.yaml_text import YamlError, parse_yaml

ROLES = ("decide", "reward", "admin")
TOKENS_VARIABLE, TOKEN_VARIABLE = "SIMMERGE_TOKENS", "SIMMERGE_TOKEN"
MIN_LENGTH = 16  # characters of a token that is given in clear
FAILURES_PER_S = 5.0  # wrong tokens of one address
_KEPT_BUCKETS = 10_000
_FIELDS = ("name", "role", "token", "token_sha256", "requests_per_second")


@dataclass(frozen=True)
class Principal:
    """Somebody with a token. per_second: requests; None: no limit."""

    name: str
    roles: frozenset[str]
    digest: str
    per_second: float | None = None


@dataclass
class _Bucket:
    level: float
    at: float


@dataclass
class Buckets:
    """Token buckets by name: a rate, and as many at once as come in two seconds (one at least)."""

    clock: Callable[[], float] = time.monotonic
    _buckets: OrderedDict[str, _Bucket] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, name: str, per_second: float) -> float:
        """0 where one more is allowed, which then counts; else seconds until it is."""
        size, now = max(1.0, 2 * per_second), self.clock()
        with self._lock:
            one = self._buckets.setdefault(name, _Bucket(size, now))
            self._buckets.move_to_end(name)
            while len(self._buckets) > _KEPT_BUCKETS:
                self._buckets.popitem(last=False)
            one.level, one.at = min(size, one.level + (now - one.at) * per_second), now
            if one.level < 1.0:
                return (1.0 - one.level) / per_second
            one.level -= 1.0
            return 0.0


class Access:
    """The clients of a service.

    failures_per_s: wrong tokens that one address may send; more are refused for their number alone.

    Raises ConfigError: no client, or two with the same name or token.
    """

    def __init__(
        self,
        clients: Sequence[Principal],
        clock: Callable[[], float] = time.monotonic,
        failures_per_s: float = FAILURES_PER_S,
    ) -> None:
        if not clients:
            raise ConfigError(f"no tokens: name a file, or set {TOKENS_VARIABLE} or {TOKEN_VARIABLE}")
        for what in ("name", "digest"):
            values = [getattr(client, what) for client in clients]
            if len(set(values)) < len(values):
                raise ConfigError("two tokens have the same name" if what == "name" else "two tokens are the same")
        self._clients = tuple(clients)
        self._buckets, self._failures_per_s = Buckets(clock), failures_per_s

    def client_of(self, token: str | None) -> Principal | None:
        """Who has a token; takes as long for every token, known or not."""
        digest = token_digest(token or "")
        found = None
        for client in self._clients:
            if hmac.compare_digest(client.digest, digest):
                found = client
        return found if token else None

    def roles_of(self, token: str | None) -> frozenset[str] | None:
        """Roles of a token, None for one that is not known."""
        client = self.client_of(token)
        return client.roles if client else None

    def wait(self, client: Principal) -> float:
        """Seconds until a client may ask again; 0: now, and it counts."""
        return self._buckets.wait(f"client {client.name}", client.per_second) if client.per_second else 0.0

    def wait_after_failure(self, address: str) -> float:
        """The same for an address that came with a wrong token."""
        return self._buckets.wait(f"failure {address}", self._failures_per_s)

    def wait_to_log_in(self, address: str) -> float:
        """The same for an address that brings a token to the dashboard, right or wrong."""
        return self._buckets.wait(f"login {address}", self._failures_per_s)


def token_digest(token: str) -> str:
    """SHA-256 of a token, as a file may have it."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_token() -> str:
    """A random token."""
    return secrets.token_urlsafe(24)


def single(token: str) -> Access:
    """One admin token."""
    return Access([Principal("admin", frozenset({"admin"}), token_digest(_long_enough(token, "the token")))])


def read_access(path: Path | None, environment: Mapping[str, str] = os.environ) -> Access | None:
    """Tokens of a file, else of the environment; None where there are none.
    Raises ConfigError: a file that cannot be read, or an entry that does not fit.
    """
    if path is not None:
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the tokens {path} cannot be read: {error}") from None
        return _parsed(text, str(path))
    if environment.get(TOKENS_VARIABLE):
        return _parsed(environment[TOKENS_VARIABLE], TOKENS_VARIABLE)
    return single(environment[TOKEN_VARIABLE]) if environment.get(TOKEN_VARIABLE) else None


def _parsed(text: str, where: str) -> Access:
    try:
        entries = parse_yaml(text)
    except YamlError:
        raise ConfigError(f"{where} is not YAML") from None  # the text is secret: nothing of it is shown
    if isinstance(entries, dict):
        entries = entries.get("tokens")
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise ConfigError(f"{where} must be a list of tokens: {{name: ..., role: ..., token: ...}}")
    return Access([_client(one, f"{where}, token {number}") for number, one in enumerate(entries, 1)])


def _client(entry: Mapping[str, Any], where: str) -> Principal:
    for key in entry:
        if key not in _FIELDS:
            raise ConfigError(f"{where}: {unknown_name('field', str(key), _FIELDS)}")
    role: Any = entry.get("role")
    name: Any = entry.get("name")
    if role not in ROLES:
        raise ConfigError(f"{where}: {unknown_name('role', str(role), ROLES)}")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: it needs a name, which the log shows in place of the token")
    if ("token" in entry) == ("token_sha256" in entry):
        raise ConfigError(f"{where}: give either token or token_sha256")
    digest = str(entry.get("token_sha256", "")).lower()
    if "token" in entry:
        digest = token_digest(_long_enough(str(entry["token"]), where))
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ConfigError(f"{where}: token_sha256 must have 64 hexadecimal digits")
    rate = entry.get("requests_per_second")
    if rate is not None and not (isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < 1e6):
        raise ConfigError(f"{where}: requests_per_second is {rate!r}; it must be a number above 0")
    return Principal(name, frozenset({role}), digest, rate)


def _long_enough(token: str, where: str) -> str:
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(f"{where}: a header can carry only letters, digits and signs of ASCII")
    if len(token) < MIN_LENGTH:
        raise ConfigError(f"{where} has {len(token)} characters; a token needs {MIN_LENGTH} at least")
    return token
