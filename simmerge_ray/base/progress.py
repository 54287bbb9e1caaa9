"""What a person sees while it works: one line a stage with its seconds, a bar on what takes long; the rest in a file.

Libraries write to file descriptors 1 and 2 from Python and from C++, so these are redirected into the log file for
the time of a run, and the lines for the person go to a copy of the original standard output.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from simmerge_ray.base.errors import OutputError
from simmerge_ray.base.tables import TextTable

Report = Callable[[int, int], None]
StatusReport = Callable[[int, int, str], None]
_SECONDS_BETWEEN_LINES = 60.0


class Narrator:
    """Prints stages to a console. `silent()` makes one that prints nothing, for library use and tests.

    wide: tables have all their columns, however long the lines are.
    """

    def __init__(self, console: Console, wide: bool = False) -> None:
        self.console, self._wide = console, wide

    @staticmethod
    def silent() -> Narrator:
        return Narrator(Console(quiet=True))

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def print_lines(self, lines: Iterable[str]) -> None:
        """Lines that may hold anything: no markup."""
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def table(self, table: TextTable) -> None:
        """A table as the lines have room for it."""
        table.print(self.console, self._wide)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Print the stage's line when it begins, and its result with the seconds when it ends."""
        stage = Stage(name)
        self.say(f"[bold]{name:<10}[/bold] …")
        started = time.monotonic()
        try:
            yield stage
        except BaseException as error:
            word = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
            self.say(f"[bold]{name:<10}[/bold] [red]{word}[/red] after {time.monotonic() - started:.1f} s")
            raise
        self.say(f"[bold]{name:<10}[/bold] {time.monotonic() - started:6.1f} s  {stage.result}")

    @contextmanager
    def bar(self, what: str) -> Iterator[Report]:
        """A progress bar; the block gets a function of (done, total). Away from a terminal it prints nothing."""
        with self._bar(what, MofNCompleteColumn(), TimeElapsedColumn()) as (progress, task):
            yield lambda done, total: progress.update(task, completed=done, total=total)

    @contextmanager
    def byte_bar(self, what: str) -> Iterator[Report]:
        """`bar` for bytes: how many, how fast, how long still."""
        with self._bar(what, DownloadColumn(), TransferSpeedColumn()) as (progress, task):
            yield lambda done, total: progress.update(task, completed=done, total=total)

    @contextmanager
    def status_bar(self, what: str) -> Iterator[StatusReport]:
        """`bar` with a line about how it goes. Away from a terminal that line is printed once a minute, with what is
        left of the time, as far as what has been done says it."""
        said = started = time.monotonic()
        first: int | None = None  # done when this began: found in place, so it says nothing of the time
        columns = MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[line]}")
        with self._bar(what, *columns) as (progress, task):

            def report(done: int, total: int, line: str) -> None:
                nonlocal said, first
                first = done if first is None else first
                progress.update(task, completed=done, total=total, line=line)
                if not self.console.is_terminal and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    eta = eta_text(said - started, done - first, total - done)
                    told = f"{what}: {done}/{total}, {eta}{line}".rstrip(", ")
                    self.console.print(f"           {told}", markup=False, highlight=False, soft_wrap=True)

            yield report

    @contextmanager
    def _bar(self, what: str, *columns: ProgressColumn) -> Iterator[tuple[Progress, TaskID]]:
        """A bar with what is left of the time after its first two columns."""
        first, second, *others = columns
        every = TextColumn("           {task.description}"), BarColumn(), first, second, TextColumn("eta")
        shown = (*every, TimeRemainingColumn(), *others)
        with Progress(*shown, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            yield progress, progress.add_task(what, total=None, line="")


def eta_text(seconds: float, done: int, left: int) -> str:
    """How long it will still take when so many took so many seconds; empty where nothing is known or left."""
    return f"eta {duration(seconds / done * left)}, " if done > 0 and left > 0 else ""


def duration(seconds: float) -> str:
    """Seconds in a unit that people read."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def narrated(log: Path | None, to_stderr: bool = False, wide: bool = False) -> Iterator[Narrator]:
    """A narrator on the terminal; what libraries print goes to the log file, or with None to the terminal as well.

    Args:
        to_stderr: leave standard output to the result, for programs. wide: see `Narrator`.
    """
    if log is None:
        yield Narrator(Console(stderr=to_stderr), wide)
        return
    with redirected_output(log, to_stderr) as console:
        narrator = Narrator(console, wide)
        narrator.say(f"[dim]log of libraries: {log}[/dim]")
        yield narrator


@dataclass
class Stage:
    """A stage in progress; what is put into `result` is printed at its end."""

    name: str
    result: str = ""


@contextmanager
def redirected_output(log: Path, to_stderr: bool = False) -> Iterator[Console]:
    """Send everything that libraries print to the end of `log`; yields a console on the original standard output, or
    on the original standard error. Raises OutputError: the file cannot be written."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise OutputError(f"the log {log} cannot be written: {error.strerror}; name another file with --log") from None
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    original = os.fdopen(os.dup(saved[to_stderr]), "w")
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        logging.captureWarnings(True)
        yield Console(file=original)
    finally:
        logging.captureWarnings(False)
        original.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(target)
        original.close()
        warnings.resetwarnings()
