"""Everything imported is declared, and an optional library is asked for by the extra that brings it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simmerge_ray.base.errors import InputError, MissingLibraryError
from simmerge_ray.base.extras import require
from tests.declared import CORE, EXTRAS, PROJECT, ROOT, distributions, names

OWN = {"simmerge_ray", "tests", "benchmarks", "jobs"}
# The benchmarks run mergekit in an environment of its own; rich, which is declared, brings markdown_it.
ELSEWHERE = {"mergekit", "markdown_it"}
BY_OTHERS = {"cmaes", "ruamel-yaml"}  # optuna's sampler imports it; the catalogue's editor will


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level modules that a file imports, lazily too, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0], node.lineno


def undeclared(folder: str, declared: set[str]) -> set[str]:
    return {
        f"{path.relative_to(ROOT)}:{line} {module}"
        for path in (ROOT / folder).rglob("*.py")
        for module, line in imports(path)
        if module not in sys.stdlib_module_names | OWN | ELSEWHERE
        and not distributions().get(module, {module}) & declared
    }


def test_what_the_package_imports_is_declared():
    extras = set().union(*(names(found) for extra, found in EXTRAS.items() if extra != "dev"))
    assert not undeclared("simmerge_ray", names(CORE) | extras) | undeclared("jobs", names(CORE))


def test_what_tests_and_benchmarks_import_is_declared():
    everything = names(CORE).union(*(names(found) for found in EXTRAS.values()))
    assert not undeclared("tests", everything) | undeclared("benchmarks", everything)


def test_what_is_declared_is_imported():
    imported = {module for path in (ROOT / "simmerge_ray").rglob("*.py") for module, _ in imports(path)}
    used = set().union(*(distributions().get(module, ()) for module in imported))
    assert names(CORE) - BY_OTHERS <= used


def test_every_hint_names_the_extra_that_holds_the_library():
    found = 0
    for path in (ROOT / "simmerge_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                module, extra = node.args
                if isinstance(module, ast.Constant) and isinstance(extra, ast.Constant):
                    assert distributions()[module.value.split(".")[0]] & names(EXTRAS[extra.value]), path
                    found += 1
    assert found >= 4


def test_a_missing_library_is_one_error_with_a_hint(monkeypatch):
    assert require("json", "cloud").dumps(1) == "1"
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingLibraryError, match=r'^gcsfs is not installed: pip install "simmerge_ray\[cloud\]"'):
        require("gcsfs", "cloud")
    assert issubclass(MissingLibraryError, InputError)  # exit code 2


def test_the_lock_holds_what_is_declared():
    lock = (ROOT / "requirements" / "cpu.lock").read_text().lower().replace("_", "-").replace(".", "-")
    for name in names(CORE).union(*(names(EXTRAS[extra]) for extra in ("cpu", "demo", "postgres"))):
        assert f"\n{name}==" in lock, name
    assert "version" in PROJECT["dynamic"]
