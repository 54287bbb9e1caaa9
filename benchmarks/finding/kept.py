"""Results by key in append-only JSON lines: who is interrupted goes on, and parts that run at once share them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class OutOfTimeError(Exception):
    """A value is not there yet, and no new one may be computed any more."""


class Kept:
    """Values by key, of all `<kind>-*.jsonl` in a directory; new ones are appended to `<kind>-<writer>.jsonl`.

    Args:
        writer: name of the only process that appends to that file. until: `time.time()` after which nothing new is
            computed; None for ever.
    """

    def __init__(self, directory: Path, kind: str, writer: str, until: float | None = None) -> None:
        self._until = until
        directory.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, Any] = {}
        for file in sorted(directory.glob(f"{kind}-*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue  # cut off by a kill
                self._values[key] = value
        self._file = directory / f"{kind}-{writer}.jsonl"
        if self._file.exists() and not self._file.read_bytes().endswith(b"\n"):
            with self._file.open("a") as out:
                out.write("\n")

    def of(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of a key, computed and written down where it is not there yet.

        Raises:
            OutOfTimeError: it is not there, and time is over.
        """
        if key not in self._values:
            if self._until is not None and time.time() > self._until:
                raise OutOfTimeError(key)
            value = compute()
            with self._file.open("a") as out:
                out.write(json.dumps([key, value]) + "\n")
            self._values[key] = value
        return self._values[key]
