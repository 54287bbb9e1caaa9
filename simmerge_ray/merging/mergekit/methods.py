"""mergekit's merge methods that are understood here: their parameters, defaults, and what they take as inputs.

Defaults are mergekit's; they may differ from those of our operators (`density` is 1 there), so a compiled document
always carries every parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from simmerge_ray.plans.operators.gradients import Scalar

Kind = Literal["float", "int", "bool", "choice"]


@dataclass(frozen=True)
class MethodParameter:
    """A parameter in mergekit's file.

    operator_name: our parameter; None where it is the weight, or has no effect on the result.
    per_source: may differ between the models; else it stands at the top level or in a slice.
    default: when the file has none; None is "not given" (which `required` refuses).
    is_ours: mergekit has no such parameter; with another value than the default it cannot make the merge.
    """

    kind: Kind = "float"
    operator_name: str | None = None
    per_source: bool = False
    default: Scalar | None = None
    required: bool = False
    is_ours: bool = False


@dataclass(frozen=True)
class Method:
    """What a method takes.

    base: "required" and "optional" leave the base out of the sources; "first" makes it the first of two; "none" ignores
    it, except that mergekit adds a base that is not among `models` to them.
    min_sources, max_sources: without the base, where it is left out.
    elects: entries whose sign is in the minority are left out, so what is divided by differs between entries.
    zero_sum: what weights that add up to 0 mean: an undivided sum, an error unless `normalize` is off, or 0.5 each
        (where the weights only say a share).
    """

    base: Literal["required", "optional", "first", "none"]
    parameters: Mapping[str, MethodParameter] = field(default_factory=dict)
    min_sources: int = 1
    max_sources: int | None = None
    elects: bool = False
    zero_sum: Literal["undivided", "error", "halves"] = "undivided"

    @property
    def base_is_apart(self) -> bool:
        return self.base in ("required", "optional")


_WEIGHT = MethodParameter(per_source=True, required=True)


def _task_vectors(
    normalize: bool, rescale: bool, sparse: bool = True, elects: bool = False, **more: MethodParameter
) -> Method:
    """A method that adds task vectors, made sparse first unless `sparse` is False."""
    return Method(
        "required",
        {
            "weight": _WEIGHT,
            "normalize": MethodParameter("bool", "normalize", default=normalize),
            "lambda": MethodParameter("float", "scale", default=1.0),
            "density": MethodParameter("float", "density" if sparse else None, per_source=True, default=1.0),
            "rescale": MethodParameter("bool", "rescale" if sparse else None, default=rescale),
            **more,
        },
        elects=elects,
    )


_GAMMA = MethodParameter("float", "gamma", per_source=True, default=0.01)
_EPSILON = MethodParameter("float", "epsilon", per_source=True, default=0.15)
_RAM_EPSILON = MethodParameter("float", "epsilon", default=1e-5)
_TRIM_SCOPE = MethodParameter("choice", "trim_scope", default="tensor", is_ours=True)

METHODS: Mapping[str, Method] = {
    "linear": Method(
        "none", {"weight": _WEIGHT, "normalize": MethodParameter("bool", "normalize", default=True)}, zero_sum="error"
    ),
    "slerp": Method("first", {"t": MethodParameter(required=True)}, min_sources=2, max_sources=2),
    "nuslerp": Method(
        "optional",
        {
            "weight": _WEIGHT,
            "nuslerp_flatten": MethodParameter("bool", "flatten", default=True),
            "nuslerp_row_wise": MethodParameter("bool", "row_wise", default=False),
        },
        min_sources=2,
        max_sources=2,
        zero_sum="halves",
    ),
    "task_arithmetic": _task_vectors(normalize=False, rescale=False, sparse=False),
    "ties": _task_vectors(normalize=True, rescale=False, elects=True, trim_scope=_TRIM_SCOPE),
    "dare_linear": _task_vectors(normalize=False, rescale=True),
    "dare_ties": _task_vectors(normalize=False, rescale=True, elects=True),
    "breadcrumbs": _task_vectors(normalize=False, rescale=False, gamma=_GAMMA),
    "breadcrumbs_ties": _task_vectors(normalize=False, rescale=False, elects=True, gamma=_GAMMA),
    "della": _task_vectors(normalize=True, rescale=True, elects=True, epsilon=_EPSILON),
    "della_linear": _task_vectors(normalize=False, rescale=True, epsilon=_EPSILON),
    "model_stock": Method(
        "required", {"filter_wise": MethodParameter("bool", "filter_wise", default=False)}, min_sources=2
    ),
    "karcher": Method(
        "none",
        {
            "max_iter": MethodParameter("int", "max_iter", default=10),
            "tol": MethodParameter("float", "tol", default=1e-5),
        },
    ),
    "arcee_fusion": Method("required", max_sources=1),
    "nearswap": Method("required", {"t": MethodParameter("float", "t", required=True)}, max_sources=1),
    "ram": Method("required", {"epsilon": _RAM_EPSILON}),
    "ramplus_tl": Method(
        "required",
        {
            "r": MethodParameter("float", "r", default=0.1),
            "alpha": MethodParameter("float", "alpha", default=0.2),
            "epsilon": _RAM_EPSILON,
        },
    ),
    "sce": Method("required", {"select_topk": MethodParameter("float", "select_topk", default=1.0)}),
    "multislerp": Method(
        "optional",
        {
            "weight": _WEIGHT,
            "normalize_weights": MethodParameter("bool", "normalize", default=True),
            "eps": MethodParameter("float", "eps", default=1e-8),
        },
        zero_sum="error",
    ),
    "passthrough": Method("none", {"scale": MethodParameter("float", "scale", per_source=True)}, max_sources=1),
}

# Accepted with every method, as it only chooses the dtype of mergekit's masks.
IGNORED_PARAMETERS = ("int8_mask",)
