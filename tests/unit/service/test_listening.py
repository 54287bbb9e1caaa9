"""A port that is taken: who has it, said at once; and what a killed service left is not in the way of the next."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.service.http import listening
from simmerge_ray.service.http.listening import LOCK, check_port, free_port, is_unused, open_port


def test_a_taken_port_is_refused_with_who_has_it():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port {port} is taken by .* \(process {os.getpid()}: .*name another --po"
        ):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with open_port("127.0.0.1", port) as mine:
        assert mine.getsockname()[1] == port


def test_an_address_that_is_not_of_this_machine_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1:8000: "):
        check_port("203.0.113.1", 8000)


@pytest.mark.parametrize(
    ("name", "who"), [("simmerge_ray", "a service of simmerge"), ("other", "another program")], ids=["ours", "another"]
)
def test_a_program_of_ours_is_told_from_another(tmp_path, name, who):
    program = tmp_path / name
    program.write_text(
        "import socket\ns = socket.create_server(('127.0.0.1', 0))\nprint(s.getsockname()[1], flush=True)\ninput()"
    )
    command = [sys.executable, "-S", "-E", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as held:
        assert held.stdout is not None
        port = int(held.stdout.readline())
        with pytest.raises(ConfigError, match=rf"port {port} is taken by {who} \(process {held.pid}: "):
            check_port("127.0.0.1", port)
        held.communicate("")


def test_a_free_port_is_one_that_nothing_takes_unasked():
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    for _ in range(20):
        port = free_port()
        assert 19999 < port < min(30000, int(limits[0]))  # of Ray's workers, of Serve's replicas, of connections
        open_port("0.0.0.0", port).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_on_one_interface_is_not_free(monkeypatch, host):
    other = free_port()
    with open_port(host, port := free_port()):
        drawn = iter([port, port, other])
        monkeypatch.setattr(listening, "_random", SimpleNamespace(choice=lambda _: next(drawn)))
        assert free_port() == other


def test_a_service_that_lives_holds_its_lock(tmp_path):
    assert is_unused(tmp_path)  # without a file
    with open(tmp_path / LOCK, "w") as lock:
        assert is_unused(tmp_path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not is_unused(tmp_path)
