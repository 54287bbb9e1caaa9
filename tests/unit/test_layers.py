"""The flow of the package: no import points backwards, only `distributed` knows Ray, and imports stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import simmerge_ray

ROOT = Path(simmerge_ray.__file__).parent
# Left to right; a module imports only from its own layer and from what stands before it. Modules of one entry may
# import each other's members (a package), or do not (alternatives, written apart).
FLOW = (
    "errors", "placement", "progress", "storage", "config", "runs", "checkpoints", "adapters", "digests", "catalogue",
    "probes", "operators", "plans", "merge_graph", "mergekit_format", "merging", "signals", "propagation", "evaluation",
    "transformers_evaluator", "headroom", "labels", "search", "model_size", "selector", "bandit", "service", "client",
    "figures", "report", "selector_report", "demo", "study", "cluster_manifests", "cluster_lint", "simulation",
    "distributed", "jobs", "cli_places", "search_cli", "catalogue_cli", "labels_cli", "serve_cli", "plan_cli",
    "auto_cli", "client_cli", "db_cli", "cluster_cli", "simulate_cli", "cli",
)  # fmt: skip


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names.append(node.module or "")
    return names


def test_every_module_has_its_place_in_the_flow():
    assert {layer(path) for path in modules()} == set(FLOW)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_backwards_and_only_distributed_imports_ray(path):
    own = FLOW.index(layer(path))
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "simmerge_ray" and len(parts) > 1:
            assert FLOW.index(parts[1]) <= own, f"{path.name} imports {name}, which stands to its right"
        if parts[0] == "ray":
            assert layer(path) == "distributed", f"{path.name} imports {name}"


def loaded_modules(code: str) -> set[str]:
    """Top-level modules loaded by `code` in a new interpreter, whatever its exit code."""
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
        "print('MODULES', *{m.split('.')[0] for m in sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("MODULES")]
    assert lines, result.stdout + result.stderr
    return set(lines[0].split()[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        "['simmerge', '--help']",
        "['simmerge', 'search', '--help']",
        "['simmerge', 'search', '--evaluatr', 'x']",
        "['simmerge', 'searhc']",
        "['simmerge', 'search', 'c.yaml', '--tasks', 't', '--out', 'o', '--arm', 'tise']",
        "['simmerge', 'search', 'c.yaml', '--tasks', 't', '--out', 'o', '--dtype', 'int8']",
        "['simmerge', 'signals', 'absent.yaml', '--probes', 'p', '--out', 'o']",
        "['simmerge', 'signals', 'c.yaml', '--out', 'o', '--weights', 'all']",
        "['simmerge', 'merge', 'absent.json', 'out']",
        "['simmerge', 'plan', '--help']",
        "['simmerge', 'simulate', '--models', '50', '--params', '111e9', '--nodes', '8']",
        "['simmerge', 'plan', 'absent.yaml', '--selector', 's', '--signals', 't']",
        "['simmerge', 'plan', 'c.yaml', '--selector', 's', '--signals', 't', '--propagator', 'virtul']",
        "['simmerge', 'auto', '--help']",
        "['simmerge', 'client', 'decide', '--help']",
        "['simmerge', 'client', '--url', 'nowhere', 'policy']",
        "['simmerge', 'auto', 'absent.yaml', '--selector', 's', '--signals', 't', '--tasks', 'd', '--out', 'o']",
    ],
)
def test_help_and_typos_load_no_heavy_library(arguments):
    loaded = loaded_modules(f"sys.argv = {arguments}; from simmerge_ray.cli import main; main()")
    assert not loaded & {"torch", "ray", "transformers", "vllm", "sklearn", "matplotlib"}


def test_importing_the_package_or_a_job_s_config_loads_neither_torch_nor_ray():
    for code in (
        "import simmerge_ray",
        "import simmerge_ray.config",
        "import simmerge_ray.operators.specs",
        "import simmerge_ray.plans",
        "import simmerge_ray.signals.explain",
        "import simmerge_ray.client",
    ):
        assert not loaded_modules(code) & {"torch", "ray", "transformers"}, code
