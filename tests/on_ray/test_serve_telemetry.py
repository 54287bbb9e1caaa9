"""What a replica tells of itself: what Ray exports, and its lines in a log file."""

from __future__ import annotations

import asyncio
import logging
from logging.handlers import MemoryHandler, RotatingFileHandler
from types import SimpleNamespace
from typing import Any

import pytest

from simmerge_ray.on_ray.serve_telemetry import LinesTogether, ServeMetrics, log_beside_serve
from tests.on_ray.ray_metrics import exported

VIEW: Any = SimpleNamespace(num_open=1, seq=2)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_exports_what_the_registry_has_each_time_that_the_state_is_told():
    metrics = ServeMetrics()
    for seconds in (0.003, 0.004, 30.0):
        metrics.requested("/v1/told", "POST", 201, seconds)
    metrics.rewarded("told")
    metrics.state(VIEW, {"told": 1.5})
    metrics.requested("/v1/told", "POST", 201, 0.004)
    metrics.state(VIEW, {"told": 2.5})
    route, buckets = 'route="/v1/told"', "ray_simmerge_request_seconds_bucket_total"
    assert exported("ray_simmerge_request_seconds_count_total", route, least=4) == 4
    assert exported("ray_simmerge_request_seconds_sum_total", route, least=30) == pytest.approx(30.011)
    assert exported("ray_simmerge_rewards_total", 'outcome="told"', least=1) == 1
    assert exported("ray_simmerge_posterior_entropy_nats", 'arm="told"', least=2.5) == 2.5
    for bound, number in (("0.005", 3), ("+Inf", 4)):
        assert exported(buckets, route, f'le="{bound}"', least=number) == number


def line(text: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("simmerge.service", level, __file__, 1, text, None, None)


def test_lines_of_a_moment_are_written_together_and_a_warning_at_once(tmp_path):
    file = RotatingFileHandler(tmp_path / "log")

    async def ask() -> None:
        together = LinesTogether(file)
        together.handle(line("one"))
        together.handle(line("two"))
        assert (tmp_path / "log").read_text() == ""
        together.handle(line("three", logging.WARNING))
        assert (tmp_path / "log").read_text() == "one\ntwo\nthree\n"
        together.handle(line("four"))
        await asyncio.sleep(0)
        while not (tmp_path / "log").read_text().endswith("four\n"):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(ask(), 60))
    LinesTogether(file).handle(line("of a thread without a loop"))
    assert (tmp_path / "log").read_text().endswith("of a thread without a loop\n")


def test_the_log_file_is_rolled_over_and_a_disk_that_is_full_fails_no_request(tmp_path, monkeypatch):
    file = RotatingFileHandler(tmp_path / "log", maxBytes=30, backupCount=1)
    together = LinesTogether(file)
    together.handle(line("a" * 25))
    together.handle(line("b" * 25))
    assert (tmp_path / "log.1").read_text() == "a" * 25 + "\n" and (tmp_path / "log").read_text() == "b" * 25 + "\n"
    monkeypatch.setattr(logging, "raiseExceptions", False)
    file.stream.close()
    together.handle(line("c"))
    assert together.buffer == []


def test_the_services_lines_go_to_the_file_of_serve_alone_with_serves_filters(tmp_path, monkeypatch):
    own, serves = logging.getLogger("simmerge.service"), logging.getLogger("ray.serve")
    for logger in (own, serves):
        monkeypatch.setattr(logger, "handlers", [])
    for name in ("parent", "level", "propagate"):
        monkeypatch.setattr(own, name, getattr(own, name))
    printed = MemoryHandler(100)
    serves.addHandler(printed)
    log_beside_serve()  # without a file of Serve: to wherever Serve's own lines go
    own.info("first")
    assert [record.msg for record in printed.buffer] == ["first"]
    to_file = MemoryHandler(1, target=RotatingFileHandler(tmp_path / "log"))
    to_file.addFilter(lambda record: record.msg != "hidden")
    serves.addHandler(to_file)
    log_beside_serve()
    for text in ("second", "hidden"):
        own.info(text)
    assert (tmp_path / "log").read_text() == "second\n" and len(printed.buffer) == 1
