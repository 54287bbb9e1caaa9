"""Names, parameters and ranges of the merge operators, without torch, so that a typo is answered at once.

An *arm* is an operator with its parameters: what a selector chooses from. Its label, e.g. `ties(density=0.2)`, is
canonical: defaults are left out and parameters are sorted, so that one arm has one label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from simmerge_ray.base.errors import OperatorError, unknown_name

Parameter = float | int | bool | str
Weight = float | tuple[float, ...]  # several are anchors of a gradient over the layers (see `gradients`)
MAX_ANCHORS = 64


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of an operator: `low <= value <= high`, with `low` itself excluded when `open_low`.

    kind: "float", "int" (a whole number), "bool" or "choice" (one of `choices`), which have no range. searched: where
    good merges are found, for a search; None for what a search leaves at its default.
    """

    default: Parameter
    low: float = 0.0
    high: float = 1.0
    open_low: bool = False
    kind: Literal["float", "int", "bool", "choice"] = "float"
    choices: tuple[str, ...] = ()
    searched: tuple[float, float] | None = None

    def problem(self, value: object) -> str | None:
        """What is wrong with `value`, or None."""
        if self.kind == "bool":
            return None if isinstance(value, bool) else f"{value!r} is not true or false"
        if self.kind == "choice":
            return None if value in self.choices else f"{value!r} is not one of {', '.join(self.choices)}"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return f"{value!r} is not a finite number"
        if self.kind == "int" and value != int(value):
            return f"{value!r} is not a whole number"
        if value < self.low or value > self.high or (self.open_low and value == self.low):
            return f"{value!r} is outside {'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"
        return None

    def canonical(self, value: Parameter) -> Parameter:
        """A value without problems as the Python type of its kind."""
        return {"float": float, "int": int, "bool": bool, "choice": str}[self.kind](value)


@dataclass(frozen=True)
class OperatorSpec:
    """What is known of an operator without running it.

    needs_base: the operator works on task vectors, so a base checkpoint is required.
    uses_base: the operator takes the base when there is one (always true when needs_base).
    symmetric: with weight 0.5 the result does not depend on the order of left and right. Random operators are not:
        their masks belong to the sources, so seeds have to be swapped along.
    min_sources, max_sources: how many checkpoints it merges, the base not counted; max None means any number.
    random: takes one seed a source.
    uses_weights: the weights of the sources matter (false where the operator finds its own).
    one_weight: the weights of a two-way step are `1 - t, t` with one number t, whose gradient is that of the step.
    trims: keeps the largest magnitudes of each task vector, up to a threshold that may be known beforehand.
    shares: how the result lies in the span of its sources: an average, a sum of task vectors, a point on the arc
        between two; None where it does not.
    stand_in: an operator with `shares` that has its expectation or about its norm.
    per_source: parameters that may also be a sequence with one value for each source.
    needs_grams: takes Gram matrices of the inputs of linear layers, so sources are checkpoints that have them.
    """

    name: str
    needs_base: bool
    uses_base: bool
    symmetric: bool
    parameters: Mapping[str, ParameterSpec] = field(default_factory=dict)
    min_sources: int = 2
    max_sources: int | None = 2
    random: bool = False
    uses_weights: bool = True
    one_weight: bool = False
    trims: bool = False
    shares: Literal["average", "sum", "arc"] | None = None
    stand_in: str = "linear"
    per_source: frozenset[str] = frozenset()
    needs_grams: bool = False

    @property
    def is_spherical(self) -> bool:
        """Whether it follows the arc between two sources, which may be straight: then it is their average."""
        return self.shares == "arc"


_WEIGHT_RANGE = ParameterSpec(default=0.5)
_SCALE = ParameterSpec(default=1.0, high=10.0, searched=(0.2, 2.0))
_DENSITY = ParameterSpec(default=0.5, open_low=True, searched=(0.05, 1.0))
_ON = ParameterSpec(default=True, kind="bool")
_OFF = ParameterSpec(default=False, kind="bool")
_GUARD = ParameterSpec(default=1e-8, high=1e-2, open_low=True)


def _free(name: str, parameters: Mapping[str, ParameterSpec], **known: Any) -> OperatorSpec:
    """A row for an operator on the checkpoints themselves; any number of them, if `known` does not say otherwise."""
    row: dict[str, Any] = {"uses_base": False, "symmetric": True, "min_sources": 1, "max_sources": None}
    return OperatorSpec(name, needs_base=False, parameters=parameters, **(row | known))


