"""The weights and parameters of one operator at one tensor, as plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simmerge_ray.merging.graph import Number
from simmerge_ray.merging.mergekit.documents import MergekitDocument, Parameters, Source, resolve
from simmerge_ray.merging.mergekit.methods import METHODS, MethodParameter
from simmerge_ray.plans.operators.gradients import Scalar
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS

_MIN_SUM = 1e-8
Params = tuple[tuple[str, Number | tuple[float, ...]], ...]


@dataclass(frozen=True)
class Numbers:
    """Resolves the parameters of a document for one tensor.

    tensor: its name in the output, which filters of shared parameters see.
    sources: those that enter the operator, each with the name of its own tensor, which filters of its parameters see.
    report: takes the tensor and the problem.
    """

    document: MergekitDocument
    slice_parameters: Parameters
    tensor: str
    sources: tuple[tuple[Source, str], ...]
    position: float
    report: Callable[[str, str], None]

    def weights(self, params: Params) -> tuple[float, ...]:
        """One weight for each source, as our operator takes them; 1 where the method has none."""
        method = METHODS[self.document.method]
        if method.base == "first":
            t = float(self._shared("t", method.parameters["t"]) or 0.0)
            return 1.0 - t, t
        if "weight" not in method.parameters:
            return (1.0,) * len(self.sources)
        weights = tuple(float(value or 0.0) for value in self._per_source("weight", method.parameters["weight"]))
        total = sum(weights)
        if 0.0 in (densities := self._densities()):
            # A divisor counts all models, at each entry (in an election) those that are left.
            normalize = self._shared("normalize", method.parameters["normalize"]) and not method.elects
            divisor = total if normalize and abs(total) > _MIN_SUM else 1.0
            return tuple(0.0 if not d else w / divisor for w, d in zip(weights, densities, strict=True))
        if method.zero_sum == "halves":
            t = 0.5 if abs(total) < 1e-6 else weights[1] / total
            return 1.0 - t, t
        vanishes = abs(total) <= _MIN_SUM * max(1.0, sum(map(abs, weights)))
        if method.zero_sum == "error" and vanishes and dict(params).get("normalize", True) is not False:
            self.report(self.tensor, "weight: the weights add up to 0, and normalizing divides by their sum")
        return weights

    def params(self) -> Params:
        """All parameters of our operator, by name; a tuple where they differ between the sources."""
        operator = self.document.method
        spec = OPERATOR_SPECS[operator]
        params: dict[str, Number | tuple[float, ...]] = {}
        for name, parameter in METHODS[operator].parameters.items():
            if parameter.operator_name is None:
                continue
            values = self._per_source(name, parameter) if parameter.per_source else [self._shared(name, parameter)]
            kept = [value for value in values if value is not None]
            if len(kept) < len(values):
                continue  # no default and not given: the operator goes without it
            if parameter.operator_name not in spec.parameters:
                if any(value != parameter.default for value in kept):
                    self.report(self.tensor, f"{name}: {kept[0]!r} is not supported by {operator!r} here")
                continue
            params[parameter.operator_name] = kept[0] if len(set(kept)) == 1 else tuple(float(v) for v in kept)
        if 0.0 in (densities := self._densities()):
            params["density"] = tuple(density or 1.0 for density in densities)
            params["normalize"] = bool(params["normalize"]) and METHODS[operator].elects
        own = {parameter.operator_name for parameter in METHODS[operator].parameters.values()}
        params |= {name: one.default for name, one in spec.parameters.items() if name not in own}
        self._check_della(params)
        return tuple(sorted(params.items()))

    def _densities(self) -> tuple[float, ...]:
        """Where 0 the model takes no part: weight 0 says so, with a density that keeps everything."""
        parameter = METHODS[self.document.method].parameters.get("density")
        if parameter is None or parameter.operator_name is None:
            return ()
        return tuple(float(value or 0.0) for value in self._per_source("density", parameter))

    def _check_della(self, params: dict[str, Number | tuple[float, ...]]) -> None:
        if "epsilon" not in params or "density" not in params:
            return
        for density, epsilon in zip(self._spread(params["density"]), self._spread(params["epsilon"]), strict=True):
            if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                self.report(self.tensor, f"epsilon: density {density:g} +- epsilon {epsilon:g} leaves (0, 1)")

    def _spread(self, value: Number | tuple[float, ...]) -> tuple[float, ...]:
        return value if isinstance(value, tuple) else (float(value),) * len(self.sources)

    def _shared(self, name: str, parameter: MethodParameter) -> Scalar | None:
        scopes = (self.slice_parameters, self.document.parameters)
        return self._checked(name, parameter, resolve(scopes, name, self.tensor, self.position))

    def _per_source(self, name: str, parameter: MethodParameter) -> list[Scalar | None]:
        values = []
        for source, tensor in self.sources:
            scopes = (source.parameters, self.slice_parameters, self.document.parameters)
            values.append(self._checked(name, parameter, resolve(scopes, name, tensor, self.position)))
        return values

    def _checked(self, name: str, parameter: MethodParameter, value: Scalar | None) -> Scalar | None:
        if value is None:
            if parameter.required:
                self.report(
                    self.tensor, f"{name}: no value for some tensors (no filter matches, and there is no default)"
                )
            return parameter.default
        if parameter.kind == "int" and not isinstance(value, bool):
            if not float(value).is_integer():
                self.report(self.tensor, f"{name}: the gradient gives {value:g}, a whole number is needed")
            return int(value)
        return value
