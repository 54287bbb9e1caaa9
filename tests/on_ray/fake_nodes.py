"""Ray's node provider of fake nodes, with memory: loaded by the autoscaler's monitor as an external provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodeProvider(FakeMultiNodeProvider):
    """Starts nodes as processes of this machine. A node type may state its memory, as clouds do for it; the node itself
    has what Ray finds, since it does not take memory by the way that Ray's own provider names it.

    How many nodes there are is written into the file `record` of its configuration whenever one is made, a line each.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        known = {kind: amount for kind, amount in resources.items() if kind != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, known, labels)
        with Path(self.provider_config["record"]).open("a") as record:
            record.write(f"{len(self._nodes) - 1}\n")  # without the head
