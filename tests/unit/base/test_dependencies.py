"""Everything imported is declared, and an optional library is asked for by the extra that brings it."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from simmerge_ray.base.errors import InputError, MissingLibraryError
from simmerge_ray.base.extras import require
from tests.declared import CORE, EXTRAS, PROJECT, ROOT, distributions, names

OWN = {"simmerge_ray", "tests", "benchmarks", "jobs"}
# The benchmarks run mergekit in an environment of its own.
ELSEWHERE = {"mergekit"}
BY_OTHERS = {"cmaes", "ruamel-yaml"}  # optuna's sampler imports it; the catalogue's editor will


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level modules that a file imports, lazily too, with the line."""
    for node in nodes(path):
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
        for node in nodes(path):
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


@pytest.mark.slow  # a new interpreter, which imports transformers: what it imports cannot be seen where all is there
def test_transformers_comes_without_scikit_learn_until_assisted_generation_asks_for_it():
    code = """
import sys
from simmerge_ray.base.extras import import_transformers
import_transformers().AutoModelForCausalLM
before = {"sklearn", "pandas"} & set(sys.modules)
generator = sys.modules["transformers.generation.candidate_generator"]
assert not before and generator.is_sklearn_available(), before
print([part.tolist() for part in generator.roc_curve([0, 1], [0.2, 0.7])])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [inf, 0.7, 0.2]]\n", done.stderr


LISTING = """\
global.extra-index-url='file:///a/simple file:///b/simple'
global.index-url='https://one.example/simple'
install.find-links='/wheels'
download.no-index='true'
:env:.index-url='https://two.example/simple'
:env:.default-timeout='60'
"""


def test_uv_gets_the_settings_of_pip_install_with_variables_first():
    script = runpy.run_path(str(ROOT / "requirements" / "uv_install.py"))
    settings = script["pip_settings"](LISTING)
    assert settings["default-timeout"] == "60" and "no-index" not in settings  # `pip download` only
    assert script["uv_options"](settings)[2:] == [
        *("--default-index", "https://two.example/simple", "--index", "file:///a/simple", "--index"),
        *("file:///b/simple", "--find-links", "/wheels"),
    ]
    assert script["pip_settings"](":env:.index-url='a'\nglobal.index-url='b'") == {"index-url": "a"}
    assert "--no-index" in script["uv_options"](script["pip_settings"]("global.no-index='1'"))
