"""`uv pip install` with pip's settings: `python requirements/uv_install.py REQUIREMENT ...`, into this environment.

uv reads none of pip's files and variables, so indexes, links and constraints are handed over. What uv cannot be told
(a client certificate, a password in a keyring) makes it fail, and install.sh lets pip do it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

# pip's setting: uv's option, given once for each word of the value.
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
    "constraint": "--constraints",
}
VARIABLES = {"cert": "SSL_CERT_FILE", "default-timeout": "UV_HTTP_TIMEOUT", "timeout": "UV_HTTP_TIMEOUT"}
STRENGTH = {"global": 0, "install": 1, ":env:": 2}


def pip_settings(listing: str) -> dict[str, str]:
    """Settings of `pip install` from the lines `SECTION.KEY='VALUE'` of `pip config list`.

    A section of another command does not count; variables (`:env:`) go before `install`, and that before `global`.
    """
    found: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in STRENGTH and (key not in found or found[key][0] <= STRENGTH[section]):
            found[key] = STRENGTH[section], str(ast.literal_eval(value))
    return {key: value for key, (_, value) in found.items()}


def uv_options(settings: dict[str, str]) -> list[str]:
    """The same for uv. It takes a package from the first index that has it; pip, and so this, the best of all."""
    options = ["--index-strategy", "unsafe-best-match"]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    return options + [
        word for key, option in OPTIONS.items() for value in settings.get(key, "").split() for word in (option, value)
    ]


def main() -> int:
    listing = [sys.executable, "-m", "pip", "config", "list"]
    settings = pip_settings(subprocess.run(listing, check=True, capture_output=True, text=True).stdout)
    named = {variable: settings[key] for key, variable in VARIABLES.items() if key in settings}
    uv = [Path(sys.executable).with_name("uv"), "pip", "install", "--python", sys.executable, "--no-deps"]
    return subprocess.run([*uv, *uv_options(settings), *sys.argv[1:]], env={**named, **os.environ}).returncode


if __name__ == "__main__":
    sys.exit(main())
