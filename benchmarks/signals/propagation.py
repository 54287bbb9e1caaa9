"""Propagated signals against the audit, on a finished demo run.

    python -m benchmarks.signals.propagation RUN [--out DIR] [--store DIR] [--plans 60]

Plans are left folds of five checkpoints with equal weighting; depth d is the step whose left source is the result of d
steps. Relative RMSE is RMSE over the mean of |exact| of the same points; Kendall's tau is taken within each task and
averaged. Intervals (95 %) resample the checkpoints: a plan counts as often as all its members were drawn.

The shares and curves of `virtual` and `curved` were chosen on 24 other plans (linear, ties) of the demo's twelve
checkpoints: plans are fresh here, checkpoints are not.

Writes `propagation.json`, `propagation.md` and `propagation.png`, and all features of all points as `rows.json`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import kendalltau

from benchmarks.measuring import script_parser, timed
from benchmarks.signals.probes import resampled
from benchmarks.signals.propagation_report import DEPTHS, OPERATORS, PREDICTED, SIGNALS, Rows, draw, markdown
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.plans.operators.specs import parse_arm
from simmerge_ray.plans.plan import MergePlan, fold_plan
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.propagation.evidence import Evidence, read_evidence
from simmerge_ray.signals.propagation.exact import Exact
from simmerge_ray.signals.propagation.interface import plan_sources
from simmerge_ray.signals.propagation.merged import merged_steps
from simmerge_ray.signals.propagation.table import PROPAGATORS
from simmerge_ray.signals.propagation.virtual import Virtual
from simmerge_ray.signals.samples import TensorBlocks
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore

NUM_RESAMPLES = 500
SEED = 0
REDUCED_COORDINATES = 2457  # a tenth of the MLP tensors of the demo's model


def sample_plans(catalogue: Catalogue, operator: str, count: int) -> list[MergePlan]:
    """The same members for every operator."""
    generator = random.Random(SEED)
    arm = parse_arm(operator)
    return [fold_plan(generator.sample(catalogue.ids, len(DEPTHS) + 2), [arm]) for _ in range(count)]


def measure(evidence: Evidence, plans: Sequence[MergePlan], operator: str) -> tuple[Rows, dict[str, float]]:
    """A row for every plan, depth and task, with all features of every propagator; seconds a plan and task."""
    propagators = {name: build(evidence) for name, build in PROPAGATORS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in propagators}
    rows = []
    for number, plan in enumerate(plans):
        for task in evidence.table.tasks:
            found = {}
            for name, propagator in propagators.items():
                found[name], taken = timed(partial(propagator.steps, plan, task))
                seconds[name].append(taken.wall)
            for depth in DEPTHS:
                features = {name: dict(steps[depth].features) for name, steps in found.items()}
                members = [source for step in plan.steps[: depth + 1] for source in (step.left, step.right)]
                rows.append(
                    {
                        "operator": operator, "plan": number, "depth": depth, "task": task, "features": features,
                        "members": [member for member in members if not member.startswith("#")],
                    }
                )  # fmt: skip
    return rows, {name: float(np.median(values)) for name, values in seconds.items()}


def multiplicities(rows: Rows, ids: Sequence[str]) -> np.ndarray:
    """(resamples + 1, rows): how often each row counts; the first is the sample itself."""
    members = np.array([[ids.index(name) for name in row["members"]] for row in rows])
    return resampled(len(ids), NUM_RESAMPLES, SEED)[members].prod(1).T


def chosen(rows: Rows, operator: str, depth: int) -> Rows:
    return [row for row in rows if row["operator"] == operator and row["depth"] == depth]


def column_of(rows: Rows, column: str, *names: str) -> list[np.ndarray]:
    """A feature of all rows, by each of these propagators."""
    return [np.array([row["features"][name][column] for row in rows]) for name in names]


def relative_rmse(predicted: np.ndarray, exact: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(resamples + 1,)"""
    with np.errstate(invalid="ignore", divide="ignore"):
        totals = counts.sum(1)
        error = np.sqrt(counts @ (predicted - exact) ** 2 / totals)
        return error / (counts @ np.abs(exact) / totals)


