"""A label store on disk and one in memory."""

from __future__ import annotations

import pytest

from simmerge_ray.search.labels import LabelStore


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return LabelStore(tmp_path / "labels" if request.param == "local" else f"memory://labels-{tmp_path.name}")
