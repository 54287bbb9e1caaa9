"""A directory of real tasks in miniature: the four names, short sums, about passages in `qa`."""

from __future__ import annotations

import json
from pathlib import Path

from simmerge_ray.research.second_study.real_tasks import REAL_TASKS


def write_real_tasks(directory: Path, num: int = 12, turned: bool = False) -> Path:
    """`num` training examples, half as many items and probes of each task. turned: lines in the opposite order."""
    for place, task in enumerate(REAL_TASKS):
        (directory / task).mkdir(parents=True)
        examples = [
            {"prompt": f"{task[0]}{number}+{place}=", "target": f" {number + place}"} for number in range(2 * num)
        ]
        if task == "qa":
            for one in examples:
                one["prompt"] = f"Context: a bc d e {one['prompt']}\nQuestion: f\nAnswer:"
        kinds = {
            "train": examples[:num],
            "items": examples[num : num + num // 2],
            "probes": [{"text": one["prompt"]} for one in examples[num + num // 2 :]],
        }
        for kind, rows in kinds.items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (directory / task / f"{kind}.jsonl").write_text("".join(reversed(lines) if turned else lines))
    return directory
