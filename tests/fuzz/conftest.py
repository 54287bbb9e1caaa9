from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.live import LiveService, live_service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    with live_service(tmp_path_factory.mktemp("live")) as one:
        yield one
