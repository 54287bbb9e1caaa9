"""Tokens, roles and rates: who is known, what is refused when the tokens are read, and how often somebody may ask."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.service.http.access import Access, Buckets, Principal, new_token, read_access, single, token_digest

LONG, OTHER = "the-long-token-of-a-team", "another-token-of-a-team"


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def written(tmp_path, text: str):
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    return path


def test_a_file_names_clients_roles_and_rates_and_may_hold_only_the_digest_of_a_token(tmp_path):
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    access = read_access(
        written(
            tmp_path,
            f"- {{name: team, role: decide, token: {LONG}, requests_per_second: 5}}\n"
            f"- {{name: lab, role: reward, token_sha256: {digest.upper()}}}\n",
        )
    )
    assert access is not None
    team, lab = access.client_of(LONG), access.client_of(OTHER)
    assert team is not None and lab is not None
    assert (team.name, team.roles, team.per_second) == ("team", {"decide"}, 5)
    assert (lab.name, lab.roles, lab.per_second) == ("lab", {"reward"}, None)
    assert access.roles_of(OTHER) == {"reward"}
    assert LONG not in repr(team)  # what may get into a log has no token


@pytest.mark.parametrize(
    "token", [None, "", "x", LONG + " ", LONG.upper(), token_digest(LONG), "\xe4\xf6\xfc" * 8, "0" * 10**6]
)
def test_any_other_token_is_nobody_s(token):
    access = single(LONG)
    assert access.client_of(token) is None and access.roles_of(token) is None
    assert access.roles_of(LONG) == {"admin"}


def test_a_list_may_stand_under_tokens_and_be_json(tmp_path):
    entries = [{"name": "ops", "role": "admin", "token": LONG}]
    for text in (json.dumps(entries), json.dumps({"tokens": entries})):
        access = read_access(written(tmp_path, text))
        assert access is not None and access.roles_of(LONG) == {"admin"}


def test_the_environment_is_taken_where_there_is_no_file_and_the_list_before_the_single_token(tmp_path):
    several = f"[{{name: a, role: decide, token: {LONG}}}]"
    environment = {"SIMMERGE_TOKENS": several, "SIMMERGE_TOKEN": OTHER}
    first = read_access(None, environment)
    assert first is not None and first.roles_of(LONG) == {"decide"} and first.roles_of(OTHER) is None
    second = read_access(None, {"SIMMERGE_TOKEN": OTHER})
    assert second is not None and second.roles_of(OTHER) == {"admin"}
    assert read_access(None, {}) is None and read_access(None, {"SIMMERGE_TOKEN": "", "SIMMERGE_TOKENS": ""}) is None
    of_file = read_access(written(tmp_path, f"[{{name: f, role: reward, token: {LONG}}}]"), environment)
    assert of_file is not None and of_file.roles_of(LONG) == {"reward"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a list of tokens"),
        ("[]", "no tokens"),
        ("just text", "must be a list of tokens"),
        ("[a, b]", "must be a list of tokens"),
        ("{tokens: {a: b}}", "must be a list of tokens"),
        (f"[{{name: a, role: decide, token: {LONG}", "is not YAML"),
        (f"[{{name: a, role: decider, token: {LONG}}}]", "token 1: unknown role 'decider'"),
        (f"[{{name: a, token: {LONG}}}]", "token 1: unknown role"),
        (f"[{{role: admin, token: {LONG}}}]", "needs a name"),
        (f"[{{name: 7, role: admin, token: {LONG}}}]", "needs a name"),
        (f"[{{name: a, role: admin, token: {LONG}, roles: x}}]", "unknown field 'roles'"),
        ("[{name: a, role: admin}]", "either token or token_sha256"),
        (f"[{{name: a, role: admin, token: {LONG}, token_sha256: {'0' * 64}}}]", "either token or token_sha256"),
        ("[{name: a, role: admin, token: short}]", "5 characters; a token needs 16"),
        ("[{name: a, role: admin, token: p\xe4ssword-of-a-team}]", "ASCII"),
        ("[{name: a, role: admin, token: two words of a team}]", "ASCII"),
        ("[{name: a, role: admin, token_sha256: abc}]", "64 hexadecimal digits"),
        (f"[{{name: a, role: admin, token_sha256: {'g' * 64}}}]", "64 hexadecimal digits"),
        (f"[{{name: a, role: admin, token: {LONG}, requests_per_second: 0}}]", "must be a number above 0"),
        (f"[{{name: a, role: admin, token: {LONG}, requests_per_second: .nan}}]", "must be a number above 0"),
        (f"[{{name: a, role: admin, token: {LONG}, requests_per_second: .inf}}]", "must be a number above 0"),
        (f"[{{name: a, role: admin, token: {LONG}, requests_per_second: true}}]", "must be a number above 0"),
        (f"[{{name: a, role: admin, token: {LONG}}}, {{name: a, role: admin, token: {OTHER}}}]", "same name"),
        (
            f"[{{name: a, role: admin, token: {LONG}}}, {{name: b, role: decide, token_sha256: {token_digest(LONG)}}}]",
            "two tokens are the same",
        ),
    ],
)
def test_tokens_that_do_not_fit_are_refused_without_showing_them(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        read_access(written(tmp_path, text))
    assert LONG not in str(caught.value) and "short" not in str(caught.value)
    if text:
        with pytest.raises(ConfigError, match=said):
            read_access(None, {"SIMMERGE_TOKENS": text})


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_access(tmp_path / "absent.yaml", {"SIMMERGE_TOKEN": LONG})  # and nothing else is taken in its place
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_access(tmp_path / "binary")


def test_new_tokens_differ_fit_a_header_and_are_long_enough():
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    for token in tokens:
        assert token.isascii() and token.isprintable() and " " not in token
        assert single(token).roles_of(token) == {"admin"}


def test_a_client_with_a_rate_waits_and_one_without_never_does():
    clock = Clock()
    slow, fast = (
        Principal(name, frozenset({"admin"}), token_digest(name), rate) for name, rate in (("s", 2.0), ("f", None))
    )
    access = Access([slow, fast], clock)
    assert [access.wait(slow) for _ in range(4)] == [0.0] * 4  # two seconds' worth at once
    assert access.wait(slow) == pytest.approx(0.5)
    assert access.wait(slow) == pytest.approx(0.5)  # being refused costs nothing
    assert all(access.wait(fast) == 0.0 for _ in range(1000))
    clock.now += 0.5
    assert access.wait(slow) == 0.0 and access.wait(slow) > 0.0
    clock.now += 3600
    assert [access.wait(slow) for _ in range(5)].count(0.0) == 4  # an hour of silence saves up no more


def test_wrong_tokens_are_counted_per_address_and_apart_from_clients():
    access = Access([Principal("10.0.0.1", frozenset({"admin"}), token_digest(LONG), 1.0)], Clock())
    outcomes = [access.wait_after_failure("10.0.0.1") for _ in range(20)]
    assert outcomes[0] == 0.0 and outcomes[-1] > 0.0
    assert access.wait_after_failure("10.0.0.2") == 0.0
    client = access.client_of(LONG)
    assert client is not None and access.wait(client) == 0.0


@given(st.floats(0.2, 50), st.lists(st.floats(0, 3), min_size=1, max_size=200))
def test_in_any_time_no_more_than_the_rate_and_one_burst_come_through(rate, pauses):
    clock = Clock()
    buckets, let_through = Buckets(clock), []
    for pause in pauses:
        clock.now += pause
        wait = buckets.wait("one", rate)
        if wait == 0.0:
            let_through.append(clock.now)
        else:
            assert 0 < wait <= 1 / rate
    for first, start in enumerate(let_through):
        for last in range(first, len(let_through)):
            allowed = max(1.0, 2 * rate) + rate * (let_through[last] - start)
            assert last - first + 1 <= allowed + 1e-6


def test_after_the_wait_that_was_told_one_more_comes_through():
    clock = Clock()
    buckets = Buckets(clock)
    for _ in range(50):
        if wait := buckets.wait("one", 3.0):
            clock.now += wait + 1e-9
            assert buckets.wait("one", 3.0) == 0.0
