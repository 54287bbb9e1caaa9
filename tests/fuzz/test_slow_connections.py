"""The campaign with ten thousand slow clients, with a few of them."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.fuzz.live import TOKENS


def test_others_are_answered_while_clients_never_finish(service):
    command = [sys.executable, "-m", "benchmarks.service.slow_connections", service.url, "--connections", "60"]
    command += ["--seconds", "6", "--calm", "0.5", "--path", "/v1/policy", "--token", TOKENS["admin"]]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["allowed"] == 60 and found["most_held"] > 0
    assert set(found["during"]["answers"]) == set(found["after"]["answers"]) == {"200"}
    for part in ("in_headers", "in_body"):  # all were given up by the service, none was refused
        assert found[part]["answered 408"] > 0 and set(found[part]) == {"opened", "closed", "answered 408"}, found[part]
    service.works()
