"""What a cluster exports for Prometheus."""

from __future__ import annotations

import time
import urllib.request


def exported(name: str, *labels: str, least: float) -> float:
    """The value of a metric that the cluster of the tests exports, over all series with labels (`outcome="measured"`);
    waits until it has been counted to `least`, since workers report every few seconds."""
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with urllib.request.urlopen(url) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name}{{")]
        value = sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in labels))
        if value >= least:
            return value
        time.sleep(0.5)
    raise AssertionError(f"{url} has {name} with {labels} at {value}, not {least}")
