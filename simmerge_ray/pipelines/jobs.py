"""What the scripts in `jobs/` and `--job-line` of a command share: where results may go, and how a job reports its end.

A job ends with an exit code (0 done or nothing to do, 1 failed, 2 bad input, 3 refused, 130 interrupted) and a last
line that starts with `simmerge-job` and goes on as JSON: `job`, `status` (done, unchanged, refused, failed or
interrupted), `exit_code`, and what the job adds, such as `out`; `error` where there was one.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from simmerge_ray.base.errors import InputError, OutputError, SimmergeError
from simmerge_ray.base.storage import Place, RemotePath

LAST_LINE = "simmerge-job"
_PACKAGES = "working_dir_files"  # where Ray unpacks working directories, below the session's directory


def output_place(place: Place, option: str = "--out") -> Place:
    """An output's URI as it is, or its absolute path; `option` is what the user calls it. OutputError if it would lie
    in the working directory of a submitted job, which is a copy that Ray deletes."""
    from simmerge_ray.on_ray.resources import is_submitted

    if isinstance(place, RemotePath):
        return place
    if is_submitted() and (not place.is_absolute() or _PACKAGES in place.parts):
        raise OutputError(
            f"{option} is {str(place)!r}; under `ray job submit` the working directory is a copy that Ray deletes, so "
            "name an absolute path on a filesystem that every node sees, or a URI such as s3://bucket/run"
        )
    return place.absolute()


def run_job(name: str, work: Callable[[], Mapping[str, Any]]) -> int:
    """Run a job and print its last line; returns the exit code. work: returns what to report beside `job`, `status` and
    `exit_code`; it may set these two itself."""
    stop_on_sigterm()  # of `ray job stop`
    report: dict[str, Any] = {"job": name, "status": "done", "exit_code": 0}
    try:
        report |= work()
    except SimmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        report |= {"status": "failed", "exit_code": 2 if isinstance(error, InputError) else 1, "error": str(error)}
    except KeyboardInterrupt:
        report |= {"status": "interrupted", "exit_code": 130, "error": "run the same command again to go on"}
    except Exception as error:  # an unexpected one is reported as well
        traceback.print_exc()
        report |= {"status": "failed", "exit_code": 1, "error": f"{type(error).__name__}: {error}"}
    sys.stderr.flush()
    print(f"{LAST_LINE} {json.dumps(report, sort_keys=True)}", flush=True)
    return int(report["exit_code"])


def stop_on_sigterm() -> None:
    """SIGTERM ends like Ctrl-C: `finally` blocks run, so nothing is left behind."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
