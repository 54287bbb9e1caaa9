"""What a search will take, estimated before it starts: trials, engines, memory, hours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.progress import duration
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.checkpoints.size import COMPUTE_BYTES, num_elements
from simmerge_ray.search.labels import LabelStore, Measured
from simmerge_ray.search.setup import PreparedSearch

# Measured on CPU with vLLM 0.32 (benchmarks/README.md): what an engine's process holds besides weights. Its libraries
# and compiled loops, and the key-value cache that the engine is given.
PROCESS_BYTES = {"vllm": 1_300_000_000, "transformers": 700_000_000}
_CACHE_BYTES = {"vllm": 1 << 30, "transformers": 0}
_START_SECONDS = {"vllm": 30.0, "transformers": 12.0}


@dataclass(frozen=True)
class SearchEstimate:
    """trials: to be run. engines: at the same time. engine_bytes: of each, all its ranks together.

    seconds: of the whole search, from what stored labels of the same settings took; None where there are none.
    """

    trials: int
    labels: int
    engines: int
    engine_bytes: int
    seconds: float | None

    def lines(self) -> list[str]:
        """For people."""
        hours = "unknown until the first labels are there (run with --max-trials 20 to learn it)"
        if self.seconds is not None:
            hours = f"about {duration(self.seconds)}, from what the labels in the store took"
        return [
            f"trials   {self.trials} to run, {self.labels} labels in the store",
            f"engines  {self.engines} at the same time, {self.engine_bytes / 1e9:.1f} GB each, "
            f"{self.engines * self.engine_bytes / 1e9:.1f} GB together",
            f"time     {hours if self.trials else 'nothing to do'}",
        ]


def engine_bytes(template: CheckpointRef, evaluator: str, dtype: str) -> int:
    """Memory of one engine: its process, key-value cache, and the weights twice (a swap holds a merged tensor, and the
    CPU engine its packed matrices beside what they were packed from while it loads)."""
    return engine_bytes_of(num_elements(read_headers(template)), evaluator, dtype)


def engine_bytes_of(num_parameters: float, evaluator: str, dtype: str) -> int:
    """The same for so many parameters."""
    return int(PROCESS_BYTES[evaluator] + _CACHE_BYTES[evaluator] + 2 * num_parameters * COMPUTE_BYTES[dtype])


def estimate_search(search: PreparedSearch, num_trials: int, engines: int) -> SearchEstimate:
    """The estimate for a search that is about to start."""
    labels = [label for label in LabelStore(search.labels_uri).read() if label.settings == search.settings]
    taken: dict[str, float] = {}
    for label in labels:
        if isinstance(label.outcome, Measured) and label.same_as is None:
            taken[label.plan.id] = taken.get(label.plan.id, 0.0) + label.seconds
    engines = max(1, min(engines, num_trials))
    seconds = None
    if taken and num_trials:
        # The mean without the slowest tenth: the first trial of an engine compiles its loops.
        typical = float(np.sort(list(taken.values()))[: math.ceil(0.9 * len(taken))].mean())
        seconds = _START_SECONDS[search.settings.evaluator] + typical * num_trials / engines
    size = engine_bytes(search.template, search.settings.evaluator, search.settings.dtype)
    return SearchEstimate(num_trials, len(labels), engines, size, seconds)
