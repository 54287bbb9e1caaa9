"""How this program is called, for the commands that it prints."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

NAME = "simmerge"


def program() -> str:
    """The name, or the path that it was called by where the shell would not find the name (`.venv/bin/simmerge`)."""
    called = Path(sys.argv[0])
    return str(called) if called.name == NAME and shutil.which(NAME) is None else NAME
