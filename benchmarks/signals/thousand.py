"""A catalogue of a thousand checkpoints of a 7 B shape: what grows with their number, and how.

    python -m benchmarks.signals.thousand [--sizes 125 250 500 1000] [--work /tmp/simmerge-thousand] [--out F.json]

Signatures are made up, and have the shape of a Llama of 7 B (32 layers of 4,096, 32 heads, 32,000 tokens, 291 tensors)
at 8 sampled positions, 2 with attention rows, and 1,000 coordinates a tensor: 10 MB each instead of 113 MB, so that a
thousand fit a disk (11 GB, deleted at the end). What adding costs grows with the bytes of a signature. The table of the
checkpoints before is made up, too, consistent with points in a space; the selector is the packaged one.

Rows, one process each, so that its peak of memory is its own (RssAnon: without the page cache, libraries included):

- *add*: the pairs of one more checkpoint with all others, from signatures, and its part of the table. Its own forward
  pass is not in it, nor digests, which are kept;
- *open*: read the table; one column of all pairs; the row of one pair;
- *rank pairs*, *rank 3-way*: `simmerge plan` on one task, packaged selector, all arms, shortlist by `second_order`;
- *heat maps*: all figures of `simmerge signals`;
- *page*, *window*: the dashboard's first page and a part of a heat map, in the process of the service;
- *tiny*: adding one to so many real, tiny checkpoints, all of it: catalogue, digests, forward pass, pairs, table;
- *beam*: what the beam of 3-way merges loses beside scoring all, at 60 checkpoints.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measuring import PeakMemory, markdown, pin_threads, pinned_environment, script_parser, write_result

pin_threads(1)

import numpy as np  # noqa: E402

TASK, VOCABULARY, LAYERS, HIDDEN, HEADS, WIDTH = "general", 32_000, 32, 4096, 32, 264
POSITIONS, GREEDY, ROWS, COORDINATES = 8, 2, 2, 1000
_BEAM_SIZE = 60


def tensor_sizes() -> dict[str, int]:
    """Elements by name, of Llama 7 B."""
    sizes = {"model.embed_tokens.weight": 32_000 * 4096, "model.norm.weight": 4096, "lm_head.weight": 32_000 * 4096}
    for layer in range(LAYERS):
        for name in ("q", "k", "v", "o"):
            sizes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = 4096 * 4096
        for name in ("gate", "up", "down"):
            sizes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = 4096 * 11008
        for name in ("input", "post_attention"):
            sizes[f"model.layers.{layer}.{name}_layernorm.weight"] = 4096
    return sizes


class Made:
    """Made-up signatures: those of the base, and small changes of them, slices of the same noise."""

    def __init__(self, work: Path) -> None:
        from simmerge_ray.signals.signature import SignatureStore

        self.store = SignatureStore(work / "signatures")
        generator = np.random.default_rng(0)
        self._noise = generator.standard_normal(1 << 23).astype(np.float32)
        count = POSITIONS + GREEDY
        self._logits = 2 * generator.standard_normal((count, VOCABULARY)).astype(np.float32)
        self._hidden = generator.standard_normal((LAYERS + 1, count, HIDDEN)).astype(np.float32)
        self._attention = generator.random((LAYERS, HEADS, ROWS, WIDTH)).astype(np.float32)
        self._weights = 0.02 * generator.standard_normal((len(tensor_sizes()), COORDINATES)).astype(np.float32)
        self._greedy = np.arange(count) >= POSITIONS
        self._thresholds = np.quantile(np.abs(self._noise[: 1 << 18]), [0.9, 0.8, 0.5]).astype(np.float32)

    def _some(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        start = (number * 104_729) % (len(self._noise) - size)
        return self._noise[start : start + size].reshape(shape)

    def write(self, number: int) -> None:
        """The signature of point `number`, 0 being the base."""
        if self.store.has("weights", key(number)):
            return
        from simmerge_ray.signals.signature import TensorSample

        share = 0.0 if number == 0 else 0.2 + 0.1 * (number % 7)
        attention = (self._attention + share * np.abs(self._some(number, self._attention.shape))).astype(np.float32)
        outputs = {
            "logits": self._logits + share * self._some(number, self._logits.shape),
            "hidden": self._hidden + share * self._some(number + 1, self._hidden.shape),
            "attention": attention / attention.sum(-1, keepdims=True),
            "greedy": self._greedy,
            "next_token": np.where(self._greedy, -1, np.arange(len(self._greedy)) % VOCABULARY).astype(np.int64),
            "probe": np.arange(len(self._greedy)).astype(np.int64),
            "attention_probe": np.arange(ROWS).astype(np.int64),
        }
        self.store.write("outputs", key(number), outputs, {})
        moved = 0.005 * share * self._some(number + 2, self._weights.shape)
        samples = {}
        for (name, size), base, change in zip(tensor_sizes().items(), self._weights, moved, strict=True):
            centre, delta, scale = base.astype(np.float64), change.astype(np.float64), size / COORDINATES
            sums = scale * np.array([centre @ centre, centre @ delta, delta @ delta])
            low = np.full(3, np.nan, np.float32) if number == 0 else 0.005 * share * self._thresholds
            samples[name] = TensorSample(size, base + change, sums, low.astype(np.float32))
        self.store.write_parts("weights", key(number), samples, {})


def key(number: int) -> str:
    return f"made-{number:05d}"


def names(size: int) -> list[str]:
    return ["base", *(f"c{number:04d}" for number in range(1, size + 1))]


def made_matrix(column: str, size: int) -> np.ndarray:
    """(size + 1, size + 1) values of a column, consistent with points."""
    from simmerge_ray.signals.features import column_signal

    signal = column_signal(column)
    generator = np.random.default_rng(sum(column.replace("_rl_", "_lr_").rsplit("_", 1)[0].encode()))
    points = generator.normal(size=(size + 1, 4)) / 10
    points[0] = 0.0
    squares = (points**2).sum(1)
    squared = np.maximum(squares[:, None] + squares[None] - 2 * points @ points.T, 0.0)
    if signal.family == "divergence":
        matrix = 2 * squared * (1.0 + points[:, :1])
        return matrix.T if "_rl_" in column else matrix
    if signal.family == "single":
        matrix = np.repeat(1.0 + squares[:, None], size + 1, axis=1)
        return matrix.T if column.endswith("_right") else matrix
    if signal.name == "weight_l2":
        return np.sqrt(squared)
    if signal.name == "task_vector_norm_ratio":
        norms = np.log(np.sqrt(squares) + 1e-6)
        return norms[:, None] - norms[None]
    return 1.0 - squared if "cosine" in column else 0.5 * np.exp(-squared)


def make_table(path: Path, size: int, step: int) -> float:
    """A table of `size` checkpoints at `path`: the first 100 as the first file, a part for each `step` others. Seconds
    of the last part."""
    from simmerge_ray.signals.features import feature_columns
    from simmerge_ray.signals.pair_blocks import MemoryBlock, PairColumns, block_pairs
    from simmerge_ray.signals.table import SignalTable
    from simmerge_ray.signals.table_files import append_block

    columns, points = feature_columns(True), names(size)
    lacking = set(columns) - set(feature_columns(True, base_pair=True))
    matrices = {column: made_matrix(column, size) for column in columns}
    for column in lacking:
        matrices[column][0] = matrices[column][:, 0] = np.nan
    stops = [min(101, size + 1), *range(101 + step, size + 1, step), size + 1]
    start, last = 0, 0.0
    for stop in dict.fromkeys(stops):
        left, right = block_pairs(start, stop)
        values = {TASK: np.stack([matrices[column][left, right] for column in columns])}
        block, some = MemoryBlock(start, stop, columns, values), points[start:stop]
        added = {
            "checkpoints": {one: f"digest-{one}" for one in some},
            "own_task": dict.fromkeys(some[start == 0 :], TASK),
        }
        began = time.perf_counter()
        if start == 0:
            told = {"base": "base", "weights": "exact", **added}
            SignalTable(columns, PairColumns(some, [TASK], columns, [block]), told).write(path)
        else:
            append_block(path, points, block, added)
        start, last = stop, time.perf_counter() - began
    return last


def table_path(work: Path, size: int) -> Path:
    return work / f"of-{size}" / "pairs.parquet"


def add(work: Path, size: int) -> dict[str, Any]:
    """The last of `size` checkpoints joins the others."""
    from simmerge_ray.signals.new_pairs import new_block
    from simmerge_ray.signals.table_files import append_block

    store = Made(work).store

    def of_weights(place: int) -> Any:
        return store.read_weights(key(place))

    def of_outputs(place: int, _: str) -> Any:
        return store.read_outputs(key(place))

    new_block(2, 3, [TASK], of_weights, of_outputs)  # imports and compiled loops
    one = names(size)[-1]
    began = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        block = new_block(size, size + 1, [TASK], of_weights, of_outputs)
        added = {"checkpoints": {one: f"digest-{one}"}, "own_task": {one: TASK}}
        middle = time.perf_counter()
        append_block(table_path(work, size - 1), names(size), block, added)
    seconds = {"seconds": time.perf_counter() - began[0], "cpu": time.process_time() - began[1]}
    return seconds | {"append": time.perf_counter() - middle, "peak": memory.peak}


def measured(call: Callable[[], Any]) -> dict[str, Any]:
    began = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        found = call()
    seconds = {"seconds": time.perf_counter() - began[0], "cpu": time.process_time() - began[1], "peak": memory.peak}
    return seconds | {name: value for name, value in (found or {}).items()}


def opened(work: Path, size: int) -> dict[str, Any]:
    from simmerge_ray.signals.table import read_signal_table

    def read() -> dict[str, float]:
        began = time.perf_counter()
        table = read_signal_table(table_path(work, size))
        read, began = time.perf_counter() - began, time.perf_counter()
        table.matrix("kl_lr_mean", TASK)
        column, began = time.perf_counter() - began, time.perf_counter()
        table.get("c0003", names(size)[-2], TASK)
        return {"read": read, "column": column, "pair": time.perf_counter() - began}

    return measured(read)


def rank(work: Path, size: int, ways: tuple[int, int]) -> dict[str, Any]:
    from simmerge_ray.base.config import RankingConfig
    from simmerge_ray.selector.models.model import read_selector
    from simmerge_ray.selector.planning.files import SHORTLIST, default_selector
    from simmerge_ray.selector.planning.request import RankingSources
    from simmerge_ray.signals.propagation.second_order import SecondOrder
    from simmerge_ray.signals.table import read_signal_table

    shortlist = read_selector(default_selector() / SHORTLIST)

    def run() -> dict[str, Any]:
        table = read_signal_table(table_path(work, size))
        ids, own = table.checkpoint_ids, dict.fromkeys(table.checkpoint_ids, TASK)
        sources = RankingSources(shortlist, shortlist, table, ids, own, partial(SecondOrder, table))
        request = sources.request(RankingConfig(tasks=(TASK,), ways=ways, propagator="second_order"))
        found, unlike = request.rank(10), len(request.unlike_pairs)
        return {"scored": found.num_scored, "width": found.width, "unlike": unlike, "arms": len(request.space.arms)}

    return measured(run)


def beam(work: Path, size: int) -> dict[str, Any]:
    """What a beam of as few prefixes as a thousand checkpoints have loses, where all 3-way plans can be scored."""
    from simmerge_ray.plans.operators.specs import parse_arms
    from simmerge_ray.selector.models.model import read_selector
    from simmerge_ray.selector.planning.files import SHORTLIST, default_selector
    from simmerge_ray.selector.planning.search import PlanSearch
    from simmerge_ray.selector.planning.space import PlanSpace
    from simmerge_ray.selector.planning.tasks import task_pool
    from simmerge_ray.signals.propagation.batch import SecondOrderBatch
    from simmerge_ray.signals.table import read_signal_table

    table = read_signal_table(table_path(work, size))
    space = PlanSpace(table.checkpoint_ids, parse_arms(("linear", "nuslerp", "ties")), (3, 3))
    pool = task_pool("mean", (TASK,), table.tasks, table.checkpoint_ids, {})
    search = PlanSearch(
        SecondOrderBatch(table), read_selector(default_selector() / SHORTLIST), space, pool, "last", 1.0
    )

    def run() -> dict[str, Any]:
        every = search.run(None, 500)
        told: dict[str, Any] = {"scored": every.num_scored, "spread": float(every.scores[0] - every.scores[-1])}
        for width in (1, 32, 256):
            found = search.run(width, 500)
            kept = {plan.id for plan in found.plans}
            top = sum(plan.id in kept for plan in every.plans[:100])
            told[f"width {width}"] = {"lost": float(every.scores[0] - found.scores[0]), "of the best 100": top}
        return told

    return measured(run)


def heat_maps(work: Path, size: int) -> dict[str, Any]:
    from simmerge_ray.reports.figures import write_heat_maps
    from simmerge_ray.signals.table import read_signal_table

    def write() -> None:
        write_heat_maps(read_signal_table(table_path(work, size)), work / f"of-{size}" / "figures")

    return measured(write)


def tiny_catalogue(work: Path, size: int) -> Any:
    """Real checkpoints of two layers; those that are not there are made."""
    import torch
    import yaml

    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from tests import tiny

    root, generator = work / "tiny", torch.Generator().manual_seed(0)
    if not root.exists():
        tiny.make_catalogue(root, num_checkpoints=1, tasks=("add",))
    model = tiny.make_model()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    entries = []
    for number in range(size):
        name = f"m{number}"
        if not (root / name).exists():
            generator.manual_seed(number)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(start[key] + 0.02 * torch.randn(parameter.shape, generator=generator))
            tiny.save(model, root / name)
        entries.append({"id": name, "path": name, "task": "add"})
    path = root / f"of-{size}.yaml"
    path.write_text(yaml.safe_dump({"base": {"id": "base", "path": "base"}, "checkpoints": entries}))
    return load_catalogue(path)


def add_tiny(work: Path, size: int) -> dict[str, Any]:
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.probes import load_probe_sets
    from simmerge_ray.signals.compute import signals_into
    from simmerge_ray.signals.signature import SignatureSpec, SignatureStore

    spec, store = SignatureSpec(num_positions=16, num_attention_positions=4), SignatureStore(work / "tiny" / "kept")
    before, _ = tiny_catalogue(work, size - 1), tiny_catalogue(work, size)
    probes = {"add": load_probe_sets(work / "tiny" / "probes")["add"]}
    out = work / "tiny" / "pairs.parquet"
    signals_into(out, before, probes, spec, "sampled", store)

    def run() -> dict[str, Any]:
        after = load_catalogue(work / "tiny" / f"of-{size}.yaml")
        table = signals_into(out, after, probes, spec, "sampled", store)
        return {"rows": len(table.rows)}

    return measured(run)


def page(work: Path, size: int) -> dict[str, Any]:
    """The service's start, its first page, and the first part of a heat map, in this process, without a socket."""
    from simmerge_ray.selector.planning.files import default_selector
    from tests.unit.service.asking import Service
    from tests.unit.service.published import PublishedFiles

    root = work / f"of-{size}" / "service"
    root.mkdir(parents=True, exist_ok=True)
    with PeakMemory() as memory:
        began = time.perf_counter()
        service = Service.on(PublishedFiles(default_selector(), table_path(work, size)), root)
        service.ask("GET", "/v1/policy")
        start, cpu = time.perf_counter() - began, time.process_time()
        asked: dict[str, Any] = {"started": start}
        signal = {"signal": "kl_lr_mean", "limit": 100}
        for name, path, params in (
            ("seconds", "/", {}), ("again", "/", {}), ("window", "/v1/signals", signal),
            ("window again", "/v1/signals", signal), ("catalogue", "/v1/catalogue", {}),
        ):  # fmt: skip
            began = time.perf_counter()
            answer = service.ask("GET", path, params=params)
            asked[name] = time.perf_counter() - began
            asked[f"{name} bytes"] = len(answer.content)
            if name == "seconds":
                asked["cpu"] = time.process_time() - cpu
            if answer.status_code != 200:
                raise SystemExit(answer.text)
        pair = {"left": "c0003", "right": names(size)[-2]}
        began = time.perf_counter()
        service.ask("POST", "/v1/rank", json=pair)
        asked["rank"] = time.perf_counter() - began
    return asked | {"peak": memory.peak}


