"""`make docs`: the site is built without a warning, asks no other host for anything, knows every command and config."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.unit.cli.test_helps import COMMANDS

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed: the extra `docs`"),
    pytest.mark.slow,  # mkdocs needs some seconds
]
# Of another host: what a page loads, not what it links to.
FOREIGN = re.compile(
    r"""<(?:script|img|iframe|link(?![^>]*canonical))[^>]*(?:src|href)=["']?https?://|url\(["']?https?://"""
)


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", root / "mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, "--site-dir", out], env=environment, capture_output=True, text=True, check=False)


def test_it_is_built_and_asks_no_other_host(tmp_path):
    result = build(ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    for file in (*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")):
        assert not FOREIGN.search(file.read_text()), file
    reference = (tmp_path / "commands.html").read_text()
    assert all(f"simmerge {name}<" in reference for name in COMMANDS)
    configs = (tmp_path / "configs.html").read_text()
    assert all(name in configs for name in ("FindConfig", "SearchConfig", "num_attention_positions", "shortlist"))
    assert "docs/finding.md" not in re.sub(r"<code>.*?</code>", "", (tmp_path / "index.html").read_text())


def test_a_broken_link_fails(tmp_path):
    for name in ("mkdocs.yml", "README.md", "benchmarks/README.md", "cluster/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    page = tmp_path / "docs" / "python.md"
    page.write_text(page.read_text() + "\n[nothing](absent.md), [no such part](start.md#absent)\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 1 and "absent.md" in result.stderr and "#absent" in result.stderr
