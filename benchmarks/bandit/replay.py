"""Sixty rounds of an unseen domain: regret of the bandit beside policies that do not learn, replayed from labels.

`python -m benchmarks.bandit.replay DATASET --out DIR [--arm LABEL ...] [--orders 40] [--rounds 60] [--name NAME]`,
where DATASET is the directory of a finished `simmerge demo`, or labels of several bases; see
`simmerge_ray.research.bandit.regret`. Prints a table, writes `NAME.json` and the curves `NAME.png`.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.bandit.arguments import arguments_of
from simmerge_ray.research.bandit.regret import markdown, replay_dataset


def main() -> None:
    parser = arguments_of(__doc__, orders=40, rounds=60)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="bandit-replay")
    given = parser.parse_args()
    rows = replay_dataset(given.dataset, given.out, given.name, given.arm, given.orders, given.rounds)
    print(*markdown(rows), sep="\n")


if __name__ == "__main__":
    main()
