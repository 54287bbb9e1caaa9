"""Model cards of checkpoints: the front matter of `README.md`, which hubs read."""

from __future__ import annotations

from typing import Any

from simmerge_ray.base.storage import read_text
from simmerge_ray.base.yaml_text import parse_yaml
from simmerge_ray.checkpoints.references import CheckpointRef


def card_matter(ref: CheckpointRef) -> dict[str, Any]:
    """The front matter of a checkpoint's own model card; empty without a card, or where it cannot be read."""
    try:
        text = read_text(ref.path / "README.md")
        matter = parse_yaml(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError):
        return {}
    return matter if isinstance(matter, dict) else {}
