"""The search for the best merge: Optuna with ASHA against random search, by what they have evaluated.

`python -m benchmarks.search.curves --run RUN --out DIR [--seeds 5] [--samplers random,tpe] [--figures DIR]`
on the zoo of a finished demo run: recipes of two or three of its four strong checkpoints, three operators with their
parameters, three anchors of every weight over the depth (`cmaes`, which needs one arm and one set: ties of all four, of
which a weight of 0 leaves one out); the utility is the mean over the four tasks, 32 items each,
the same items for all.

Random search (`sampler: random, shards: 1`) evaluates 60 merges on all items. TPE and CMA-ES run with ASHA on 4 shards
(`run_search`, as `simmerge search`) until they have evaluated as many items, and are cut there. Each search
has one engine and is a process of its own, two at a time; its labels, in the order in which they were written, are the
curve: items evaluated so far (of merges, stopped ones too), and the best utility of a merge evaluated on all items.
Labels are kept under DIR, so a run that was interrupted goes on. Writes the curves as JSON and a figure.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import markdown, write_result
from benchmarks.search.setting import make_private, parser_of

MEMBERS = ("math-strong", "code-strong", "multilingual-strong", "rag-strong")
ARMS = ("linear", "task_arithmetic", "ties")
NUM_ITEMS, NUM_RANDOM, NUM_SHARDS = 32, 60, 4
NUM_STOPPED = 130  # merges of a search with ASHA; more than the items last for
NAMES = {"random": "random, all items", "tpe": "TPE + ASHA", "cmaes": "CMA-ES + ASHA"}
COLORS = {"random": "tab:gray", "tpe": "tab:blue", "cmaes": "tab:orange"}


def search(run: Path, labels: Path, sampler: str, seed: int) -> None:
    from simmerge_ray.base.config import SearchConfig
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.on_ray.merge_search import run_search
    from simmerge_ray.pipelines.dataset import load_search_tasks

    config = SearchConfig(
        arms=("ties",) if sampler == "cmaes" else ARMS,
        max_items=NUM_ITEMS,
        concurrency=1,
        budget=NUM_RANDOM if sampler == "random" else NUM_STOPPED,
        shards=1 if sampler == "random" else NUM_SHARDS,
        sampler=sampler,
        members=MEMBERS,
        ways=(4, 4) if sampler == "cmaes" else (2, 3),
        layer_groups=3,
        seed=seed,
    )
    # The same items for every seed: only proposals differ.
    tasks = load_search_tasks(run / "zoo" / "tasks", config.model_copy(update={"seed": 0}))
    run_search(load_catalogue(run / "zoo" / "catalogue.yaml"), tasks, config, labels)


def curve(labels: Path) -> list[tuple[int, float]]:
    """(items evaluated so far, best utility so far) after each merge, in the order of its labels."""
    import pyarrow.parquet as pq

    points: list[tuple[int, float]] = []
    num_items, best = 0, float("nan")
    for path in sorted(labels.glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns):
        rows = pq.ParquetFile(path).read().to_pylist()
        if not rows[0]["operators"]:
            continue  # an unmerged checkpoint
        num_items += sum(row["num_items"] for row in rows)
        if not any(row["stopped"] or row["infeasible"] for row in rows):
            best = float(np.nanmax([best, np.mean([row["utility"] for row in rows])]))
        points.append((num_items, best))
    return points


def best_at(points: list[tuple[int, float]], items: np.ndarray) -> np.ndarray:
    """Best utility after so many items; not a number before the first."""
    counts = np.array([count for count, _ in points])
    values = np.array([float("nan"), *(best for _, best in points)])
    return values[np.searchsorted(counts, items, side="right")]


def draw(path: Path, items: np.ndarray, found: dict[str, np.ndarray]) -> None:
    from simmerge_ray.reports.figures import new_figure, save_figure

    figure, axes = new_figure(6.4, 4.0)
    axis = axes[0, 0]
    for sampler, values in found.items():
        low, middle, high = np.percentile(values, (25, 50, 75), axis=0)  # nothing before all seeds have one
        axis.step(items, middle, where="post", color=COLORS[sampler], label=NAMES[sampler])
        axis.fill_between(items, low, high, step="post", color=COLORS[sampler], alpha=0.2, linewidth=0)
    axis.set_xlabel("items evaluated")
    axis.set_ylabel("best utility so far (mean of four tasks)")
    num_seeds = len(next(iter(found.values())))
    axis.set_title(f"Search for the best merge of the demo zoo\nmedian and quartiles of {num_seeds} seeds", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    save_figure(figure, path.parent, path.name)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samplers", default="random,tpe", help="cmaes is a third")
    parser.add_argument("--figures", type=Path, help="directory of search_curves.png; default: DIR")
    parser.add_argument("--one", nargs=2, metavar=("SAMPLER", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    make_private()
    root = arguments.out.resolve() / "curves"
    if arguments.one:
        sampler, seed = arguments.one
        search(arguments.run, root / f"{sampler}-{seed}", sampler, int(seed))
        return

    def one(of: tuple[str, int]) -> None:
        command = [sys.executable, "-m", "benchmarks.search.curves", "--run", str(arguments.run)]
        command += ["--out", str(arguments.out), "--one", of[0], str(of[1])]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode != 0:
            raise SystemExit(f"{of}: {ended.stdout[-1000:]}{ended.stderr[-3000:]}")

    samplers = arguments.samplers.split(",")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, [(sampler, seed) for seed in range(arguments.seeds) for sampler in samplers]))
    curves = {name: [curve(root / f"{name}-{seed}") for seed in range(arguments.seeds)] for name in samplers}
    num_full = NUM_ITEMS * len(MEMBERS)
    most = NUM_RANDOM * num_full
    items = np.arange(num_full, most + 1, num_full // NUM_SHARDS)
    found = {name: np.stack([best_at(points, items) for points in own]) for name, own in curves.items()}
    result: dict[str, Any] = {"items": items.tolist(), "curves": curves}
    rows = []
    for name, values in found.items():
        quartiles = np.percentile(values, (25, 50, 75), axis=0)
        result[name] = {"quartiles": np.where(np.isnan(quartiles), None, quartiles).tolist()}
        tried = [sum(count <= most for count, _ in points) for points in curves[name]]
        shown = []
        for share in (0.25, 0.5, 1.0):
            low, middle, high = quartiles[:, np.searchsorted(items, share * most)]
            shown.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        reached = min(points[-1][0] for points in curves[name])
        rows.append([NAMES[name], len(values), float(np.median(tried)), min(reached, most), *shown])
    write_result(arguments.out / "curves.json", result)
    draw((arguments.figures or arguments.out) / "search_curves.png", items, found)
    header = ("search", "seeds", "merges tried", "items", *(f"after {int(share * most)}" for share in (0.25, 0.5, 1)))
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
