"""Seeds of random operators."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

from simmerge_ray.checkpoints.digests import checkpoint_digest
from simmerge_ray.merging.graph import MergeGraph, Node, reads


def seed_of(plan_seed: int, step: int, digests: Sequence[str], tensor: str) -> int:
    """A hash of (seed of the plan, step, digests of the input's checkpoints, tensor name)."""
    text = "\0".join([str(plan_seed), str(step), *digests, tensor])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Seeds:
    """`seed_of` every input of a graph.

    Inputs get independent masks, and the result does not depend on the order or machine on which tensors are merged.
    """

    def __init__(self, graph: MergeGraph) -> None:
        self._graph = graph
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()  # every byte of a checkpoint is read once, not by every thread

    def of(self, source: Node, step: int, tensor: str) -> int:
        digests = [self._digest(checkpoint) for checkpoint in sorted({read.checkpoint for read in reads(source)})]
        return seed_of(self._graph.seed, step, digests, tensor)

    def _digest(self, checkpoint: str) -> str:
        with self._lock:
            if checkpoint not in self._digests:
                self._digests[checkpoint] = checkpoint_digest(self._graph.checkpoints[checkpoint])
            return self._digests[checkpoint]
