"""Ten deaths under load for each database; `benchmarks.service.soak` makes hundreds."""

from __future__ import annotations

import pytest

from benchmarks.service.soak import soak
from simmerge_ray.service.http.listening import free_port
from tests.unit.service.published import write_published


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_or_counted_twice_by_kill_9(empty_database, tmp_path):
    files = write_published(tmp_path / "published")
    result = soak(empty_database, files.selector, files.signals, tmp_path / "service", free_port(), kills=10, jobs=6)
    assert result["wrong"] == []
    assert result["kills"] == 10 and result["lost on the way"] > 0  # it died while it was asked
    assert min(result[kind] for kind in ("decisions", "reward", "reward_voided", "decision_closed")) > 0
