"""Five parts of the service on Ray Serve killed under load, then all of it; `serve_soak` does it dozens of times."""

from __future__ import annotations

import pytest

from benchmarks.service.serve_soak import CONTROLLER, PROXIES, REPLICA, serve_soak, victims
from simmerge_ray.service.http.listening import free_port
from tests.on_ray.served import write_run


def test_kills_take_replicas_proxies_and_the_controller_in_turn():
    first = [victims(number) for number in range(9)]
    assert first[0] == (REPLICA, False) and first[3] == (REPLICA, True)
    assert [name for name, _ in first[1::3]] == list(PROXIES)
    assert {name for name, _ in first[2::3]} == {CONTROLLER}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)  # seven starts of something, each as long as the machine needs
def test_nothing_acknowledged_is_lost_or_counted_twice_by_kill_9_under_serve(tmp_path):
    run = write_run(tmp_path / "run")
    database = f"sqlite:///{tmp_path}/service.db"
    result = serve_soak(database, run, tmp_path / "service", free_port(), kills=5, clusters=1, jobs=4)
    assert result["wrong"] == []
    assert sum(result["killed"].values()) == 6 and result["killed"]["the cluster"] == 1
    assert result["lost on the way"] > 0  # it died while it was asked
    assert min(result["decisions"], result["reward"]) > 0
