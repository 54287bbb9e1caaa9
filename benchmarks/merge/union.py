"""A merge of two vocabularies: time, CPU and memory of the whole command, ours and mergekit 0.1.5, and equality.

`python -m benchmarks.merge.union FIXTURES [--rounds 3] [--venv DIRECTORY]`: SmolLM2-135M (`base` of
`benchmarks.merge.fixtures`) and its noisy copy `b`, whose tokens get other ids (all of them, drawn from a seed) and
1,000 new ones with rows of their own. Linear, `tokenizer_source: union`. Peak memory is RssAnon of the process, sampled
every 5 ms. mergekit numbers new tokens anew in every process, so tensors are compared token by token.

`--kills 20` instead: the writing of that merge is killed (kill -9 of a process that was forked for it) at so many
random moments, and the same file is read and merged again; the bytes must be those of a merge in peace.
`python -m benchmarks.soak merge FILE` does the same to the whole command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.measuring import PeakMemory, alternate, markdown, on_cores, pinned_environment, script_parser
from benchmarks.merge.fixtures import make_fixture
from benchmarks.merge.mergekit_env import DEFAULT_DIRECTORY, mergekit_python
from benchmarks.merge.sides import OUR_PYTHON

EMBEDDING = "model.embed_tokens.weight"
NUM_NEW = 1000


def make_other(source: Path, target: Path) -> Path:
    """The checkpoint with its tokens numbered otherwise and `NUM_NEW` more, made when it is not there."""
    if (target / "model.safetensors").exists():
        return target
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    old = tensors[EMBEDDING]
    random = np.random.default_rng(7)
    order = random.permutation(len(old))  # token of id i gets id order[i]
    rows = torch.empty(len(old) + NUM_NEW, old.shape[1], dtype=old.dtype)
    rows[torch.from_numpy(order)] = old
    rows[len(old) :] = torch.from_numpy(random.normal(0, 0.1, (NUM_NEW, old.shape[1]))).to(old.dtype)
    tensors[EMBEDDING] = rows
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: int(order[number]) for token, number in vocabulary.items()}
    for one in content["added_tokens"]:
        one["id"] = int(order[one["id"]])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    content["added_tokens"] += [
        {"id": len(old) + number, "content": f"new word {number}", **flags} for number in range(NUM_NEW)
    ]
    (target / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": len(rows)}))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def run(command: list[str], out: Path, num_threads: int) -> dict[str, float]:
    """Seconds, CPU seconds and peak RssAnon of a command."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    with on_cores(num_threads):
        process = subprocess.Popen(
            [*command, str(out)],
            env=pinned_environment(num_threads),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    with PeakMemory(process.pid) as memory:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{command[0]} failed:\n{errors[-2000:]}")
    process.returncode = 0
    wall = time.perf_counter() - started
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": memory.peak}


def differences(ours: Path, theirs: Path) -> str:
    """How many elements differ, rows of the vocabulary compared token by token."""
    from transformers import AutoTokenizer

    first, other = (load_file(path / "model.safetensors") for path in (ours, theirs))
    ids = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (ours, theirs)]
    if first.keys() != other.keys() or ids[0].keys() != ids[1].keys():
        return f"other names: {first.keys() ^ other.keys()}, {len(ids[0].keys() ^ ids[1].keys())} tokens"
    tokens = sorted(ids[0])
    unequal = 0
    for name, tensor in first.items():
        peer = other[name]
        if name == EMBEDDING:
            tensor, peer = tensor[[ids[0][t] for t in tokens]], peer[[ids[1][t] for t in tokens]]
        unequal += int((tensor.view(torch.int16) != peer.view(torch.int16)).sum())
    return f"{unequal} of {sum(map(torch.numel, first.values())):,} elements differ; {len(tokens):,} tokens in both"


def kills(file: Path, root: Path, num_kills: int) -> str:
    """Kill and go on; how many merges have the bytes of a quiet one."""
    from simmerge_ray.merging.request import MergeRequest, read_request
    from simmerge_ray.merging.write.output import WriteOptions
    from simmerge_ray.merging.write.tensors import read_journals

    graph, options = read_request(file, root / "out").graph, WriteOptions(num_threads=1)

    def contents(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "simmerge_manifest.json"}

    for _ in range(2):  # the first compiles the loops
        shutil.rmtree(root / "whole", ignore_errors=True)
        started = time.perf_counter()
        MergeRequest(graph, root / "whole").write(options)
        seconds = time.perf_counter() - started
    same, resumed = 0, []
    for number, moment in enumerate(np.random.default_rng(0).uniform(0.02, seconds, num_kills)):
        out = root / f"killed-{number}"
        if not (child := os.fork()):
            try:
                MergeRequest(graph, out).write(options)
            finally:
                os._exit(0)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        partial = out.with_name(f".{out.name}.partial")
        resumed.append(len(read_journals(partial)) if partial.exists() else -1)
        again = read_request(file, out)  # the vocabulary is made anew, as by another process
        again.write(options)
        same += contents(out) == contents(root / "whole")
        shutil.rmtree(out)
    inside = sum(count >= 0 for count in resumed)
    return (
        f"{same} of {num_kills} have the same bytes; {inside} were killed while writing ({seconds:.2f} s), "
        f"{sum(count > 0 for count in resumed)} with tensors in the journal"
    )


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("--venv", type=Path, default=DEFAULT_DIRECTORY, help="mergekit's environment")
    parser.add_argument("--rounds", type=int, default=3, help="rounds counted, each after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0, help="kill the writing so many times instead")
    arguments = parser.parse_args()
    root, venv = arguments.fixtures.absolute(), arguments.venv.absolute()
    checkpoints = make_fixture(root, "134m", venv)
    other = make_other(checkpoints["b"], root / "134m" / "b-other-vocabulary")
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (checkpoints["base"], other)]
    config: dict[str, Any] = {"merge_method": "linear", "base_model": models[0]["model"], "models": models}
    with tempfile.TemporaryDirectory(prefix="union-", dir=root) as name:
        scratch = Path(name)
        file = scratch / "union.yml"
        file.write_text(json.dumps(config | {"tokenizer_source": "union"}))
        if arguments.kills:
            print(kills(file, scratch, arguments.kills))
            return
        commands = {
            "ours": [str(OUR_PYTHON.with_name("simmerge")), "merge", str(file)],
            "mergekit": [str(mergekit_python(venv).with_name("mergekit-yaml")), str(file)],
        }
        sides = {side: partial(run, command, scratch / side, arguments.threads) for side, command in commands.items()}
        found = alternate(sides, arguments.rounds)
        rows = [
            [
                side,
                *(f"{median(one[what] for one in rounds):.2f}" for what in ("wall_s", "cpu_s")),
                f"{max(one['peak_bytes'] for one in rounds) / 1e6:.0f}",
            ]
            for side, rounds in found.items()
        ]
        print(markdown(["side", "s", "CPU s", "peak MB"], rows))
        print(differences(scratch / "ours", scratch / "mergekit"))


if __name__ == "__main__":
    main()