def _on_task_vectors(name: str, parameters: Mapping[str, ParameterSpec], **known: Any) -> OperatorSpec:
    """A row for an operator on task vectors, any number of them."""
    per_source = frozenset({"density", "epsilon", "gamma"} & parameters.keys())
    row: dict[str, Any] = {"symmetric": True, "min_sources": 1, "max_sources": None, "per_source": per_source}
    return OperatorSpec(name, needs_base=True, uses_base=True, parameters=parameters, **(row | known))


def _random(name: str, parameters: Mapping[str, ParameterSpec]) -> OperatorSpec:
    """A row for a sum of task vectors with entries dropped at random."""
    return _on_task_vectors(name, parameters, symmetric=False, random=True, stand_in="task_arithmetic")


def _on_base(name: str, parameters: Mapping[str, ParameterSpec]) -> OperatorSpec:
    """A row for a change of the base by one other checkpoint, which no step of two can be."""
    return _on_task_vectors(name, parameters, symmetric=False, max_sources=1, uses_weights=False)


def _ram(name: str, parameters: dict[str, ParameterSpec]) -> OperatorSpec:
    row = parameters | {"epsilon": ParameterSpec(default=1e-5)}
    return _on_task_vectors(name, row, uses_weights=False, per_source=frozenset())


def _dare(normalize: ParameterSpec) -> dict[str, ParameterSpec]:
    return {"density": _DENSITY, "rescale": _ON, "scale": _SCALE, "normalize": normalize}


def _della(normalize: ParameterSpec) -> dict[str, ParameterSpec]:
    density = replace(_DENSITY, searched=(0.2, 0.8))  # density +- epsilon has to stay inside (0, 1)
    return _dare(normalize) | {"density": density, "epsilon": ParameterSpec(default=0.15)}


_ARC: Mapping[str, Any] = {"min_sources": 2, "max_sources": 2, "shares": "arc"}
_BREADCRUMBS = _dare(_OFF) | {"rescale": _OFF, "gamma": ParameterSpec(default=0.01)}

# `normalize` has mergekit's defaults, so that a file means the same here and there: true for linear, ties and della,
# false for the others, dare_ties and breadcrumbs_ties among them.
OPERATOR_SPECS: Mapping[str, OperatorSpec] = {
    spec.name: spec
    for spec in (
        _free("linear", {"normalize": _ON}, shares="average"),
        _free("slerp", {"threshold": ParameterSpec(default=0.9995, open_low=True)}, one_weight=True, **_ARC),
        _free("nuslerp", {"flatten": _ON, "row_wise": _OFF}, uses_base=True, **_ARC),
        _on_task_vectors("task_arithmetic", {"scale": _SCALE, "normalize": _OFF}, shares="sum"),
        _on_task_vectors(
            "ties",
            {
                "density": _DENSITY,
                "scale": _SCALE,
                "normalize": _ON,
                "rescale": _OFF,
                "trim_scope": ParameterSpec(default="tensor", kind="choice", choices=("tensor", "global")),
            },
            trims=True,
            stand_in="nuslerp",
        ),
        _random("dare_linear", _dare(_OFF)),
        _random("dare_ties", _dare(_OFF)),
        _random("della", _della(_ON)),
        _random("della_linear", _della(_OFF)),
        _on_task_vectors("breadcrumbs", _BREADCRUMBS, stand_in="task_arithmetic"),
        _on_task_vectors("breadcrumbs_ties", _BREADCRUMBS, stand_in="task_arithmetic"),
        _on_task_vectors("model_stock", {"filter_wise": _OFF}, min_sources=2, uses_weights=False),
        _free(
            "karcher",
            {
                "max_iter": ParameterSpec(default=10, low=1, high=1000, kind="int"),
                "tol": ParameterSpec(default=1e-5, open_low=True),
            },
        ),
        _on_task_vectors(
            "sce",
            {"select_topk": ParameterSpec(default=1.0, searched=(0.05, 1.0))},
            uses_weights=False,
            stand_in="nuslerp",
        ),
        _free("multislerp", {"normalize": _ON, "eps": _GUARD}, uses_base=True, stand_in="nuslerp"),
        _on_base("arcee_fusion", {}),
        _on_base("nearswap", {"t": ParameterSpec(default=1e-4, high=1e3, searched=(1e-6, 1e-2))}),
        _ram("ram", {}),
        _ram(
            "ramplus_tl", {"r": ParameterSpec(default=0.1, high=10.0), "alpha": ParameterSpec(default=0.2, high=10.0)}
        ),
        _on_task_vectors("scale_matched_linear", {}),
        _free("regmean", {"alpha": ParameterSpec(default=0.9)}, needs_grams=True),
        _free(
            "passthrough",
            {"scale": _SCALE},
            symmetric=False,
            max_sources=1,
            uses_weights=False,
            per_source=frozenset({"scale"}),
        ),
    )
}


