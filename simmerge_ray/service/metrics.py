"""Metrics of the service for Prometheus. `ray.serve` has its own metrics; see `on_ray.serve_app`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from simmerge_ray.plans.keeping import KEEP
from simmerge_ray.service.log.fold import View
from simmerge_ray.service.schemas import Decision

LATENCY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class PrometheusMetrics:
    """What the learner tells of, and requests; in a registry of its own. It must not fail or wait."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self._decisions = Counter("simmerge_decisions", "Decisions made", ["arm", "explored", "kind"], registry=own)
        self._rewards = Counter("simmerge_rewards", "Rewards asked for", ["outcome"], registry=own)
        self._pending = Gauge("simmerge_decisions_pending", "Decisions without a reward", registry=own)
        self._seq = Gauge("simmerge_log_seq", "Number of the last event that was folded", registry=own)
        entropy = "simmerge_posterior_entropy_nats", "Of the posterior over an arm's weights"
        self._entropy = Gauge(*entropy, ["arm"], registry=own)
        seconds = "simmerge_request_seconds", "Time to answer", ["route", "method", "status"]
        self._seconds = Histogram(*seconds, buckets=LATENCY_BUCKETS_S, registry=own)

    def decided(self, decision: Decision) -> None:
        """One more decision. Plans are counted under their kind alone: there are too many of them."""
        arm = "plan" if decision.kind == "plan" else KEEP if decision.plan is not None else decision.arm
        self._decisions.labels(arm, str(decision.explored).lower(), decision.kind).inc()

    def rewarded(self, outcome: str) -> None:
        """One more request with a reward, by what became of it."""
        self._rewards.labels(outcome).inc()

    def state(self, view: View, entropies: dict[str, float]) -> None:
        """Gauges of the present state."""
        self._pending.set(view.num_open)
        self._seq.set(view.seq)
        for arm, entropy in entropies.items():
            self._entropy.labels(arm).set(entropy)

    def requested(self, route: str, method: str, status: int, seconds: float) -> None:
        """One more request, by the template of its path."""
        self._seconds.labels(route, method, str(status)).observe(seconds)

    def families(self) -> list[Metric]:
        """All metrics as they are now."""
        return list(self._registry.collect())

    def text(self) -> str:
        """In Prometheus' format."""
        return generate_latest(self._registry).decode()