ROWS_OF: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "add": add,
    "open": opened,
    "rank pairs": lambda work, size: rank(work, size, (2, 2)),
    "rank 3-way": lambda work, size: rank(work, size, (3, 3)),
    "beam": beam,
    "heat maps": heat_maps,
    "page": page,
    "tiny": add_tiny,
}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[125, 250, 500, 1000])
    parser.add_argument("--work", type=Path, default=Path("/tmp/simmerge-thousand"))
    parser.add_argument("--step", type=int, default=8, help="checkpoints of a part of the made-up table")
    parser.add_argument("--rows", nargs="+", default=list(ROWS_OF), choices=list(ROWS_OF))
    parser.add_argument("--keep", action="store_true", help="leave the work directory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", nargs=2, metavar=("ROW", "SIZE"), help="of one process; for the script itself")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(ROWS_OF[options.row[0]](options.work, int(options.row[1]))))
        return
    made, results = Made(options.work), []
    if "add" in options.rows:
        for number in range(max(options.sizes) + 1):
            made.write(number)
    sizes = {row: options.sizes for row in options.rows} | {"beam": [_BEAM_SIZE]}
    for size in sorted({size for row in options.rows for size in sizes[row]}):
        for of in {size, size - 1} if "add" in options.rows else {size}:
            if not table_path(options.work, of).exists():
                make_table(table_path(options.work, of), of, options.step)
        for row in (row for row in options.rows if size in sizes[row]):
            command = [sys.executable, "-m", "benchmarks.signals.thousand", "--work", str(options.work), "--row", row]
            run = subprocess.run(
                [*command, str(size)], env=pinned_environment(1), capture_output=True, text=True, check=False
            )
            if run.returncode:
                raise SystemExit(run.stderr)
            results.append({"row": row, "size": size} | json.loads(run.stdout.splitlines()[-1]))
            print(results[-1], flush=True)
        for of in (size, size - 1):
            shutil.rmtree(table_path(options.work, of).parent, ignore_errors=True)
    shown = [[one["row"], one["size"], one["seconds"], one["cpu"], one["peak"] / 1e9] for one in results]
    print(markdown(["row", "checkpoints", "seconds", "processor seconds", "peak GB"], shown))
    if options.out:
        write_result(options.out, {"rows": results})
    if not options.keep:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
