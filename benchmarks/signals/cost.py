"""What signals cost in the number of checkpoints: ours, pair by pair, and the floor, in one run.

`python -m benchmarks.signals.cost FIXTURES [--sizes 2,4,8,16] [--threads 2] [--json FILE]`, where FIXTURES is the
directory of `benchmarks.merge.fixtures`. SmolLM2-135M is the base; its noisy copies are made under FIXTURES/copies when
they are not there (0.27 GB each). The probes are the general set of the package.

- ours: `compute_signals` with exact weights into an empty store, in this process, everything included: digests,
  loading, the base's forward pass and its continuation, writing the signatures, all pairs.
- floor: a bare forward pass of every checkpoint over the probes (its own attention kernel, all logits, the model
  already loaded) and one bare read of the files. `checkpoints` counts the base, which is run like the others.
- pair by pair: `benchmarks.signals.pair_by_pair` on a few seeded pairs, times the number of pairs.
- adding one: `compute_signals` with `sampled` weights on M + 1 checkpoints, when M are in the store.
- memory: ours at the largest size in a fresh process, the largest RssAnon above what it was after the imports, against
  the stated bound of a worker and of the driver, which are one process here.

The order of the sides alternates; a figure is a median where a side runs more than once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measuring import PeakMemory, machine, markdown, script_parser, seconds_of
from benchmarks.merge.fixtures import make_fixture, noisy_copy

NOISE = 0.02


def copies(root: Path, count: int) -> tuple[Path, list[Path]]:
    """The base and `count` noisy copies of it, made when they are not there."""
    base = make_fixture(root, "134m")["base"]
    found = []
    for number in range(count):
        target = root / "copies" / f"m{number}"
        if not target.exists():
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            noisy_copy(base, partial, NOISE * (1 + number % 4), 100 + number)
            partial.rename(target)
        found.append(target)
    return base, found


def catalogue_of(base: Path, checkpoints: list[Path]) -> Any:
    from simmerge_ray.checkpoints.catalogue import Catalogue
    from simmerge_ray.checkpoints.references import CheckpointRef

    refs = tuple(CheckpointRef(path.name, path, "base") for path in checkpoints)
    return Catalogue(refs, dict.fromkeys(ref.id for ref in refs), CheckpointRef("base", base))


def read_all(paths: list[Path]) -> None:
    buffer = bytearray(8 << 20)
    for path in paths:
        for file in sorted(path.glob("*.safetensors")):
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


def one_size(
    base: Path, checkpoints: list[Path], probes: Any, spec: Any, num_batches: int, with_one_more: bool
) -> dict[str, Any]:
    """Ours on all but the last of the checkpoints, and, if asked, the last one added."""
    from simmerge_ray.signals.bounds import bounds
    from simmerge_ray.signals.compute import compute_signals
    from simmerge_ray.signals.signature import SignatureStore

    size = len(checkpoints) - 1
    catalogue = catalogue_of(base, checkpoints[:size])
    row: dict[str, Any] = {"size": size, "read_s": seconds_of(partial(read_all, [base, *checkpoints[:size]]))}
    with tempfile.TemporaryDirectory(prefix="simmerge-cost-") as scratch:
        os.environ["HOME"] = f"{scratch}/home"  # where digests are remembered: none is known yet
        store = SignatureStore(f"{scratch}/signatures")
        row["ours_s"] = seconds_of(partial(compute_signals, catalogue, probes, spec, store=store))
        row["disk_bytes"] = sum(file.stat().st_size for file in Path(store.uri).iterdir())
        bound = bounds(catalogue, spec, [num_batches], None)
        row["stated_bytes"] = bound.worker + bound.driver
        row["stated_disk_bytes"] = bound.signature * bound.num_checkpoints
        if with_one_more:
            compute_signals(catalogue, probes, spec, "sampled", store)
            more = catalogue_of(base, checkpoints)
            row["adding_one_s"] = seconds_of(partial(compute_signals, more, probes, spec, "sampled", store))
            row["own_read_s"] = seconds_of(partial(read_all, checkpoints[size:]))
    return row


def peak_of(root: Path, size: int) -> int:
    """Bytes that ours takes at most, above the imports; in this process, so it must be a fresh one."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from simmerge_ray.checkpoints.probes import GENERAL, general_probe_set
    from simmerge_ray.signals.compute import compute_signals
    from simmerge_ray.signals.signature import SignatureSpec, SignatureStore

    base, checkpoints = copies(root, size)
    with tempfile.TemporaryDirectory(prefix="simmerge-cost-") as scratch, PeakMemory() as memory:
        store = SignatureStore(scratch)
        compute_signals(catalogue_of(base, checkpoints), {GENERAL: general_probe_set()}, SignatureSpec(), store=store)
    return memory.above_start


