"""The least that `simmerge serve` needs of a run, for tests that start it."""

from __future__ import annotations

from pathlib import Path

from simmerge_ray.base.runs import RunLayout
from tests.unit.service.published import write_published


def write_run(root: Path) -> Path:
    """A run directory with a selector, its warm start and the signal table (checkpoints `s1-c00`, ...)."""
    files = write_published(root)
    layout = RunLayout(root)
    assert files.selector == layout.selector
    layout.signals.parent.mkdir()
    files.signals.rename(layout.signals)
    return root
