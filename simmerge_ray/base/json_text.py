"""JSON that somebody else wrote, with limits: nothing that it says can exhaust the memory, the stack or the patience.

The module `json` takes more than JSON (NaN, UTF-16, half a surrogate pair), and ends in a RecursionError or an
OverflowError where text is hostile. Here all that is one error.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_JSON_BYTES = 1 << 26  # the largest tokenizers have 33 MB
_MAX_VALUES = 5_000_000  # of Python objects, which take ten times the room of their text; those have 2 million
_MAX_DEPTH = 64
_MAX_DIGITS = 40  # tokenizers write 10**30 for "no limit"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """Text that is not JSON, or beyond a limit. The message starts with `not JSON` and gives the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not JSON ({reason})")


def parse_json(data: bytes | str, checks_values: bool = True) -> Any:
    """The value: UTF-8, at most 64 MB and 64 levels, all numbers finite, no integer longer than 40 digits.

    checks_values: False is for a caller that looks at every value anyhow: depth and digits are left to it, which halves
    the time.

    Raises JsonError.
    """
    if len(data) > MAX_JSON_BYTES:
        raise JsonError(f"{len(data)} bytes; at most {MAX_JSON_BYTES} are read")
    if isinstance(data, bytes):
        try:
            data = data.decode()
        except UnicodeDecodeError as error:
            raise JsonError(f"byte {error.start} is no UTF-8") from None
    containers = data.count("[") + data.count("{")
    if containers + data.count(",") > _MAX_VALUES:
        raise JsonError(f"more than {_MAX_VALUES} values")
    try:
        value = json.loads(
            data,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer if checks_values else None,
        )
    except RecursionError:
        raise JsonError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise JsonError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except JsonError:
        raise
    except ValueError as error:  # more digits than Python reads
        raise JsonError(str(error)) from None
    if checks_values and containers > _MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JsonError("half a surrogate pair, which is no character") from None
    return value


_TOO_DEEP = f"nested deeper than {_MAX_DEPTH} levels"


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise JsonError(_TOO_DEEP)


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JsonError(f"{digits[:_MAX_DIGITS]} is too large for a number")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise JsonError(f"an integer of {len(digits)} digits; at most {_MAX_DIGITS} are read")
    return int(digits)
