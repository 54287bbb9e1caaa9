"""The house: ten floors of rooms, no import that points up or in a circle, Ray in one room, and light imports.

Everything is computed from the import statements, those inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import simmerge_ray
from simmerge_ray.cli.app import app

ROOT = Path(simmerge_ray.__file__).parent
# From the ground up. A module imports only from its own room and from floors below; rooms of one floor know nothing of
# each other.
FLOORS = (
    ("base",),
    ("checkpoints",),
    ("plans",),
    ("merging",),
    ("signals", "search"),
    ("selector", "capacity", "reports"),
    ("service",),
    ("on_ray", "research"),
    ("pipelines",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {
    "torch", "ray", "transformers", "vllm", "sklearn", "matplotlib", "numba", "pandas", "sqlalchemy", "alembic",
    "fastapi",
}  # fmt: skip
LOOSE = {"__init__", "__main__", "errors"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Full names of what a file imports; of a name in a package, the module that it is, if it is one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                names.add(full if full in MODULES else module)
    return names


@cache
def all_imported() -> dict[str, set[str]]:
    return {name: imported(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def circles(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """The strongly connected parts of more than one node."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            for node in graph.get(waiting.pop(), ()):
                if node not in found:
                    found.add(node)
                    waiting.append(node)
        return found

    reach = {node: reached(node) for node in graph}
    parts = {frozenset({node} | {other for other in reach[node] if node in reach.get(other, ())}) for node in graph}
    return [set(part) for part in parts if len(part) > 1]


def test_circles_are_found():
    assert circles({"a": "b", "b": "c", "c": "a", "d": "a", "e": ""}) == [{"a", "b", "c"}]


def test_nothing_lies_loose_and_every_room_is_on_a_floor():
    loose = {path.stem for path in ROOT.glob("*.py")}
    assert loose <= LOOSE
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(FLOOR)


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") > 0 and name.split(".")[1] not in LOOSE])
def test_no_import_points_up_and_only_on_ray_imports_ray(name):
    for other in all_imported()[name]:
        parts = other.split(".")
        if parts[0] == "simmerge_ray" and len(parts) > 1 and parts[1] in FLOOR and room(name) != parts[1]:
            assert FLOOR[parts[1]] < FLOOR[room(name)], f"{name} imports {other}, which is not on a floor below"
        assert parts[0] not in ("benchmarks", "tests", "jobs"), f"{name} imports {other}"
        if parts[0] == "ray":
            assert room(name) == "on_ray", f"{name} imports {other}"


def test_no_circle_among_files():
    graph = {name: {other for other in all_imported()[name] if other in MODULES} for name in MODULES}
    assert circles(graph) == []


@pytest.mark.parametrize("place", sorted(FLOOR))
def test_no_circle_among_the_parts_of_a_room(place):
    """A part is a folder of the room, or a file that lies in it beside folders."""

    def part(name: str) -> str:
        return ".".join(name.split(".")[:3])

    graph: dict[str, set[str]] = {}
    for name in MODULES:
        if name.startswith(f"simmerge_ray.{place}."):
            others = {part(other) for other in all_imported()[name] if other.startswith(f"simmerge_ray.{place}.")}
            graph.setdefault(part(name), set()).update(others - {part(name)})
    assert circles(graph) == []


CALLS = """
import os, sys
{first}
for code in {codes}:
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            exec(code)
        except SystemExit:
            pass
        print()
        print("MODULES", *{{name.split(".")[0] for name in sys.modules}}, flush=True)
        os._exit(0)
    os.wait()
"""


def loaded_modules(codes: Sequence[str], first: str = "") -> list[set[str]]:
    """Top-level modules loaded by `first` and by each code, whatever its exit code: in a process of its own that is
    forked from one new interpreter after `first`."""
    script = CALLS.format(first=first, codes=list(codes))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("MODULES")]
    assert len(lines) == len(codes), result.stdout + result.stderr
    return [set(line.split()[1:]) for line in lines]


def loaded_by_commands(commands: Iterable[Sequence[str]]) -> list[set[str]]:
    codes = [f"sys.argv = {['simmerge', *command]}; main()" for command in commands]
    return loaded_modules(codes, "from simmerge_ray.cli.app import main")


def test_typos_load_no_heavy_library():
    typos = [
        "searhc",
        "labels make c.yaml --tasks t --out o --arm tise",
        "search c.yaml --tasks t --out o --dtype int8",
        "signals absent.yaml --probes p --out o",
        "signals c.yaml --out o --weights all",
        "merge absent.json out",
        "simulate --models 50 --params 111e9 --nodes 8",
        "simulate --models 2 --params 111e9 --nodes 1 --auto",
        "plan absent.yaml --selector s --signals t",
        "plan c.yaml --selector s --signals t --propagator virtul",
        "client --url nowhere policy",
        "auto absent.yaml --selector s --signals t --tasks d --out o",
    ]
    for typo, loaded in zip(typos, loaded_by_commands(typo.split() for typo in typos), strict=True):
        assert not loaded & HEAVY - ({"numba"} if typo.startswith("simulate") else set()), typo


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Words of every command and group below a group of commands, and the group itself."""
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def test_help_and_a_wrong_option_of_every_command_load_no_heavy_library():
    every = sorted(commands(typer.main.get_command(app)))
    assert {(), ("search",), ("labels", "make"), ("client", "decide")} <= set(every) and len(every) > 35
    calls = [[*path, option] for path in every for option in ("--help", "--no-such-option")]
    (loaded,) = loaded_modules(
        [
            f"for call in {calls}:\n"
            f"    try:\n        app(call)\n"
            f"    except SystemExit as error:\n        assert error.code == 2 * (call[-1] != '--help'), call"
        ],
        "from simmerge_ray.cli.app import app",
    )
    assert not loaded & HEAVY


def test_importing_the_package_or_a_job_s_config_loads_neither_torch_nor_ray():
    codes = (
        "import simmerge_ray",
        "import simmerge_ray.base.config",
        "import simmerge_ray.plans.operators.specs",
        "import simmerge_ray.plans.plan",
        "import simmerge_ray.signals.explain",
        "import simmerge_ray.service.client",
    )
    for code, loaded in zip(codes, loaded_modules(codes), strict=True):
        assert not loaded & {"torch", "ray", "transformers"}, code
