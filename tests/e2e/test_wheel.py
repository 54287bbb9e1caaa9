"""The package builds as a wheel that holds everything it needs at run time, and needs no more than it declares."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from simmerge_ray import __version__
from tests.declared import CORE, EXTRAS, closure, distributions, names

ROOT = Path(__file__).parents[2]
# Written against an optional library: imported where `require` has found it. All others import in a bare environment.
OPTIONAL = {
    "simmerge_ray.on_ray.vllm_worker": "cpu",
    "simmerge_ray.search.evaluation.harness_lm": "lm_eval",
    "simmerge_ray.service.log.postgres": "postgres",
}
# Run by a migration tool, which prepares what they find when they are imported.
MIGRATIONS = "simmerge_ray.service.log.migrations"

BARE = """
import json, sys
refused = set(json.loads(sys.argv.pop(1)))

class Filtered:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        spec = self.finder.find_spec(name, path, target)
        if spec is None or name.split(".")[0] not in refused:
            return spec
        return spec if "/ray/thirdparty_files/" in str(spec.origin) else None  # Ray brings a psutil of its own
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Filtered, sys.meta_path)
"""
IMPORT_ALL = (
    BARE
    + """
import importlib
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
import simmerge_ray
print("FAILED", json.dumps([simmerge_ray.__file__, failed]))
"""
)
MAIN = BARE + "\nfrom simmerge_ray.cli.app import main\nmain()\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "simmerge_ray", source / "simmerge_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", source / "dist", source]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = (source / "dist").glob(f"simmerge_ray-{__version__}-*.whl")
    target = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(target)
    return target


def bare(wheel: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code on the wheel with what an installation of it without extras brings, and nothing else.

    No environment is installed, which would take minutes, and none is shared, which would hide what is not declared:
    the requirements of pyproject.toml are followed through the metadata of what is installed here, and an import of any
    top-level module whose distribution they do not reach finds nothing.
    """
    allowed = closure(CORE) | {"simmerge-ray"}
    refused = sorted(module for module, held_by in distributions().items() if not held_by & allowed)
    environment = {**os.environ, "PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, json.dumps(refused), *arguments]
    return subprocess.run(command, env=environment, cwd=wheel, capture_output=True, text=True, check=False)


def test_the_wheel_holds_the_shipped_files_the_licence_and_the_command(wheel):
    for path in (
        "py.typed",
        "capacity/unit_costs.yaml",
        "checkpoints/general.jsonl",
        *(f"research/zoo/base/{name}" for name in ("model.safetensors", "tokenizer.json")),
        *(f"selector/default/{name}" for name in ("selector.json", "shortlist/selector.safetensors")),
        *(f"service/http/dashboard/{name}" for name in ("templates/dashboard.html", "static/js/main.js")),
        *(f"service/http/dashboard/static/vendor/uplot/{name}" for name in ("uPlot.iife.min.js", "LICENSE")),
    ):
        assert (wheel / "simmerge_ray" / path).is_file(), path
    (about,) = wheel.glob("*.dist-info")
    metadata = (about / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata and f"\nVersion: {__version__}\n" in metadata
    assert (about / "entry_points.txt").is_file() and list(about.rglob("LICENSE"))


def test_every_module_imports_without_extras(wheel):
    modules = [
        ".".join(path.relative_to(wheel).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((wheel / "simmerge_ray").rglob("*.py"))
    ]
    modules = [name for name in modules if not name.startswith(MIGRATIONS) and not name.endswith("__main__")]
    result = bare(wheel, IMPORT_ALL, *modules)
    lines = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert lines, result.stderr
    file, failed = json.loads(lines[-1].removeprefix("FAILED"))
    assert Path(file).is_relative_to(wheel)
    assert set(failed) == set(OPTIONAL), failed


def test_what_is_refused_is_what_extras_bring():
    optional = set().union(*(names(found) for extra, found in EXTRAS.items() if extra != "dev"))
    assert optional and not optional & closure(CORE)


def test_a_merge_is_made_without_extras(wheel, catalogue_path, tmp_path):
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(catalogue_path.parent / name), "parameters": {"weight": 0.5}} for name in ("m0", "m1")
        ],
        "dtype": "float32",
    }
    (tmp_path / "merge.yml").write_text(json.dumps(recipe))  # JSON is YAML
    result = bare(wheel, MAIN, "merge", str(tmp_path / "merge.yml"), str(tmp_path / "merged"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_an_optional_library_that_is_missing_is_one_line_with_its_extra(wheel):
    result = bare(wheel, MAIN, "catalogue", "list", "s3://bucket/catalogue.yaml")
    assert result.returncode == 2
    assert 'pip install "simmerge_ray[cloud]"' in result.stderr and "Traceback" not in result.stderr
