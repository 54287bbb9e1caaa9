"""What a job reported."""

from __future__ import annotations

import json
from typing import Any

from simmerge_ray.pipelines.jobs import LAST_LINE


def read_last_line(output: str) -> dict[str, Any]:
    """The JSON of a job's last line; Ray's own lines may follow it."""
    lines = [line for line in output.splitlines() if line.startswith(f"{LAST_LINE} ")]
    assert lines, f"no line starts with {LAST_LINE!r}: the job was killed, or has not ended\n{output}"
    return dict(json.loads(lines[-1].removeprefix(LAST_LINE)))
