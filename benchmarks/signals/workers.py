"""The table of signals for 1, 2 and 3 workers, with workers killed in the middle, in stages, and after a dead driver.

`python -m benchmarks.signals.workers RUN`, where RUN is a finished demo run. Every table must have the same bits;
prints a Markdown table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from simmerge_ray.base.config import SignalsConfig
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.on_ray.resources import ray_session
from simmerge_ray.on_ray.signal_actors import compute_signals_on_ray
from simmerge_ray.signals.bounds import working_bytes
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.stages import model_bytes
from simmerge_ray.signals.table import SignalTable

CONFIG = {"num_positions": 512, "num_attention_positions": 128}


def worker_pids() -> list[int]:
    """Processes of the signal actors, children of this process's raylet or of anyone else's on the machine."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"ray::SignalWorker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def table_of(run: RunLayout, store: str, kills: int = 0, **config: Any) -> tuple[SignalTable, float]:
    """The table, and seconds; `kills` workers are killed, one after every sixth of the units."""
    killed = 0

    def report(done: int, total: int) -> None:
        nonlocal killed
        if killed < kills and done > (killed + 1) * total / 6 and (pids := worker_pids()):
            os.kill(pids[0], signal.SIGKILL)
            killed += 1

    started = time.monotonic()
    table = compute_signals_on_ray(
        load_catalogue(run.catalogue),
        load_probe_sets(run.probes),
        SignalsConfig(**(CONFIG | config)),
        report,
        SignatureStore(store),
    )
    assert killed == kills
    return table, time.monotonic() - started


def _die_in_the_middle(run: RunLayout, store: str) -> None:
    def report(done: int, total: int) -> None:
        if total > 100 and done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    compute_signals_on_ray(
        load_catalogue(run.catalogue),
        load_probe_sets(run.probes),
        SignalsConfig(**CONFIG),
        report,
        SignatureStore(store),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = RunLayout(parser.parse_args().run)
    rows = []
    ref, spec = load_catalogue(run.catalogue).checkpoints[0], SignatureSpec.of(SignalsConfig(**CONFIG))
    memory = (working_bytes(ref, spec) + 0.7 * model_bytes(read_headers(ref))) / 1e9
    with tempfile.TemporaryDirectory(prefix="simmerge-workers-") as scratch:
        driver = multiprocessing.get_context("spawn").Process(target=_die_in_the_middle, args=(run, f"{scratch}/dead"))
        driver.start()
        driver.join()
        left = len(list(Path(scratch, "dead").iterdir()))
        with ray_session(num_cpus=3):
            first, seconds = table_of(run, f"{scratch}/1", num_workers=1)
            rows.append(["1 worker", "the first", seconds])
            for name, kills, config, store in (
                ("2 workers", 0, {"num_workers": 2}, "2"),
                ("3 workers", 0, {"num_workers": 3}, "3"),
                ("3 workers, 4 of them killed", 4, {"num_workers": 3}, "killed"),
                (f"a driver killed half-way ({left} signatures left), run again", 0, {"num_workers": 2}, "dead"),
                (
                    "2 workers, checkpoints in stages of layers",
                    0,
                    {"num_workers": 2, "memory_per_worker": memory},
                    "staged",
                ),
            ):
                table, seconds = table_of(run, f"{scratch}/{store}", kills, **config)
                rows.append([name, "the same bits" if table == first else "OTHER BITS", seconds])
    print("| run | table | s |\n|---|---|---|")
    for name, result, seconds in rows:
        print(f"| {name} | {result} | {seconds:.1f} |")
    if any(result == "OTHER BITS" for _, result, _ in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
