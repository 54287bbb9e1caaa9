"""Names, parameters and ranges of the merge operators, without torch, so that a typo is answered at once.

An *arm* is an operator with its parameters: what a selector chooses from. Its label, e.g. `ties(density=0.2)`, is
canonical: defaults are left out and parameters are sorted, so that one arm has one label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from simmerge_ray.errors import OperatorError, unknown_name


@dataclass(frozen=True)
class ParameterSpec:
    """One real parameter of an operator: `low <= value <= high`, with `low` itself excluded when `open_low`."""

    default: float
    low: float
    high: float
    open_low: bool = False

    def problem(self, value: object) -> str | None:
        """What is wrong with `value`, or None."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return f"{value!r} is not a finite number"
        if value < self.low or value > self.high or (self.open_low and value == self.low):
            return f"{value!r} is outside {'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"
        return None


@dataclass(frozen=True)
class OperatorSpec:
    """What is known of an operator without running it.

    needs_base: the operator works on task vectors, so a base checkpoint is required.
    uses_base: the operator takes the base when there is one (always true when needs_base).
    symmetric: with weight 0.5 the result does not depend on the order of left and right.
    """

    name: str
    needs_base: bool
    uses_base: bool
    symmetric: bool
    parameters: Mapping[str, ParameterSpec] = field(default_factory=dict)


_WEIGHT_RANGE = ParameterSpec(default=0.5, low=0.0, high=1.0)
_SCALE = ParameterSpec(default=1.0, low=0.0, high=10.0)

OPERATOR_SPECS: Mapping[str, OperatorSpec] = {
    "linear": OperatorSpec("linear", needs_base=False, uses_base=False, symmetric=True),
    "slerp": OperatorSpec(
        "slerp", False, False, True, {"threshold": ParameterSpec(default=0.9995, low=0.0, high=1.0, open_low=True)}
    ),
    "nuslerp": OperatorSpec("nuslerp", needs_base=False, uses_base=True, symmetric=True),
    "task_arithmetic": OperatorSpec("task_arithmetic", True, True, True, {"scale": _SCALE}),
    "ties": OperatorSpec(
        "ties",
        needs_base=True,
        uses_base=True,
        symmetric=True,
        parameters={"density": ParameterSpec(default=0.5, low=0.0, high=1.0, open_low=True), "scale": _SCALE},
    ),
}


@dataclass(frozen=True, order=True)
class Arm:
    """An operator with its parameters, defaults left out. Build it with `make_arm` or `parse_arm`."""

    operator: str
    params: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        """Canonical text form, e.g. `linear` or `ties(density=0.2)`."""
        inner = ", ".join(f"{key}={value:g}" for key, value in self.params)
        return f"{self.operator}({inner})" if inner else self.operator

    @property
    def spec(self) -> OperatorSpec:
        return OPERATOR_SPECS[self.operator]

    def param_dict(self) -> dict[str, float]:
        """All parameters, defaults filled in."""
        return {name: spec.default for name, spec in self.spec.parameters.items()} | dict(self.params)


def make_arm(operator: str, params: Mapping[str, float] | None = None) -> Arm:
    """Checked `Arm`.

    Raises:
        OperatorError: unknown operator, unknown parameter, or a value out of its range.
    """
    if operator not in OPERATOR_SPECS:
        raise OperatorError(unknown_name("operator", operator, OPERATOR_SPECS))
    specs = OPERATOR_SPECS[operator].parameters
    kept = []
    for name, value in sorted((params or {}).items()):
        if name not in specs:
            raise OperatorError(f"operator {operator!r}: {unknown_name('parameter', name, specs)}")
        if problem := specs[name].problem(value):
            raise OperatorError(f"operator {operator!r}: parameter {name!r}: {problem}")
        if float(value) != specs[name].default:
            kept.append((name, float(value)))
    return Arm(operator, tuple(kept))


def parse_arm(text: str) -> Arm:
    """`ties(density=0.2)` -> Arm; the inverse of `Arm.label`.

    Raises:
        OperatorError: the text has not this form, or `make_arm` refuses what it says.
    """
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise OperatorError(f"arm {text!r} is not of the form operator or operator(name=number, ...)")
    params: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in (match[2] or "").split(","))):
        name, equals, value = part.partition("=")
        try:
            params[name.strip()] = float(value)
        except ValueError:
            raise OperatorError(f"arm {text!r}: {part!r} is not of the form name=number") from None
    return make_arm(match[1], params)


def parse_arms(texts: list[str] | tuple[str, ...]) -> tuple[Arm, ...]:
    """Parse several arms; refuses an empty list and duplicates (they would share their labels)."""
    arms = tuple(parse_arm(text) for text in texts)
    if not arms:
        raise OperatorError("no arms given; name at least one operator")
    seen: set[Arm] = set()
    for arm in arms:
        if arm in seen:
            raise OperatorError(f"arm {arm.label!r} is given twice")
        seen.add(arm)
    return arms


def check_weight(weight: float) -> None:
    """Refuse a step weight outside [0, 1]."""
    if problem := _WEIGHT_RANGE.problem(weight):
        raise OperatorError(f"weight of the right checkpoint: {problem}")
