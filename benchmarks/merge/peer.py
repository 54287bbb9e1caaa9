"""Every case of `tests/peer` by mergekit 0.1.5 as well: who makes it, and how far the weights are apart.

`python -m benchmarks.merge.peer DIR [--venv VENV] [--cases PART]` makes the tiny checkpoints of all families in DIR,
our merges and, in one process of its interpreter, mergekit's, and prints a Markdown table. Outputs are compared as
transformers loads them, since names in the files may differ. The largest difference is relative to the largest
magnitude of its tensor; `equal` is to the bit. It ends with 1 where a case is not what `tests/peer/cases.py` says of
it: made by both within the tolerance, or else with its reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import markdown, pinned_environment, script_parser
from benchmarks.merge.mergekit_env import DEFAULT_DIRECTORY, mergekit_python
from simmerge_ray.base.errors import InputError
from simmerge_ray.merging.request import read_request
from simmerge_ray.merging.write.output import WriteOptions
from tests.peer.cases import CASES, Case
from tests.peer.checkpoints import make_family
from tests.peer.families import auto_class

# Relative to a tensor's largest magnitude: an ulp of the output dtype, and float32 sums in another order.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}

# Standard library and mergekit only: it runs in the peer's interpreter.
PEER = r"""
import json, os, shutil, sys
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)


def absolute(value, directory):
    # It remembers checkpoints by their names.
    if isinstance(value, list):
        return [absolute(one, directory) for one in value]
    if not isinstance(value, dict):
        return value
    paths = {k: os.path.join(directory, v) for k, v in value.items()
             if k in ("model", "base_model", "path") and isinstance(v, str)}
    return {k: paths.get(k) or absolute(v, directory) for k, v in value.items()}


for line in sys.stdin:
    job = json.loads(line)
    directory = job["directory"]
    said = ""
    try:
        made = []
        for document in yaml.safe_load_all(job["text"]):
            name = document.pop("name", None)
            out = os.path.join(directory, name) if name else job["out"]
            made += [out] if name else []
            run_merge(MergeConfiguration.model_validate(absolute(document, directory)), out, options)
        for out in made:
            shutil.rmtree(out)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:300] or "failed"
    print(json.dumps(said), file=answers)
"""


def make_ours(case: Case, file: Path, out: Path) -> str:
    """Our merge; what was said where it was refused."""
    try:
        read_request(file, out).write(WriteOptions(num_threads=1))
    except InputError as error:
        return " ".join(str(error).split())
    return ""


def loaded(path: Path, like: Path) -> dict[str, torch.Tensor]:
    """The state dict that transformers makes of a checkpoint. Raises ValueError: tensors are missing or left over."""
    model, info = auto_class(like).from_pretrained(path, output_loading_info=True, dtype="auto")
    wrong = [name for kind in ("missing_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        raise ValueError(f"transformers misses {len(wrong)} tensors, {sorted(map(str, wrong))[0]} among them")
    return dict(model.state_dict())


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """(largest difference relative to the largest magnitude of its tensor, dtype). Raises ValueError: other names."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one has {sorted(ours.keys() ^ theirs.keys())[0]}")
    worst = 0.0
    for name, one in ours.items():
        other = theirs[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            raise ValueError(f"{name}: {tuple(one.shape)} {one.dtype}, {tuple(other.shape)} {other.dtype}")
        largest = float(one.double().abs().max()) if one.numel() else 0.0
        worst = max(worst, float((one.double() - other.double()).abs().max()) / (largest or 1.0))
    return worst, str(next(iter(ours.values())).dtype).removeprefix("torch.")


def compared(case: Case, ours: str, theirs: str, outs: tuple[Path, Path]) -> tuple[list[str], bool]:
    """Cells of the table, and whether the case is as it should be."""
    cells = [
        "refused" if ours else "warned, made" if case.expect == "warned" else "made",
        "fails" if theirs else "made",
    ]
    as_said = bool(ours) == (case.expect == "refused")
    if ours or theirs:
        reason = case.why or (theirs if theirs and not ours else ours)
        peer_as_said = case.expect == "refused" or bool(theirs) == (case.peer == "fails")
        return [*cells, "-", reason.replace("|", "/")[:160]], as_said and peer_as_said
    try:
        mine = loaded(outs[0], outs[0])
        apart, dtype = difference(mine, loaded(outs[1], outs[0]))
    except (ValueError, OSError, RuntimeError) as error:
        return [*cells, "-", case.why or " ".join(str(error).split())[:160]], as_said and case.peer == "fails"
    shown = "equal" if apart == 0 else f"{apart:.1e}"
    is_equal = apart <= TOLERANCE[dtype]
    return [*cells, shown, case.why], as_said and is_equal == (case.peer == "equal")


def peer_says(python: Path, jobs: list[dict[str, Any]]) -> list[str]:
    """What mergekit said of each job: nothing where it made the merge."""
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run(
        [python, "-P", "-c", PEER], input=lines, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=pinned_environment() | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    if len(said) != len(jobs):
        raise SystemExit(f"mergekit ended with {done.returncode} at case {len(said)}: {jobs[len(said)]['text']}")
    return said


def arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--venv", type=Path, default=DEFAULT_DIRECTORY, help="mergekit's environment")
    parser.add_argument("--cases", default="", help="a part of the names of the cases to run; default all")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    root = given.directory.absolute()
    shutil.rmtree(root / "out", ignore_errors=True)
    cases = [case for case in CASES if given.cases in case.name]
    jobs, ours = [], []
    for number, case in enumerate(cases):
        path, out = make_family(root, case.family), root / "out" / str(number)
        (path / "case.yaml").write_text(case.text)
        ours.append(make_ours(case, path / "case.yaml", out / "ours"))
        jobs.append({"directory": str(path), "text": case.text, "out": str(out / "mergekit")})
    theirs = peer_says(mergekit_python(given.venv.absolute()), jobs)
    rows, counts, failures = [], Counter[str](), []
    for number, (case, mine, other) in enumerate(zip(cases, ours, theirs, strict=True)):
        out = root / "out" / str(number)
        cells, is_right = compared(case, mine, other, (out / "ours", out / "mergekit"))
        rows.append([case.name, *cells, "" if is_right else "**not as said**"])
        counts[f"ours {cells[0]}, mergekit {cells[1]}"] += 1
        failures += [] if is_right else [case.name]
    print(markdown(("case", "ours", "mergekit", "largest difference", "why", ""), rows))
    print("\n".join(f"{count:4d} {what}" for what, count in sorted(counts.items())))
    if failures:
        print(f"not as tests/peer/cases.py says: {'; '.join(failures)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
