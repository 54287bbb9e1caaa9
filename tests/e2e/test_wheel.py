"""The package builds as a wheel that holds everything it needs at run time."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_the_shipped_base_the_licence_and_the_command(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "simmerge_ray", source / "simmerge_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path / "dist",
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("simmerge_ray-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    page = [
        f"service/dashboard/{name}" for name in ("templates/dashboard.html", "static/js/main.js", "static/icon.svg")
    ]
    library = [f"service/dashboard/static/vendor/uplot/{name}" for name in ("uPlot.iife.min.js", "LICENSE")]
    base = [f"demo/data/base/{name}" for name in ("model.safetensors", "tokenizer.json")]
    shipped = [f"data/default_selector/{name}" for name in ("selector.json", "shortlist/selector.safetensors")]
    for path in ("py.typed", "cli.py", *base, *page, *library, *shipped):
        assert f"simmerge_ray/{path}" in names
    assert any(name.endswith("entry_points.txt") for name in names) and any(name.endswith("LICENSE") for name in names)
