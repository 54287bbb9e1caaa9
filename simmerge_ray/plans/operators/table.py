"""The table of merge operators. A new operator is one file, one row here and one row in `specs.OPERATOR_SPECS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from simmerge_ray.plans.operators.arcee_fusion import arcee_fusion
from simmerge_ray.plans.operators.breadcrumbs import breadcrumbs, breadcrumbs_ties
from simmerge_ray.plans.operators.dare import dare_linear, dare_ties
from simmerge_ray.plans.operators.della import della, della_linear
from simmerge_ray.plans.operators.karcher import karcher
from simmerge_ray.plans.operators.linear import linear
from simmerge_ray.plans.operators.model_stock import model_stock
from simmerge_ray.plans.operators.multislerp import multislerp
from simmerge_ray.plans.operators.nearswap import nearswap
from simmerge_ray.plans.operators.nuslerp import nuslerp, nuslerp_fell_back
from simmerge_ray.plans.operators.passthrough import passthrough
from simmerge_ray.plans.operators.ram import ram, ramplus_tl
from simmerge_ray.plans.operators.regmean import regmean
from simmerge_ray.plans.operators.scale_matched_linear import scale_matched_linear
from simmerge_ray.plans.operators.sce import sce
from simmerge_ray.plans.operators.slerp import slerp, slerp_fell_back
from simmerge_ray.plans.operators.task_arithmetic import task_arithmetic
from simmerge_ray.plans.operators.ties import ties

# `(base or None, tensors, weights, *, **params) -> tensor`: one tensor of the model at a time, float32 (or float64)
# out. Random operators take `seeds=` too, one for each of the tensors.
MergeOperator = Callable[..., Tensor]

OPERATORS: Mapping[str, MergeOperator] = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "della_linear": della_linear,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "model_stock": model_stock,
    "karcher": karcher,
    "sce": sce,
    "multislerp": multislerp,
    "arcee_fusion": arcee_fusion,
    "nearswap": nearswap,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "scale_matched_linear": scale_matched_linear,
    "regmean": regmean,
    "passthrough": passthrough,
}

_FELL_BACK: Mapping[str, Callable[..., bool]] = {"slerp": slerp_fell_back, "nuslerp": nuslerp_fell_back}


def fell_back(name: str, base: Tensor | None, tensors: Sequence[Tensor], **params: Any) -> bool:
    """Whether a spherical operator has no arc to follow here and takes the linear average; False for the others."""
    return name in _FELL_BACK and _FELL_BACK[name](base, tensors, **params)
