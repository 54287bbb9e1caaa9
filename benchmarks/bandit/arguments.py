"""What the bandit's benchmarks take on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.measuring import script_parser


def arguments_of(text: str | None, orders: int, rounds: int) -> argparse.ArgumentParser:
    parser = script_parser(text)
    parser.add_argument("dataset", type=Path, help="a finished demo, or a data set as `simmerge train` takes it")
    parser.add_argument("--arm", action="append", help="an arm to choose from, may be repeated; all that are common")
    parser.add_argument("--orders", type=int, default=orders)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser
