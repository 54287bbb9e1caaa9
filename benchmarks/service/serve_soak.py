"""Kill parts of the service on Ray Serve with -9 under load, and all of it: is anything lost, or counted twice?

    python -m benchmarks.service.serve_soak DATABASE --run RUN [--kills 60] [--clusters 8] [--jobs 6] [--seed 0]

As `benchmarks.service.soak`, with the same load and the same proof at the end, for `simmerge serve RUN`: two replicas
on an empty database. A kill takes a part, in turn: a replica or all of them, the proxy (HAProxy, the actor that manages
it, Serve's own proxy behind it), the controller. Every fourth comes before the part killed last is back. Between them
all processes of the cluster are killed at once and the same command is started again, on the same database.

At the end Ctrl-C must leave no process. Prints JSON; exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.service.running import RayService, is_ready, kill_9, wait_until, write_tokens
from benchmarks.service.soak import Acknowledged, figures, main_of, under_load
from simmerge_ray.service.log.database import upgrade_database

NUM_REPLICAS = 2
REPLICA, CONTROLLER = "ray::ServeReplica", "ray::ServeController"
PROXIES = ("haproxy", "ray::HAProxyManager", "ray::ProxyActor")
_PROGRESS = 10  # acknowledgements after a kill, before the next
_LONGEST_PAUSE_S = 1.0


def victims(number: int) -> tuple[str, bool]:
    """What the kill of this number takes: the name of its processes, and whether all of them or one."""
    turn, part = divmod(number, 3)
    if part == 0:
        return REPLICA, turn % 2 == 1
    return (PROXIES[turn % len(PROXIES)], True) if part == 1 else (CONTROLLER, True)


class Killer:
    """Disturbs a service. killed: how often what was killed."""

    def __init__(self, service: RayService, kills: int, clusters: int, seed: int) -> None:
        self._service, self._kills, self._clusters = service, kills, clusters
        self._random = random.Random(seed + 1)
        self.killed: Counter[str] = Counter()

    async def disturb(self, told: Acknowledged) -> None:
        """All kills; the service is whole again afterwards."""
        for number in range(self._kills):
            await asyncio.sleep(self._random.uniform(0, _LONGEST_PAUSE_S))
            await asyncio.to_thread(self._kill, number)
            if number % 4 != 3:
                await asyncio.to_thread(self._recovered, told, len(told))
            if (number + 1) * self._clusters // self._kills > number * self._clusters // self._kills:
                await asyncio.to_thread(self._kill_cluster)
                await asyncio.to_thread(self._recovered, told, len(told))
        await asyncio.to_thread(self._recovered, told, len(told))

    def _kill(self, number: int) -> None:
        name, every = victims(number)
        wait_until(lambda: bool(self._service.pids(name)), f"{name} is there")
        pids = self._service.pids(name)
        for pid in pids if every else pids[:1]:
            kill_9(pid)
        self.killed[f"all of {name}" if every and name == REPLICA else name] += 1

    def _kill_cluster(self) -> None:
        self._service.kill()
        self.killed["the cluster"] += 1
        self._service.start()
        self._service.wait()

    def _recovered(self, told: Acknowledged, before: int) -> None:
        """Until nothing is missing and more than before is acknowledged."""
        wait_until(self._whole, "every part of the service is there")
        wait_until(lambda: len(told) >= before + _PROGRESS, "the service acknowledges something")

    def _whole(self) -> bool:
        service = self._service
        parts = all(service.pids(name) for name in (*PROXIES, CONTROLLER))
        return parts and len(service.pids(REPLICA)) == NUM_REPLICAS and is_ready(service.url)


def serve_soak(
    url: str, run: Path, directory: Path, port: int, kills: int, clusters: int, jobs: int = 6, seed: int = 0
) -> dict[str, Any]:
    """A campaign on an empty database; figures, and under `wrong` what is."""
    upgrade_database(url)
    started = time.monotonic()
    options = [f"--replicas={NUM_REPLICAS}", f"--database={url}", f"--tokens={write_tokens(directory)}"]
    service = RayService(run, directory / "service.log", port, *options)
    killer = Killer(service, kills, clusters, seed)
    wrong = []
    try:
        service.start()
        service.wait()
        told, policy = asyncio.run(under_load(service.url, jobs, seed, killer.disturb))
        try:
            if code := service.stop():
                wrong.append(f"Ctrl-C: exit code {code}")
        except RuntimeError as error:
            wrong.append(str(error))
    finally:
        service.kill()
    return figures(url, started, told, policy, wrong, killed=dict(killer.killed))


def _run(given: argparse.Namespace, url: str, directory: Path, port: int) -> dict[str, Any]:
    return serve_soak(url, given.run, directory, port, given.kills, given.clusters, given.jobs, given.seed)


if __name__ == "__main__":
    numbers = {"kills": (60, "of parts"), "clusters": (8, "kills of everything at once"), "jobs": (6, "at once")}
    main_of(__doc__, numbers, _run)
