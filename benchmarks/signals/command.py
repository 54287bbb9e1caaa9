"""The command line of the scripts that measure a finished run and draw one figure of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import script_parser


def figure_command(
    description: str | None,
    name: str,
    measure: Callable[[Path, int], dict[str, Any]],
    lines: Callable[[dict[str, Any]], Sequence[str]],
    draw: Callable[[dict[str, Any], Path], Path],
) -> None:
    """Measure the run named on the command line, print lines, write the figure and `name` with the results as JSON."""
    parser = script_parser(description)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = measure(arguments.run, arguments.seed)
    print("\n".join(lines(results)))
    print(draw(results, arguments.out / "figures"))
    (arguments.out / "figures" / name).write_text(json.dumps(results) + "\n")
