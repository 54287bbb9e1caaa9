"""What is wrong with the values of a config, a line each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from simmerge_ray.base.errors import ConfigError, problem_list, shown_value

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # it has no public name


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that is one, may be one, or is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def problem_lines(error: ValidationError, model: type[BaseModel], flags: Mapping[str, str]) -> list[str]:
    """One line a problem: where, value, rule, and the nearest known key for an unknown one."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        where = flags.get(str(next(iter(problem["loc"]), "")), repr(key))
        if problem["type"] == "extra_forbidden":
            owner: type[BaseModel] = model
            for part in problem["loc"][:-1]:
                if str(part) in owner.model_fields:
                    owner = _model_in(owner.model_fields[str(part)].annotation) or owner
            known = sorted(owner.model_fields)
            near = difflib.get_close_matches(str(problem["loc"][-1])[:100], known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            lines.append(f"unknown key {where}{hint}; known: {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"key {where} is missing")
        else:
            got = "" if problem["type"] == "value_error" else f", got {shown_value(problem['input'])}"
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}{got}")
    return lines


class ToldPlainly(ModelMetaclass):
    """A config that is made by hand, `sm.FindConfig(ways="x")`, is refused as one from a file or from options is."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            lines = problem_lines(error, cls, {})  # type: ignore[arg-type]
            raise ConfigError(problem_list(f"{cls.__name__}:", lines)) from None
