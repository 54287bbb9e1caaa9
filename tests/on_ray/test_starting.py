"""A cluster that does not start, or is not there, is one error."""

from __future__ import annotations

import socket

import pytest
import ray

from simmerge_ray.base.errors import ClusterError, ConfigError
from simmerge_ray.on_ray.resources import ray_session


@pytest.fixture(autouse=True)
def _not_connected(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


def test_a_ray_address_where_nobody_listens_is_refused_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("it was not looked at first"))
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS='{address}'.*started here"), ray_session():
            pass


@pytest.mark.parametrize("error", [Exception("The current node timed out during startup.\nMore."), SystemExit(15)])
def test_a_cluster_that_does_not_start_is_one_line(monkeypatch, error):
    def init(**_):
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match=r"did not start here.*try again") as caught, ray_session():
        pass
    assert "\n" not in str(caught.value)
