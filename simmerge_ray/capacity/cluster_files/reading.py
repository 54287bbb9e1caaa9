"""Reading a cluster file: which kinds there are, and what is none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import read_text
from simmerge_ray.base.yaml_text import YamlError, parse_yaml_documents

# Kinds, each by the keys that only it has.
LAUNCHER, SERVE, KUBERNETES = ("available_node_types",), ("applications",), ("apiVersion", "kind")


def read_documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file of the cluster launcher, of Serve or of Kubernetes. Raises ConfigError: it cannot be
    read, or holds something else."""
    try:
        documents = [document for document in parse_yaml_documents(read_text(path)) if document is not None]
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise ConfigError(f"{path} is no cluster file: it has no mapping")
    for content in documents:
        if not any(content.keys() >= set(keys) for keys in (LAUNCHER, SERVE, KUBERNETES)):
            raise ConfigError(
                f"{path} is no cluster file: it has no available_node_types (ray up), applications (serve deploy), "
                "or apiVersion and kind (Kubernetes)"
            )
    return documents