@dataclass(frozen=True, order=True)
class Arm:
    """An operator with its parameters, defaults left out. Build it with `make_arm` or `parse_arm`."""

    operator: str
    params: tuple[tuple[str, Parameter], ...] = ()

    @property
    def label(self) -> str:
        """Canonical text form, e.g. `linear` or `ties(density=0.2)`."""
        inner = ", ".join(f"{key}={parameter_text(value)}" for key, value in self.params)
        return f"{self.operator}({inner})" if inner else self.operator

    @property
    def spec(self) -> OperatorSpec:
        return OPERATOR_SPECS[self.operator]

    def param_dict(self) -> dict[str, Parameter]:
        """All parameters, defaults filled in."""
        return {name: spec.default for name, spec in self.spec.parameters.items()} | dict(self.params)


def parameter_text(value: Parameter) -> str:
    """Shortest text that `_parse_parameter` reads as the same value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _parse_parameter(text: str, spec: ParameterSpec | None) -> Parameter:
    if spec is not None and spec.kind == "choice":
        return text
    return text == "true" if text in ("true", "false") else float(text)


def make_arm(operator: str, params: Mapping[str, Parameter] | None = None) -> Arm:
    """Checked `Arm`. Raises OperatorError: unknown operator, unknown parameter, or a value out of its range."""
    if operator not in OPERATOR_SPECS:
        raise OperatorError(unknown_name("operator", operator, OPERATOR_SPECS))
    specs = OPERATOR_SPECS[operator].parameters
    kept = []
    for name, value in sorted((params or {}).items()):
        if name not in specs:
            raise OperatorError(f"operator {operator!r}: {unknown_name('parameter', name, specs)}")
        if problem := specs[name].problem(value):
            raise OperatorError(f"operator {operator!r}: parameter {name!r}: {problem}")
        if value != specs[name].default:
            kept.append((name, specs[name].canonical(value)))
    return Arm(operator, tuple(kept))


def parse_arm(text: str) -> Arm:
    """`ties(density=0.2)` -> Arm; the inverse of `Arm.label`. Raises OperatorError: another form, or see `make_arm`."""
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise OperatorError(f"arm {text!r} is not of the form operator or operator(name=number, ...)")
    params: dict[str, Parameter] = {}
    specs = OPERATOR_SPECS[match[1]].parameters if match[1] in OPERATOR_SPECS else {}
    for part in filter(None, (piece.strip() for piece in (match[2] or "").split(","))):
        name, equals, value = part.partition("=")
        try:
            params[name.strip()] = _parse_parameter(value.strip(), specs.get(name.strip()))
        except ValueError:
            raise OperatorError(
                f"arm {text!r}: {part!r} is not of the form name=number, name=true or name=false"
            ) from None
    return make_arm(match[1], params)


def parse_arms(texts: list[str] | tuple[str, ...]) -> tuple[Arm, ...]:
    """Parse several arms; refuses an empty list and duplicates (they would share their labels)."""
    arms = tuple(parse_arm(text) for text in texts)
    if not arms:
        raise OperatorError("no arms given; name at least one operator")
    if twice := [arm for index, arm in enumerate(arms) if arm in arms[:index]]:
        raise OperatorError(f"arm {twice[0].label!r} is given twice")
    return arms


def check_weight(weight: Weight) -> None:
    """Refuse a step weight outside [0, 1], one with such an anchor, or one with too few or many: an OperatorError."""
    title = "weight of the right checkpoint"
    if isinstance(weight, tuple) and not 2 <= len(weight) <= MAX_ANCHORS:
        raise OperatorError(f"{title}: a list needs 2 to {MAX_ANCHORS} anchors, got {len(weight)}")
    for number, anchor in enumerate(weight if isinstance(weight, tuple) else (weight,), 1):
        if problem := _WEIGHT_RANGE.problem(anchor):
            where = f"{title}: anchor {number}" if isinstance(weight, tuple) else title
            raise OperatorError(f"{where}: {problem}")