def measure(root: Path, sizes: list[int], num_pairs: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.signals.pair_by_pair import pair_signals
    from simmerge_ray.checkpoints.headers import read_headers
    from simmerge_ray.checkpoints.probes import GENERAL, general_probe_set
    from simmerge_ray.checkpoints.references import CheckpointRef
    from simmerge_ray.signals.compute import compute_signals
    from simmerge_ray.signals.signature import SignatureSpec

    base, checkpoints = copies(root, max(sizes) + 1)
    probes = {GENERAL: general_probe_set()}
    spec = SignatureSpec()
    tokenizer = AutoTokenizer.from_pretrained(base)
    token_batches = probes[GENERAL].token_batches(tokenizer, spec.batch_size, spec.max_tokens)
    batches = [(batch.input_ids, batch.attention_mask) for batch in token_batches]
    results: dict[str, Any] = {
        "num_tokens": int(sum(mask.sum() for _, mask in batches)),
        "num_padded_tokens": sum(mask.numel() for _, mask in batches),
        "num_parameters": sum(one.end - one.begin for one in read_headers(CheckpointRef("base", base)).values()) // 2,
        "rows": [],
    }
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    @torch.no_grad()
    def forward() -> None:
        for ids, mask in batches:
            bare(input_ids=ids, attention_mask=mask, use_cache=False)

    compute_signals(catalogue_of(base, checkpoints[:2]), probes, spec)  # imports, compiled loops: not counted
    seconds_of(forward)
    pairs: list[float] = []
    forwards: list[float] = []
    for size in sizes:
        forwards.append(seconds_of(forward))
        row = one_size(base, checkpoints[: size + 1], probes, spec, len(batches), with_one_more=size == max(sizes))
        forwards.append(seconds_of(forward))
        for number in range(num_pairs):
            left, right = checkpoints[number % size], checkpoints[(number + 1) % size]
            pairs.append(seconds_of(partial(pair_signals, left, right, base, batches)))
        results["rows"].append(row)
        print(json.dumps(row | {"pair_s": pairs[-1], "forward_s": forwards[-1]}), file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.signals.cost", str(root), "--peak-of", str(max(sizes))]
    command += ["--threads", str(torch.get_num_threads())]
    results["rows"][-1]["peak_bytes"] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    forward_s, pair_s = statistics.median(forwards), statistics.median(pairs)
    results |= {"forward_s": forward_s, "pair_s": pair_s, "forwards": forwards, "pairs": pairs}
    for row in results["rows"]:
        size = row["size"]
        row["floor_s"] = forward_s * (size + 1) + row["read_s"]
        row["ours_over_floor"] = row["ours_s"] / row["floor_s"]
        row["pair_by_pair_s"] = pair_s * size * (size - 1) / 2
        row["times_faster"] = row["pair_by_pair_s"] / row["ours_s"]
        if "adding_one_s" in row:
            row["adding_over_own"] = row["adding_one_s"] / (forward_s + row["own_read_s"])
    return results


def lines(results: dict[str, Any]) -> list[str]:
    header = ["M", "ours s", "s / M", "floor s", "ours / floor", "by pairs s", "times faster", "disk MB (stated)"]
    rows = [
        [
            row["size"], f"{row['ours_s']:.1f}", f"{row['ours_s'] / row['size']:.2f}", f"{row['floor_s']:.1f}",
            f"{row['ours_over_floor']:.2f}", f"{row['pair_by_pair_s']:.0f}", f"{row['times_faster']:.1f}",
            f"{row['disk_bytes'] / 1e6:.0f} ({row['stated_disk_bytes'] / 1e6:.0f})",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    shown = [
        f"{results['num_parameters'] / 1e6:.0f} M parameters, {results['num_tokens']} tokens of probes "
        f"({results['num_padded_tokens']} with padding); bare forward pass {results['forward_s']:.1f} s, "
        f"one pair by hand {results['pair_s']:.1f} s",
        "",
        markdown(header, rows),
    ]
    last = results["rows"][-1]
    if "adding_over_own" in last:
        shown += [
            "",
            f"Adding one to {last['size']}: {last['adding_one_s']:.1f} s, {last['adding_over_own']:.2f} x its own "
            "forward pass and read.",
            f"Memory at {last['size']}: at most {last['peak_bytes'] / 1e6:.0f} MB above the imports, stated are "
            f"{last['stated_bytes'] / 1e6:.0f} MB.",
        ]
    return shown


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("--sizes", default="2,4,8,16")
    parser.add_argument("--pairs", type=int, default=2, help="pairs measured by hand at each size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print(peak_of(arguments.fixtures, arguments.peak_of))
        return
    results = measure(arguments.fixtures, [int(size) for size in arguments.sizes.split(",")], arguments.pairs)
    results |= {"machine": machine(), "threads": arguments.threads}
    print("\n".join(lines(results)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
