"""How fast plans are scored, on made-up checkpoints of the demo's shape.

    python -m benchmarks.plans.speed [--out plans-speed.json] [--threads 2] [--arm 'ties(density=0.1)']

Tables are random, consistent with points in a space; signatures have the shapes of the demo's (logits 640 x 148, four
hidden states of 96, attention 3 x 3 x 128 x 35, 29 tensors of at most 10,000 coordinates) and random contents; the
selectors are the demo's networks (five, of 32 and 16 units) with random weights. Nothing but time depends on these.

Rows: three-way plans a second by `second_order` with the model call; all ordered three-way plans of 50 checkpoints with
3 arms, shortlist of 500 and `virtual`; a beam of eight-way plans of 100 checkpoints, likewise. CPU seconds are of all
threads, so that a busy machine can be told from a slow program. What `virtual` costs depends on the plans of the
shortlist: steps by TIES work on coordinates, those by linear and nuslerp on a few numbers; `--arm` leaves only some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import script_parser, timed, write_result
from simmerge_ray.base.config import RankingConfig
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.selector.planning.scorer import PlanScorer
from simmerge_ray.selector.planning.search import PlanSearch
from simmerge_ray.selector.planning.space import PlanSpace
from simmerge_ray.selector.planning.tasks import TaskPool, task_pool
from simmerge_ray.signals.propagation.batch import SecondOrderBatch
from simmerge_ray.signals.propagation.virtual import Virtual
from simmerge_ray.signals.signature import DENSITIES, TaskOutputs, TensorSample
from simmerge_ray.signals.table import SignalTable
from tests.tables import synthetic_table

ARMS = ("linear", "nuslerp", "ties(density=0.1)")
TASKS = ("code", "math", "multilingual", "rag")
SHAPES = {"embed_tokens": 14208, "lm_head": 14208} | {
    f"model.layers.{layer}.{name}": size
    for layer in range(3)
    for name, size in {
        "self_attn.q": 9216, "self_attn.k": 9216, "self_attn.v": 9216, "self_attn.o": 9216, "mlp.gate": 24576,
        "mlp.up": 24576, "mlp.down": 24576, "input_layernorm": 96, "post_attention_layernorm": 96,
    }.items()
}  # fmt: skip
MEMBERS, HIDDEN = 5, (32, 16)


@dataclass(frozen=True)
class Networks:
    """An ensemble as `simmerge train` makes it: layers (E, in, out) and heads, relu between them."""

    columns: tuple[str, ...]
    arms: tuple[str, ...]
    best_fixed: str
    layers: tuple[np.ndarray, ...]
    label_error: float = 0.0

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flat = features.reshape(-1, features.shape[-1])
        outputs = []
        for member in range(MEMBERS):
            z = flat
            for layer in self.layers[:-1]:
                z = np.maximum(z @ layer[member], 0.0)
            outputs.append((z @ self.layers[-1][member]).reshape(len(features), 2, -1).mean(1))
        stacked = 0.5 + 0.02 * np.stack(outputs)
        return stacked.mean(0), stacked.std(0)


def networks(columns: tuple[str, ...]) -> Networks:
    generator = np.random.default_rng(0)
    sizes = (len(columns), *HIDDEN, len(ARMS))
    layers = [generator.normal(size=(MEMBERS, a, b)) / a**0.5 for a, b in zip(sizes, sizes[1:], strict=False)]
    return Networks(columns, ARMS, ARMS[0], tuple(layers))


def virtual_of(table: SignalTable) -> Virtual:
    """From made-up signatures; weights are a base and small changes, outputs are random."""
    ids = ("base", *table.checkpoint_ids)
    generator = np.random.default_rng(1)
    base = {name: generator.normal(size=min(size, 10_000)).astype(np.float32) for name, size in SHAPES.items()}

    def sample(name: str, is_base: bool) -> TensorSample:
        change = 0.0 if is_base else 0.05 * generator.normal(size=base[name].shape)
        values = (base[name] + change).astype(np.float32)
        delta, scale = values.astype(np.float64) - base[name], SHAPES[name] / len(values)
        sums = scale * np.array([base[name] @ base[name].astype(np.float64), base[name] @ delta, delta @ delta])
        thresholds = np.quantile(np.abs(delta), 1.0 - np.array(DENSITIES)).astype(np.float32)
        return TensorSample(SHAPES[name], values, sums, thresholds)

    weights = {one: {name: sample(name, one == "base") for name in SHAPES} for one in ids}
    greedy, token = np.arange(640) >= 512, generator.integers(0, 148, 640)
    shared = (greedy, np.where(greedy, -1, token), np.arange(640) % 64, np.arange(128) % 64)
    kept: dict[tuple[str, str], TaskOutputs] = {}

    def outputs(checkpoint: str, task: str) -> TaskOutputs:
        if (checkpoint, task) not in kept:
            logits, hidden = generator.normal(size=(640, 148)), generator.normal(size=(4, 640, 96))
            attention = generator.dirichlet(np.ones(35), (3, 3, 128))
            arrays = [array.astype(np.float32) for array in (logits, hidden, attention)]
            kept[checkpoint, task] = TaskOutputs(*arrays, *shared)
        return kept[checkpoint, task]

    for one in ids:  # files in a store are there, too
        for task in table.tasks:
            outputs(one, task)
    return Virtual(table, ids, outputs, weights)


def pool_over(table: SignalTable, objective: str = "mean") -> TaskPool:
    return task_pool(objective, (), table.tasks, table.checkpoint_ids, table.provenance["own_task"])


def space_over(table: SignalTable, ways: tuple[int, int], arms: Sequence[str] = ARMS) -> PlanSpace:
    return PlanSpace(table.checkpoint_ids, parse_arms(arms), ways)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=int, default=500_000, help="of the beam search")
    parser.add_argument("--arm", action="append", choices=ARMS, help="only plans by these (all)")
    options = parser.parse_args()
    arms = tuple(options.arm or ARMS)
    rows: dict[str, dict[str, Any]] = {}
    table = synthetic_table(50, TASKS)
    batch = SecondOrderBatch(table)
    model, space = networks(batch.columns), space_over(table, (3, 3), arms)
    for name, objective in (("second_order, one task", "code"), ("second_order, members' own tasks", "mean")):
        search = PlanSearch(batch, model, space, pool_over(table, objective), "last", 1.0, options.threads)
        search.run(None, 500)  # matrices of the table are made once
        found, seconds = timed(lambda search=search: search.run(None, 500))
        rows[name] = seconds._asdict() | {
            "plans": found.num_scored,
            "plans_per_second": found.num_scored / seconds.wall,
        }
        print(name, rows[name], flush=True)
    for name, num, ways, budget in (
        ("50 checkpoints, 3-way, shortlist and virtual", 50, (3, 3), 10**6),
        ("100 checkpoints, 8-way beam, shortlist and virtual", 100, (8, 8), options.budget),
    ):
        table = table if num == 50 else synthetic_table(num, TASKS)
        propagator = virtual_of(table)
        shortlist = networks(SecondOrderBatch(table).columns)
        scorer = PlanScorer(table, propagator, networks(propagator.columns), shortlist, options.threads)
        space = space_over(table, ways, arms)
        search = PlanSearch(SecondOrderBatch(table), shortlist, space, pool_over(table), "last", 1.0, options.threads)
        _, first = timed(lambda search=search, space=space, b=budget: search.run(space.beam_width(b), 500))
        found, seconds = timed(
            lambda s=scorer, space=space, t=table, b=budget: s.rank(space, pool_over(t), config=RankingConfig(budget=b))
        )
        first_stage = {f"first_stage_{name}": value for name, value in first._asdict().items()}
        rows[name] = seconds._asdict() | {"plans": found.num_scored, "width": found.width} | first_stage
        print(name, rows[name], flush=True)
    if options.out:
        write_result(options.out, {"rows": rows, "arms": arms, "threads": options.threads})


if __name__ == "__main__":
    main()
