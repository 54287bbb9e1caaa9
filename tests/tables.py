"""Signal tables of made-up checkpoints, consistent with points in a space: merges have distances and cosines."""

from __future__ import annotations

import numpy as np

from simmerge_ray.signals.features import column_signal, feature_columns
from simmerge_ray.signals.pair_blocks import PairSignals
from simmerge_ray.signals.table import SignalTable


def synthetic_table(
    num_checkpoints: int = 5, tasks: tuple[str, ...] = ("s", "t"), with_base: bool = True, seed: int = 0
) -> SignalTable:
    """Own tasks in turn. Weights are points near a base, KL is half a squared distance with another scale each way."""
    generator = np.random.default_rng(seed)
    base = ["base"] if with_base else []
    ids = [*base, *(f"c{i:02d}" for i in range(num_checkpoints))]
    columns = feature_columns(with_base)
    of_pairs = {column: _matrix(column, len(ids), with_base, generator) for column in columns}
    by_task = {task: {c: _matrix(c, len(ids), with_base, generator) for c in columns} for task in tasks}
    rows = {}
    for task in tasks:
        for i, left in enumerate(ids):
            for j, right in enumerate(ids):
                kept = feature_columns(True, base_pair=True) if with_base and 0 in (i, j) else columns
                values = {}
                for column in kept:
                    matrix = of_pairs[column] if column_signal(column).of_weights else by_task[task][column]
                    one_sided = column.endswith(("_left", "_right"))
                    if one_sided:
                        matrix = (of_pairs if column_signal(column).of_weights else by_task[task])[
                            column.rsplit("_", 1)[0] + "_left"
                        ]
                    if "_rl_" in column:
                        matrix = by_task[task][column.replace("_rl_", "_lr_")].T
                    values[column] = float(matrix[j, i] if column.endswith("_right") else matrix[i, j])
                if i != j:
                    rows[left, right, task] = PairSignals(left, right, task, values)
    provenance = {
        "base": "base" if with_base else None,
        "own_task": {name: tasks[index % len(tasks)] for index, name in enumerate(ids[len(base) :])},
        "checkpoints": {name: f"digest-{name}" for name in ids},
        "weights": "exact",
    }
    return SignalTable(columns, rows, provenance)


def _matrix(column: str, size: int, with_base: bool, generator: np.random.Generator) -> np.ndarray:
    """(size, size) values of one column."""
    signal = column_signal(column)
    points = generator.normal(size=(size, 8))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    if signal.family == "divergence":
        return 0.1 * distance**2 * generator.uniform(0.8, 1.2, (size, 1))
    if signal.family == "single":
        return np.repeat(generator.uniform(0.5, 2.0, (size, 1)), size, axis=1)
    if signal.name == "weight_l2":
        return 0.1 * distance
    if signal.name == "task_vector_norm_ratio":
        ratio = generator.normal(size=size)
        return ratio[:, None] - ratio[None]
    if "cosine" in signal.name:
        unit = points / np.linalg.norm(points, axis=1, keepdims=True)
        return (unit + 1.0) @ (unit + 1.0).T / 16.0
    return 0.5 * (points @ points.T) / 16.0
