"""python -m benchmarks.finding OUT [--zoo DIR] [--only PART] [--skip PART]: is choosing a merge worth it?

Makes the demo's zoo (unless it is given, or there), runs all parts, and writes `OUT/finding.json` and
`OUT/finding.md`. Every measurement is kept as soon as it is made: interrupt it, and the same command goes on. Parts may
run at once in processes of their own (`--only`, one writer each); `--only report` writes what is there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks.measuring import machine, pin_threads, script_parser, write_result

REPORT = "report"


def main() -> None:
    pin_threads(1)
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--zoo", type=Path, help="default: OUT/zoo, made if it is not there")
    parser.add_argument("--only", action="append", default=[], help="a part; repeatable")
    parser.add_argument("--skip", action="append", default=[], help="a part; repeatable")
    parser.add_argument("--minutes", type=float, help="after which nothing new is measured; 0: only what is kept")
    parser.add_argument("--budget", type=int, default=40, help="most evaluations of a sampler")
    parser.add_argument("--tuning", action="append", default=[], help="a tuning; repeatable; default: all")
    arguments = parser.parse_args()

    from benchmarks.finding.kept import OutOfTimeError
    from benchmarks.finding.parts import PARTS, Campaign
    from benchmarks.finding.report import written_report
    from benchmarks.finding.tuned import TUNINGS

    for name in (*arguments.only, *arguments.skip):
        if name not in (*PARTS, REPORT):
            parser.error(f"unknown part {name!r}; known: {', '.join((*PARTS, REPORT))}")
    for name in arguments.tuning:
        if name not in TUNINGS:
            parser.error(f"unknown tuning {name!r}; known: {', '.join(TUNINGS)}")
    out: Path = arguments.out
    zoo = arguments.zoo or _made_zoo(out / "zoo")
    chosen = [name for name in (arguments.only or PARTS) if name not in arguments.skip and name != REPORT]
    writer = "-".join(chosen).replace(" ", "_").replace(",", "") if arguments.only else "all"
    until = None if arguments.minutes is None else time.time() + 60 * arguments.minutes
    campaign = Campaign(zoo, out, writer[:80], until, arguments.budget, tuple(arguments.tuning or TUNINGS))
    for name in chosen:
        began = time.perf_counter()
        try:
            figures = PARTS[name](campaign)
        except OutOfTimeError:
            continue
        write_result(_part_file(out, name), {"figures": figures, "seconds": round(time.perf_counter() - began)})
    figures = {
        name: json.loads(_part_file(out, name).read_text())["figures"]
        for name in PARTS
        if _part_file(out, name).exists()
    }
    text, rows = written_report(figures)
    write_result(out / "finding.json", {"rows": rows, "figures": figures})
    (out / "finding.md").write_text(text + f"\n\nMachine of the report: {json.dumps(machine())}\n")
    print(text)


def _part_file(out: Path, name: str) -> Path:
    return out / "parts" / f"{name.replace(' ', '_').replace(',', '')}.json"


def _made_zoo(directory: Path) -> Path:
    """The demo's zoo, trained where it is not."""
    from simmerge_ray.pipelines.zoo import make_zoo

    make_zoo(directory)
    return directory


if __name__ == "__main__":
    main()
