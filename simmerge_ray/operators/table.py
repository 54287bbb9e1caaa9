"""The table of merge operators. A new operator is one file, one row here and one row in `specs.OPERATOR_SPECS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from simmerge_ray.operators.linear import linear
from simmerge_ray.operators.nuslerp import nuslerp
from simmerge_ray.operators.slerp import slerp
from simmerge_ray.operators.task_arithmetic import task_arithmetic
from simmerge_ray.operators.ties import ties

# `(base, left, right, *, weight, **params) -> tensor`: one tensor at a time, float32 (or float64) out.
MergeOperator = Callable[..., Tensor]

OPERATORS: Mapping[str, MergeOperator] = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
}