def weighted_tau(predicted: np.ndarray, exact: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of every resample, pairs weighted by the product of their counts."""
    a, b = (np.sign(values[:, None] - values[None, :]) for values in (predicted, exact))

    def quadratic(matrix: np.ndarray) -> np.ndarray:
        return ((counts @ matrix) * counts).sum(1)

    with np.errstate(invalid="ignore", divide="ignore"):
        return quadratic(a * b) / np.sqrt(quadratic(a * a) * quadratic(b * b))


def summary(rows: Rows, ids: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for every operator, depth, propagator and signal."""
    entries = []
    for operator, depth in product(OPERATORS, DEPTHS):
        points = chosen(rows, operator, depth)
        counts = multiplicities(points, ids)
        tasks = np.array([row["task"] for row in points])
        parts = [tasks == task for task in sorted(set(tasks))]
        for name, (signal, column) in product(PREDICTED, SIGNALS.items()):
            exact, predicted = column_of(points, column, "exact", name)
            rmse = relative_rmse(predicted, exact, counts)
            tau = np.mean([weighted_tau(predicted[p], exact[p], counts[:, p]) for p in parts], axis=0)
            check = np.mean([kendalltau(predicted[p], exact[p]).statistic for p in parts])
            assert math.isclose(tau[0], check, abs_tol=1e-9)
            entries.append(
                {
                    "operator": operator, "depth": depth, "propagator": name, "signal": signal,
                    "relative_rmse": rmse[0], "relative_rmse_interval": interval(rmse[1:]),
                    "bias": float(np.mean(predicted - exact) / np.mean(np.abs(exact))),
                    "tau": tau[0], "tau_interval": interval(tau[1:]), "points": len(points),
                }
            )  # fmt: skip
    return entries


def interval(values: np.ndarray) -> list[float]:
    return np.quantile(values[np.isfinite(values)], [0.025, 0.975]).tolist()


def every_column(rows: Rows, name: str) -> dict[str, float]:
    """RMSE over the standard deviation of the exact values, all operators and depths together, by column."""
    found = {}
    for column in rows[0]["features"][name]:
        exact, predicted = column_of(rows, column, "exact", name)
        found[column] = float(np.sqrt(np.mean((predicted - exact) ** 2)) / np.std(exact))
    return found


def paired_gain(rows: Rows, ids: Sequence[str]) -> list[dict[str, Any]]:
    """What `curved` gains over `virtual` in KL on the same resamples: their intervals apart say nothing of that."""
    entries = []
    for operator, depth in product(OPERATORS, DEPTHS):
        points = chosen(rows, operator, depth)
        counts = multiplicities(points, ids)
        exact, line, curve = column_of(points, "kl_lr_mean", "exact", "virtual", "curved")
        gain = relative_rmse(line, exact, counts) - relative_rmse(curve, exact, counts)
        medians = [float(np.median(np.abs(values / exact - 1.0))) for values in (line, curve)]
        entry = {"operator": operator, "depth": depth, "gain": gain[0], "interval": interval(gain[1:])}
        entries.append(entry | {"median": medians})
    return entries


def weight_errors(rows: Rows, operator: str) -> dict[str, Any]:
    """Largest error of `virtual` by column over all plans and depths, relative (cosines and log ratios absolute).

    Rows of a merge with a tensor kind that none of its members moved are left out and counted: what `exact` finds there
    is the rounding of float32, and no direction.
    """
    kinds = ("attention", "mlp", "embedding", "norm")
    worst: dict[str, float] = {}
    left_out = 0
    for row in rows:
        if row["operator"] != operator:
            continue
        exact, found = row["features"]["exact"], row["features"]["virtual"]
        # A norm of 0 counts as the smallest float64, whose logarithm is -708. A right checkpoint may be unmoved, too,
        # but both sides know it exactly.
        if any(found[f"task_vector_norm_ratio_{kind}"] < -100.0 for kind in kinds):
            left_out += 1
            continue
        for column, value in exact.items():
            if column.startswith(("weight_", "task_vector_")):
                size = 1.0 if "cosine" in column or "ratio" in column else abs(value)
                if size > 1e-6:
                    worst[column] = max(worst.get(column, 0.0), abs(found[column] - value) / size)
    return {"worst": worst, "rows_left_out": left_out}


def sampled_tensor_errors(evidence: Evidence, plans: Sequence[MergePlan], calibrated: bool) -> dict[str, Any]:
    """Errors of norm, l2 and cosine of single tensors of at least 10 times the sample, relative (cosine: absolute)."""
    catalogue = evidence.catalogue
    virtual = Virtual(evidence.table, evidence.ids, evidence.outputs, evidence.weights, evidence.sums, evidence.digests)
    blocks = {ref.id: TensorBlocks(ref) for ref in catalogue.all_refs}
    names = [name for name, merges in virtual.merges.items() if merges.space.scale >= 10.0]
    if not calibrated:
        for name in names:
            space = virtual.merges[name].space
            space.weights = lambda _, space=space: np.full(len(space.centre), space.scale)
    errors: dict[int, list[list[float]]] = {depth: [] for depth in DEPTHS}
    whole = {(one, name): blocks[one].read(name, 0, blocks[one].num_elements(name)) for one in blocks for name in names}
    assert catalogue.base is not None
    for plan in plans:
        merges = list(merged_steps(plan, catalogue))
        for depth in DEPTHS:
            left, right = plan_sources(plan)[depth]
            for name in names:
                space = virtual.merges[name].space
                base = whole[catalogue.base.id, name]
                truth = [merges[depth - 1][name].numpy().reshape(-1) - base, whole[right, name] - base]
                truth = [vector.astype(np.float64) for vector in truth]
                (a, ab), (_, b) = space.products([virtual.merges[name].of(s) for s in (left, right)])
                norms = [float(np.linalg.norm(vector)) for vector in truth]
                distance = float(np.linalg.norm(truth[0] - truth[1]))
                errors[depth].append(
                    [
                        math.sqrt(max(a, 0.0)) / norms[0] - 1.0,
                        math.sqrt(max(a + b - 2 * ab, 0.0)) / distance - 1.0,
                        ab / math.sqrt(max(a * b, 1e-30)) - float(truth[0] @ truth[1]) / (norms[0] * norms[1]),
                    ]
                )
    return {
        "tensors": len(names),
        "coordinates": len(virtual.merges[names[0]].space.centre),
        **{
            f"depth {depth}": {
                label: {"rms": float(np.sqrt(np.mean(values**2))), "max": float(np.abs(values).max())}
                for label, values in zip(("norm", "l2", "cosine"), np.array(found).T, strict=True)
            }
            for depth, found in errors.items()
        },
    }


def cast_effect(evidence: Evidence, plans: Sequence[MergePlan]) -> dict[str, float]:
    """Relative RMSE that rounding intermediates to bfloat16 makes, over all depths and tasks."""
    exact = [
        Exact(evidence.table, evidence.catalogue, evidence.tokens, evidence.outputs, evidence.weights, dtype)
        for dtype in ("F32", "BF16")
    ]
    values: dict[str, list[tuple[float, float]]] = {signal: [] for signal in SIGNALS}
    for plan in plans:
        for task in evidence.table.tasks:
            for kept, rounded in zip(*(one.steps(plan, task)[1:] for one in exact), strict=True):
                for signal, column in SIGNALS.items():
                    values[signal].append((kept.features[column], rounded.features[column]))
    arrays = {signal: np.array(pairs) for signal, pairs in values.items()}
    return {
        signal: float(np.sqrt(np.mean((a[:, 1] - a[:, 0]) ** 2)) / np.mean(np.abs(a[:, 0])))
        for signal, a in arrays.items()
    }


@lru_cache(2)
def evidence_of(run: Path, store: Path, num_coordinates: int = 10_000) -> Evidence:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    catalogue = load_catalogue(run / "zoo" / "catalogue.yaml")
    probe_sets = load_probe_sets(run / "zoo" / "probes")
    spec = SignatureSpec(num_positions=512, num_attention_positions=128, num_coordinates=num_coordinates)
    signatures = SignatureStore(store)
    return read_evidence(
        compute_signals(catalogue, probe_sets, spec, store=signatures), catalogue, probe_sets, signatures
    )


def measured(run: Path, store: Path, operator: str, count: int) -> tuple[Rows, dict[str, float]]:
    evidence = evidence_of(run, store)
    return measure(evidence, sample_plans(evidence.catalogue, operator, count), operator)


def sampled_ties(run: Path, store: Path) -> dict[str, Any]:
    evidence = evidence_of(run, store, REDUCED_COORDINATES)
    plans = sample_plans(evidence.catalogue, "ties", 20)
    return {
        "calibrated": sampled_tensor_errors(evidence, plans, calibrated=True),
        "plain n/S": sampled_tensor_errors(evidence, plans, calibrated=False),
    }


def cast(run: Path, store: Path) -> dict[str, float]:
    evidence = evidence_of(run, store)
    return cast_effect(evidence, [p for o in OPERATORS for p in sample_plans(evidence.catalogue, o, 5)])


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("propagation"))
    parser.add_argument("--store", type=Path, default=None)
    parser.add_argument("--plans", type=int, default=60)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    where = arguments.run, arguments.store or arguments.out / "signatures"
    evidence = evidence_of(*where)  # signatures are there before two processes look for them
    ids, tasks = evidence.catalogue.ids, evidence.table.tasks
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {name: pool.submit(measured, *where, name, arguments.plans) for name in reversed(OPERATORS)}
        sampled, rounded = pool.submit(sampled_ties, *where), pool.submit(cast, *where)
        found = {name: running[name].result() for name in OPERATORS}
        rows = [row for one, _ in found.values() for row in one]
        (arguments.out / "rows.json").write_text(json.dumps(rows))
        points = len(rows) // len(OPERATORS) // len(DEPTHS)
        result = {
            "about": f"{arguments.run.name}: {len(ids)} checkpoints, {len(tasks)} tasks; {arguments.plans} plans of 5 "
            f"checkpoints an operator (seed {SEED}), {points} points an operator and depth.",
            "summary": summary(rows, ids),
            "gain": paired_gain(rows, ids),
            "columns": {name: every_column(rows, name) for name in PREDICTED},
            "weights": {operator: weight_errors(rows, operator) for operator in OPERATORS},
            "sampled_ties": sampled.result(),
            "cast_to_bfloat16": rounded.result(),
            "seconds": {operator: seconds for operator, (_, seconds) in found.items()},
        }
    (arguments.out / "propagation.json").write_text(json.dumps(result, indent=1))
    (arguments.out / "propagation.md").write_text(markdown(result))
    draw(rows, arguments.out)
    print(arguments.out / "propagation.md")


if __name__ == "__main__":
    main()
