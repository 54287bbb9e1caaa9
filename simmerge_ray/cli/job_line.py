"""`--job-line`: a command ends as a job does, with a line of JSON that reports what happened (`pipelines.jobs`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, TypeAlias

import typer
from typer.models import ArgumentInfo

from simmerge_ray.cli.options import DEFAULT_LOG, set_parameters

Results: TypeAlias = Mapping[str, Any] | None
_HELP = "end with a line of JSON that reports what happened, like a script in jobs/, and show what libraries print"


def with_job_line(name: str, *outputs: str) -> Callable[[Callable[..., Results]], Callable[..., None]]:
    """Add `--job-line` to a command that returns what the line reports; `exit_code` in it is the command's exit code.

    Args:
        name: of the job.
        outputs: parameters that name where results go; a place that a submitted job would lose is refused.
    """

    def decorate(command: Callable[..., Results]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters
        shown = {output: _shown_name(parameters[output]) for output in outputs}

        @wraps(command)
        def with_line(job_line: bool = False, **values: Any) -> None:
            if not job_line:
                raise typer.Exit((command(**values) or {}).get("exit_code", 0))
            from simmerge_ray.pipelines.jobs import output_place, run_job

            def work() -> Mapping[str, Any]:
                for output, shown_name in shown.items():
                    if values[output] is not None:
                        values[output] = output_place(values[output], shown_name)
                if values.get("log") == DEFAULT_LOG:
                    values["log"] = None
                return command(**values) or {}

            raise typer.Exit(run_job(name, work))

        option = Annotated[bool, typer.Option("--job-line", help=_HELP)]
        last = inspect.Parameter("job_line", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        set_parameters(with_line, *parameters.values(), last)
        return with_line

    return decorate


def _shown_name(parameter: inspect.Parameter) -> str:
    is_argument = any(isinstance(part, ArgumentInfo) for part in parameter.annotation.__metadata__)
    return parameter.name.upper() if is_argument else f"--{parameter.name.replace('_', '-')}"
