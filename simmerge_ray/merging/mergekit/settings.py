"""The parameters of a mergekit document as rules: kinds and ranges are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from simmerge_ray.merging.mergekit.documents import Parameters, Rule, Scalar, Setting
from simmerge_ray.merging.mergekit.methods import IGNORED_PARAMETERS, METHODS, Kind
from simmerge_ray.merging.mergekit.problems import Problems, shorten
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS


class SettingsReader:
    """Reads the parameters of one document, those of its slices and sources included."""

    def __init__(self, problems: Problems, operator: str | None) -> None:
        self._problems, self._operator = problems, operator
        self._report = problems.report

    def parameters(self, value: object, place: str, level: Literal["document", "slice", "source"]) -> Parameters:
        if value is None:
            return {}
        method = METHODS[self._operator] if self._operator else None
        known = {name for known in ((method,) if method else METHODS.values()) for name in known.parameters}
        fields = self._problems.mapping(value, place, sorted(known | {*IGNORED_PARAMETERS}))
        settings: dict[str, Setting] = {}
        for name, setting in (fields or {}).items():
            if name in IGNORED_PARAMETERS or setting is None:
                continue
            where = f"{place}.{name}"
            parameter = method.parameters[name] if method else None
            if parameter and level == "source" and not parameter.per_source:
                rule = "is one value for all models, ignored here; it stands under the parameters of the slice or file"
                self._problems.ignore(where, rule)
                continue
            settings[name] = self._setting(setting, where, parameter.kind if parameter else None)
            if self._operator and parameter and parameter.operator_name:
                self._check_range(self._operator, parameter.operator_name, settings[name], where)
        return settings

    def _check_range(self, operator: str, parameter: str, setting: Setting, place: str) -> None:
        """The ends of a gradient are checked: between them the values lie in the same range."""
        spec = OPERATOR_SPECS[operator].parameters.get(parameter)
        for rule in setting if spec else ():
            for value in rule.values:
                if parameter == "density" and value == 0:
                    continue  # the model takes no part; see `numbers`
                if spec and (problem := spec.problem(value)):
                    self._report(place, problem)

    def _setting(self, value: object, place: str, kind: Kind | None) -> Setting:
        items = [value] if isinstance(value, Mapping) else value
        if not isinstance(items, list) or not any(isinstance(item, Mapping) for item in items):
            return (Rule(self._values(value, place, kind)),)
        rules = []
        for index, item in enumerate(items):
            where = f"{place}[{index}]" if isinstance(value, list) else place
            fields = self._problems.mapping(item, where, ("filter", "value"))
            if fields is None:
                continue
            if "value" not in fields:
                self._report(where, "'value' is missing")
                continue
            pattern = fields.get("filter")
            if not isinstance(pattern, str | None):
                self._report(f"{where}.filter", f"part of a tensor's name is needed, got {shorten(pattern)}")
                continue
            values = self._values(fields["value"], f"{where}.value", kind)
            rules.append(Rule(values, None if pattern == "*" else pattern))
        return tuple(rules)

    def _values(self, value: object, place: str, kind: Kind | None) -> tuple[Scalar, ...]:
        items = value if isinstance(value, list) else [value]
        scalars = [self._scalar(item, place, kind) for item in items]
        return tuple(scalar for scalar in scalars if scalar is not None)

    def _scalar(self, value: object, place: str, kind: Kind | None) -> Scalar | None:
        """A number, also as text (YAML reads `1e-5` as text), a boolean, also as 0 or 1, or a word."""
        if kind is None:
            return 0.0  # the method is unknown, and reported
        if kind == "choice":
            if isinstance(value, str):
                return value
            self._report(place, f"a word is needed, got {shorten(value)}")
            return None
        if kind == "bool":
            if value in ("true", "false", "True", "False"):
                return str(value).lower() == "true"
            if isinstance(value, bool | int | float) and value in (0, 1):
                return bool(value)
            self._report(place, f"true or false is needed, got {shorten(value)}")
            return None
        number = _number(value)
        if number is None or (kind == "int" and not number.is_integer()):
            self._report(place, f"a {'whole' if kind == 'int' else 'finite'} number is needed, got {shorten(value)}")
            return None
        return int(number) if kind == "int" else number


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
