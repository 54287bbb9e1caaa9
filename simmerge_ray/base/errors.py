"""Every error that this package raises on purpose.

An `InputError` (a ValueError; exit code 2) says that what the user gave does not fit; all others end with exit code 1.
A trial that fails is not an error but a value: `labels.Infeasible`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SimmergeError(Exception):
    """Base of all errors of this package."""


class InputError(SimmergeError, ValueError):
    """What the user gave does not fit; the message names the thing, its value, the rule and the choices."""


class ConfigError(InputError):
    """A config file or an option is wrong."""


class CheckpointError(InputError):
    """A checkpoint is missing or cannot be read."""


class IncompatibleCheckpointsError(CheckpointError):
    """Checkpoints differ in architecture, shapes or tokenizer, so they cannot be merged."""


class ProbeError(InputError):
    """A probe file is missing, empty or malformed."""


class OperatorError(InputError):
    """An unknown merge operator, an unknown parameter, a value out of range, or a missing base."""


class PlanError(InputError):
    """A merge plan is malformed or names checkpoints that are not there."""


class OutputError(InputError):
    """The target of a result exists, cannot be written, or has too little space."""


class TaskError(InputError):
    """An evaluation task is missing, empty or malformed."""


class LabelError(InputError):
    """A label store cannot be read, or holds too few labels for what was asked."""


class SelectorError(InputError):
    """A selector artifact cannot be loaded, or the features given do not fit it."""


class BanditError(InputError):
    """An arm, a context or a reward that the bandit cannot take."""


class MissingLibraryError(InputError):
    """An optional library is not installed; the message names the extra that brings it."""


class ClientError(SimmergeError):
    """A call to the service failed. status: of HTTP; None where there was no answer. detail: what was said."""

    def __init__(self, status: int | None, detail: str) -> None:
        super().__init__(detail if status is None else f"{detail} ({status})")
        self.status, self.detail = status, detail


class RefusedError(ClientError, InputError):
    """A request does not fit; sending it again will not help."""


class UnavailableError(ClientError):
    """The service could not be reached, or could not answer now. retry_after: seconds after which another try may be
    answered; None: another try will not help."""

    def __init__(self, status: int | None, detail: str, retry_after: float | None = None) -> None:
        super().__init__(status, detail)
        self.retry_after = retry_after


class EngineError(SimmergeError, RuntimeError):
    """An inference engine does not hold the weights that it was given; its results cannot be trusted."""


class ClusterError(SimmergeError, RuntimeError):
    """Ray did not start on this machine, or its cluster did not take this process."""


class WorkerError(SimmergeError, RuntimeError):
    """Workers of a cluster died again and again, at the same work; what was finished is kept."""


class StoreError(SimmergeError, RuntimeError):
    """The event log cannot be read or written now: nothing was acknowledged, and the message says why."""


class StorageError(SimmergeError):
    """A place cannot be read or written, after all tries. Never a reason to call a checkpoint or a merge unusable."""


class AccessError(StorageError):
    """A store refuses the credentials, or there are none; it is not tried again."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that is not in a table: what, value, nearest choice, all choices."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1) if len(name) <= _MAX_SHOWN else []  # its time is quadratic
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {kind} {shown_value(name)}{hint}; known: {', '.join(choices) if choices else 'none'}"


_MAX_SHOWN, _MAX_LINE, _MAX_PROBLEMS = 200, 2000, 20


def shown_value(value: object) -> str:
    """A value that somebody gave, as `repr` writes it; the middle of a long one is left out."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]}...{text[-_MAX_SHOWN // 4 :]}"


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line that is not long; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_MAX_SHOWN]


def problem_list(title: str, problems: Iterable[str]) -> str:
    """A message of a title and different problems, one a line: the first twenty, and how many more there are."""
    lines = list(dict.fromkeys(problems))
    more = len(lines) - _MAX_PROBLEMS
    shown = [line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}..." for line in lines[:_MAX_PROBLEMS]]
    return "\n  ".join([*([title] if title else []), *shown, *([f"and {more} more"] if more > 0 else [])])
