"""A real S3 server (moto) for tests, as a process of its own, and a proxy that breaks connections on the way to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def credentials(port: int) -> dict[str, str]:
    """The environment of a client of the server at that port, as the docs tell it to users."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "simmerge-tests",
        "AWS_SECRET_ACCESS_KEY": "simmerge-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


@contextmanager
def s3_server(port: int, log: Path, host: str = "127.0.0.1", **environment: str) -> Iterator[str]:
    """An S3 server with nothing in it; its URL."""
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "1000", **environment}
        )
    try:
        url = f"http://{host}:{port}"
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the S3 server ended with {process.returncode}: {log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def endpoint(url: str) -> Iterator[None]:
    """This process talks to the server at `url`. Clients are kept by fsspec, which does not look at the environment:
    those of before are forgotten, and afterwards the client of this one."""
    from fsspec import get_filesystem_class

    before = os.environ.get("AWS_ENDPOINT_URL")
    os.environ["AWS_ENDPOINT_URL"] = url
    get_filesystem_class("s3").clear_instance_cache()
    try:
        yield
    finally:
        os.environ.pop("AWS_ENDPOINT_URL")
        if before is not None:
            os.environ["AWS_ENDPOINT_URL"] = before
        get_filesystem_class("s3").clear_instance_cache()


def make_bucket(url: str, name: str) -> None:
    """By a plain request: the server takes any signature, and the clients under test make no buckets."""
    header = {"Authorization": "AWS4-HMAC-SHA256 Credential=simmerge-tests/20200101/us-east-1/s3/aws4_request"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT", headers=header), timeout=20).close()


class Proxy:
    """A TCP proxy in front of a port; while `down`, connections are refused and those that are open are cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.cut_after: int | None = None  # bytes of a request, once: then its connection is cut
        self.down_after: int | None = None  # bytes of all requests: then the proxy is down
        self.num_cut = 0
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.up()

    def up(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # `close` alone would leave `accept` waiting
            listener.close()
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                self._open |= {client, server}
            threading.Thread(target=self._copy, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._copy, args=(server, client, False), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        done = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                done += len(data)
                if is_request and self.cut_after is not None and done > self.cut_after:
                    self.cut_after = None
                    self.num_cut += 1
                    break
                if is_request and self.down_after is not None:
                    self.down_after -= len(data)
                    if self.down_after < 0:
                        self.down_after = None
                        self.down()
                        break
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
            with self._lock:
                self._open.discard(one)
