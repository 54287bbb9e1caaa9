"""Compiled loops that need no compiler: machine code on disk, called through ctypes.

numba and the registries that its first call wakes take a second, more than most merges. Here numba compiles a loop once
for each kind of arguments, and a later process only links what lies on disk. An entry is for the CPU it was made on
(name and features), the text of the loops and the version of numba: another one is made beside it. `python -m
simmerge_ray.merging.engine.machine_code` makes what merges call; set-up does.

A loop must neither allocate nor raise: nothing of numba's runtime is there when it runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.storage import digest_bytes, write_atomically

LOOPS = Path(__file__).with_name("loops.py")
_C_TYPES: dict[str, Any] = {"?": ctypes.c_bool, "i": ctypes.c_int32, "I": ctypes.c_uint32, "l": ctypes.c_int64}
_C_TYPES |= {"L": ctypes.c_uint64, "f": ctypes.c_float, "d": ctypes.c_double, "-": None}
_ARRAY, _NOTHING, _OPEN, _CLOSE = "*", "-", "(", ")"
_LOCK = threading.RLock()  # numba and the linker
_keep: list[Any] = []  # what the linked code lies in


class Loop:
    """A function of `loops`, by its name; called like it, from any thread, without the GIL.

    Arguments: C-contiguous arrays of one dimension, NumPy or Python numbers, None, and tuples of these. It returns a
    bool or nothing.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._linked: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        kinds: list[Any] = []
        values: list[Any] = []
        for argument in arguments:
            if type(argument) is tuple:
                kinds.append(_OPEN)
                for one in argument:
                    _take(one, kinds, values)
                kinds.append(_CLOSE)
            else:
                _take(argument, kinds, values)
        kind = tuple(kinds)
        linked = self._linked.get(kind)
        if linked is None:
            with _LOCK:
                linked = self._linked[kind] = _linked(self.name, _signature(kind))
        return linked(*values)


def _take(argument: Any, kinds: list[Any], values: list[Any]) -> None:
    if isinstance(argument, np.ndarray):
        if argument.ndim != 1 or not argument.flags.c_contiguous:
            raise TypeError(f"a loop takes contiguous arrays of one dimension, not {argument.shape}")
        kinds.append(argument.dtype)
        values += (argument.ctypes.data, argument.size)
    elif argument is None:
        kinds.append(None)
    else:
        kinds.append(type(argument))
        values.append(argument)


def _signature(kind: tuple[Any, ...]) -> str:
    """Such as `H*H*ff?H*`: two arrays of uint16, two float32, a bool, an array."""

    def letters() -> Iterator[str]:
        for one in kind:
            if isinstance(one, np.dtype):
                yield one.char + _ARRAY
            else:
                yield _NOTHING if one is None else one if isinstance(one, str) else np.dtype(one).char

    return "".join(letters())


def _linked(name: str, signature: str) -> Callable[..., Any]:
    file = _directory() / f"{name}-{digest_bytes(signature.encode(), _made_by().encode())[:20]}.code"
    try:
        head, _, code = file.read_bytes().partition(b"\n")
        about = json.loads(head)
        if hashlib.blake2b(code).hexdigest() != about["digest"]:
            raise ValueError("damaged")
    except (OSError, ValueError, KeyError, TypeError):
        about, code = _compiled(name, signature)
        with suppress(OSError):  # a place that cannot be written to: compiled again by the next process
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(about).encode() + b"\n" + code)
    return _link(about, code, signature)


@cache
def _made_by() -> str:
    """What machine code depends on, but for the kind of arguments."""
    import llvmlite.binding as llvm

    cpu = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return json.dumps([digest_bytes(LOOPS.read_bytes()), version("numba"), version("llvmlite"), *cpu])


@cache
def _directory() -> Path:
    """Beside the loops, or in the user's cache where that cannot be written to."""
    beside = LOOPS.parent / "__pycache__"
    with suppress(OSError):
        beside.mkdir(exist_ok=True)
        (probe := beside / "writable").touch()
        probe.unlink(missing_ok=True)
        return beside
    return Path("~/.cache/simmerge_ray/code").expanduser()


def _link(about: dict[str, Any], code: bytes, signature: str) -> Callable[..., Any]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for symbol in about["never_called"]:
        llvm.add_symbol(symbol, ctypes.cast(_never_called, ctypes.c_void_p).value)
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=llvm.get_host_cpu_name())
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _keep.append(engine)
    given: list[Any] = []
    for letter in signature:
        if letter == _ARRAY:
            given[-1:] = [ctypes.c_void_p, ctypes.c_ssize_t]
        elif letter not in (_NOTHING, _OPEN, _CLOSE):
            given.append(_C_TYPES.get(letter))
    return ctypes.CFUNCTYPE(_C_TYPES[about["returns"]], *given)(engine.get_function_address(about["symbol"]))


@ctypes.CFUNCTYPE(None)
def _never_called() -> None:
    """In the place of numba's runtime, which is named in code for errors and for freeing what a loop never takes."""


def _compiled(name: str, signature: str) -> tuple[dict[str, Any], bytes]:
    """Machine code of a loop with C arguments, and what `_link` must know of it."""
    from numba import carray, types
    from numba.core import codegen
    from numba.core.ccallback import CFunc
    from numba.np.numpy_support import from_dtype

    from simmerge_ray.merging.engine import loops

    given: list[Any] = []
    call: list[str] = []
    for letter in signature.replace(_OPEN, " ( ").replace(_CLOSE, " ) ").replace(_NOTHING, " - "):
        number = len(given)
        if letter == _ARRAY:
            given[-1:] = [types.CPointer(given[-1]), types.intp]
            call[-1] = f"carray(a{number - 1}, (a{number},)),"
        elif letter in (_OPEN, _CLOSE):
            call.append("(" if letter == _OPEN else "),")
        elif letter == _NOTHING:
            call.append("None,")
        elif letter != " ":
            given.append(from_dtype(np.dtype(letter)))
            call.append(f"a{number},")
    names = ", ".join(f"a{number}" for number in range(len(given)))
    scope = {"carray": carray, "loop": getattr(loops, name)}
    exec(f"def with_pointers({names}):\n    return loop({' '.join(call)})", scope)

    returns = {"None": types.void, "bool": types.boolean}[scope["loop"].py_func.__annotations__["return"]]
    function = CFunc(scope["with_pointers"], (tuple(given), returns), {}, {"nopython": True})

    class Library(codegen.JITCodeLibrary):  # one that keeps its machine code
        def finalize(self) -> None:
            self.enable_object_caching()
            super().finalize()

    before, codegen.JITCPUCodegen._library_class = codegen.JITCPUCodegen._library_class, Library
    try:
        function.compile()
    finally:
        codegen.JITCPUCodegen._library_class = before
    code = function._library._get_compiled_object()
    runtime = sorted({one.decode() for one in re.findall(rb"(?<=\0)(?:NRT|numba)_\w+(?=\0)", code)})
    assert not any("alloc" in one.lower() for one in runtime), f"{name} allocates: {runtime}"
    about = {"symbol": function._wrapper_name, "returns": "?" if returns == types.boolean else _NOTHING}
    return about | {"never_called": runtime, "digest": hashlib.blake2b(code).hexdigest()}, code
