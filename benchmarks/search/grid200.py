"""A grid of about 200 trials on the demo zoo by `simmerge labels make`, and the same command again.

`python -m benchmarks.search.grid200 --run RUN --out DIR`: 47 of the 54 pairs of two tasks with the four default arms
and the 13 checkpoints as they are, 201 trials, all 400 items of each task (a merge has two tasks, a checkpoint all
four), as many engines as the machine has cores. Timed from outside, as commands: into an empty label store; again (its
manifest says that nothing has changed); again without the manifest, so that it looks for missing labels. The last two
must leave the files of the store as they are.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from benchmarks.measuring import markdown, seconds_of, write_result
from benchmarks.search.setting import make_private, parser_of

EXCLUDED = (
    *product(("math-lora", "code-lora"), ("rag-weak", "rag-lora")),
    *product(("math-lora", "code-lora", "math-weak"), ("multilingual-lora",)),
)


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    make_private()
    arguments.out.mkdir(parents=True, exist_ok=True)
    zoo = arguments.run / "zoo"
    with tempfile.TemporaryDirectory(prefix="simmerge-grid200-") as scratch:
        labels = Path(scratch, "labels")
        command = [sys.executable, "-m", "simmerge_ray", "labels", "make", zoo / "catalogue.yaml", "--out", labels]
        command += ["--tasks", zoo / "tasks", "--log", arguments.out / "grid200.log"]
        command += [f"--exclude={left},{right}" for left, right in EXCLUDED]
        seconds, written = [], set()
        for number in range(3):
            if number == 2:
                shutil.rmtree(labels / "_search")
            seconds.append(seconds_of(lambda: subprocess.run(command, check=True)))
            written.add(frozenset((path.name, path.stat().st_mtime_ns) for path in labels.glob("*.parquet")))
        if len(written) > 1:
            raise SystemExit("labels were written again")
        from simmerge_ray.search.labels import LabelStore

        found = LabelStore(labels).read()
        num_items = sum(len(label.outcome.items) for label in found)
        num_trials = len({label.plan.id for label in found})
    write_result(arguments.out / "grid200.json", {"seconds": seconds, "trials": num_trials, "items": num_items})
    names = (f"{num_trials} trials, {num_items} items", "the same command again", "again, without its manifest")
    asked = ("<= 360", "<= 30", "<= 30")
    print(markdown(("run", "s", "asked"), list(zip(names, seconds, asked, strict=True))))


if __name__ == "__main__":
    main()
