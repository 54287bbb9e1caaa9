"""Do the pages of the studies say what their published labels and signals give? Computes every number anew.

    python jobs/study_report.py
    python jobs/study_report.py study.md --cache /tmp/study-report

Minutes on two cores; what was computed is kept in `--cache` until the data or the code changes, and then it takes
seconds. A number that the page has otherwise is a line (place, what the page says, what was computed), and the
exit code is 2. The last line is JSON that reports what happened (`simmerge_ray.pipelines.jobs`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simmerge_ray.cli.app import run_as_job
from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.places import path_option


@with_job_line("study_report")
def study_report(
    page: Annotated[list[str] | None, typer.Argument(help="pages of the directory, default: all studies'")] = None,
    docs: Annotated[Path, path_option(help="directory of the pages and of what is published")] = Path("docs"),
    cache: Annotated[Path, path_option(help="directory of what was computed")] = Path("build/study-report"),
    fill: Annotated[bool, typer.Option(help="write the blocks of pages that are made from data anew")] = False,
    unchecked: Annotated[bool, typer.Option(help="list the numbers that nothing is computed for")] = False,
) -> dict[str, Any]:
    from simmerge_ray.pipelines.study_report import check_pages

    found = check_pages(docs, page or (), cache, print, fill=fill)
    for name, checked in found.items():
        for mismatch in checked.mismatches:
            print(f"{docs / name}: {mismatch}")
        for line, number in checked.unchecked if unchecked else ():
            print(f"{docs / name}: line {line}: {number} is not computed")
        print(
            f"{docs / name}: {checked.num_values} values compared, {len(checked.mismatches)} differ, "
            f"{len(checked.unchecked)} numbers are not computed from what is published"
        )
    differ = sum(len(checked.mismatches) for checked in found.values())
    return {"differ": differ, "exit_code": 2 if differ else 0}


if __name__ == "__main__":
    run_as_job(study_report, __doc__)
