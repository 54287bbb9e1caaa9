"""Options of commands, made from the fields of configs: a name, a default, a bound and a help text stand once.

    @with_config_options
    def train(out: ..., config: TrainConfig): ...

is a command with an option for each field of `TrainConfig` that was declared with `base.config.option`, and is called
with the config that was built from them.

Why not a library: with pydantic-settings' `CliApp` and with tyro an invalid value ends in pydantic's traceback or its
raw text under the field's name, and neither joins a tree of typer commands with arguments, panels and places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from simmerge_ray.base.config import check_config
from simmerge_ray.base.storage import RemotePath
from simmerge_ray.cli.places import PathOrUri, path_option, place_option

Returned = TypeVar("Returned")
LogOption = Annotated[Path, typer.Option("--log", help="where the output of libraries goes")]
DEFAULT_LOG = Path("simmerge.log")
_TYPES = (bool, int, float, str, Path)
_MAKERS: dict[Any, Callable[..., Any]] = {PathOrUri: place_option, Path: path_option}


def with_config_options(command: Callable[..., Returned]) -> Callable[..., Returned]:
    """Let a command be called with options instead of the configs that are its parameters."""
    hints = get_type_hints(command, include_extras=True)
    configs: dict[str, type[BaseModel]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if inspect.isclass(hint) and issubclass(hint, BaseModel):
            configs[parameter.name] = hint
            parameters += _parameters(hint)
        else:
            parameters.append(parameter.replace(annotation=hint))

    @wraps(command)
    def with_options(**values: Any) -> Returned:
        for name, model in configs.items():
            values[name] = _config(model, values)
        return command(**values)

    set_parameters(with_options, *parameters)
    return with_options


def set_parameters(command: Callable[..., Any], *parameters: inspect.Parameter) -> None:
    """Say what typer calls a command with."""
    by_keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    command.__signature__ = inspect.Signature(by_keyword)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _config(model: type[BaseModel], values: dict[str, Any]) -> BaseModel:
    """Take the fields' values out of the options (ConfigError: a line for each wrong one); paths become absolute."""
    flags = {name: str(about["flag"]) for name, _, about in _options(model)}
    given = {name: value for name in flags if (value := values.pop(name)) is not None}
    given |= {name: value.resolve() for name, value in given.items() if isinstance(value, Path)}
    return check_config(model, given, "options", flags)


def changed_options(config: BaseModel) -> list[str]:
    """Flags of the options whose value is not the default."""
    known = [(name, field, about["flag"]) for name, field, about in _options(type(config)) if not field.is_required()]
    return [flag for name, field, flag in known if getattr(config, name) != field.default]


def _options(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo, dict[str, Any]]]:
    """Name and field, with the arguments of `base.config.option`."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and isinstance(about := extra.get("option"), dict):
            yield name, field, about | {"flag": f"--{about['flag'] or name.replace('_', '-')}"}


def _parameters(model: type[BaseModel]) -> Iterator[inspect.Parameter]:
    """What typer sees instead of the config; an option without a value of its own is None, and left to the config."""
    for name, field, about in _options(model):
        flag, kind, default = about["flag"], _typer_type(field.annotation), about["shown"] or field.default
        if isinstance(default, tuple):
            default = list(default) or None
        elif field.is_required():
            default = inspect.Parameter.empty
        shown: dict[str, Any] = {"help": field.description, "rich_help_panel": about["panel"]}
        if kind in (int, float):
            shown |= {"min": _bound(field, "ge"), "max": _bound(field, "le")}
        if kind is bool and default:
            flag += f"/--no-{flag.removeprefix('--')}"
        make = _MAKERS.get(kind, typer.Option)
        hint: Any = Annotated[kind | None if default is None else kind, make(flag, **shown)]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _bound(field: FieldInfo, kind: str) -> float | None:
    return next((getattr(rule, kind) for rule in field.metadata if hasattr(rule, kind)), None)


def _typer_type(hint: Any) -> Any:
    """What typer parses: a value of its own types, a list of them, or text, which the config parses."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [argument for argument in arguments if argument is not NoneType]
        if RemotePath in kinds:
            return PathOrUri
        (hint,) = kinds
        return _typer_type(hint)
    if origin is tuple and arguments[-1] is Ellipsis:
        return list[_typer_type(arguments[0])]  # type: ignore[misc]
    return hint if hint in _TYPES or origin is Literal else str
