"""What a replica tells of itself, at a cost that requests do not notice: metrics for Ray, lines in Serve's log file.

Counted and written for every request, the two took as long as the decisions themselves.
"""

from __future__ import annotations

import asyncio
import logging
from logging.handlers import MemoryHandler, RotatingFileHandler

from prometheus_client.samples import Sample
from ray.util.metrics import Counter, Gauge

from simmerge_ray.service.log.fold import View
from simmerge_ray.service.metrics import PrometheusMetrics

_TOGETHER_S = 0.2
_MAX_TOGETHER = 256  # lines


class ServeMetrics(PrometheusMetrics):
    """Ray exports these of all replicas at its metrics ports, as they were at the last `state`; `/metrics` shows those
    of the replica that answers. The buckets of a histogram are counters with the label `le`."""

    def __init__(self) -> None:
        super().__init__()
        self._exported: dict[str, Counter | Gauge] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}

    def state(self, view: View, entropies: dict[str, float]) -> None:
        super().state(view, entropies)
        for family in self.families():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    self._export(sample, family.documentation, is_gauge=family.type == "gauge")

    def _export(self, sample: Sample, about: str, is_gauge: bool) -> None:
        if (metric := self._exported.get(sample.name)) is None:
            kind, tags = Gauge if is_gauge else Counter, tuple(sample.labels)
            metric = self._exported[sample.name] = kind(sample.name, about, tag_keys=tags)
        if isinstance(metric, Gauge):
            metric.set(sample.value, tags=sample.labels)
            return
        key = (sample.name, tuple(sample.labels.values()))
        if (more := sample.value - self._told.get(key, 0.0)) > 0:
            metric.inc(more, tags=sample.labels)
            self._told[key] = sample.value


class LinesTogether(MemoryHandler):
    """Lines of a fifth of a second in one write to a log file, a warning at once."""

    target: RotatingFileHandler

    def __init__(self, file: RotatingFileHandler) -> None:
        super().__init__(_MAX_TOGETHER, flushLevel=logging.WARNING, target=file)

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if len(self.buffer) == 1:
            try:
                asyncio.get_running_loop().call_later(_TOGETHER_S, self.flush)
            except RuntimeError:  # of another thread than the event loop's
                self.flush()

    def flush(self) -> None:
        assert self.lock is not None and self.target.lock is not None
        with self.lock, self.target.lock:
            lines, self.buffer[:] = list(self.buffer), []
            if not lines:
                return
            try:
                if self.target.shouldRollover(lines[0]):
                    self.target.doRollover()
                assert self.target.stream is not None
                self.target.stream.write("".join(self.target.format(one) + self.target.terminator for one in lines))
                self.target.flush()
            except Exception:  # as every handler: what is told of a request must not fail it
                self.handleError(lines[0])


def log_beside_serve() -> None:
    """The service's lines, one for each request that changes something, go to the replica's log file of Serve, and
    there alone: from Serve's own logger they would go to the worker's stderr as well."""
    own, serves = logging.getLogger("simmerge.service"), logging.getLogger("ray.serve")
    own.level, own.parent = logging.INFO, serves
    for handler in serves.handlers:
        if isinstance(handler, MemoryHandler) and isinstance(handler.target, RotatingFileHandler):
            together = LinesTogether(handler.target)
            together.filters = list(handler.filters)  # they know the request
            own.handlers, own.propagate = [together], False
