"""Tasks, metrics, and the interface of an evaluator. No torch.

A task is a JSONL file `<task>.jsonl`, one item a line: `{"prompt": "...", "target": "..."}`, optionally with `"metric"`
(the same in every line). Utilities are in [0, 1], higher is better.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from simmerge_ray.errors import TaskError, unknown_name
from simmerge_ray.plans import ResolvedPlan
from simmerge_ray.storage import digest_json, read_jsonl


@dataclass(frozen=True)
class Item:
    """One evaluation item: the prompt, and what should be generated."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Task:
    """Items with one metric; answers are generated greedily until the end-of-text token or `max_new_tokens`."""

    name: str
    items: tuple[Item, ...]
    metric: str = "exact_match"
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if not self.items:
            raise TaskError(f"task {self.name!r} has no items")
        if self.metric not in METRICS:
            raise TaskError(f"task {self.name!r}: {unknown_name('metric', self.metric, METRICS)}")

    @property
    def digest(self) -> str:
        """Identity of items, metric and generation settings."""
        return digest_json(
            [self.name, self.metric, self.max_new_tokens, [[item.prompt, item.target] for item in self.items]]
        )

    def score(self, answers: Sequence[str]) -> np.ndarray:
        """Utility of each answer, (num_items,) float64 in [0, 1]."""
        metric = METRICS[self.metric]
        pairs = zip(answers, self.items, strict=True)
        return np.array([metric(answer, item.target) for answer, item in pairs], dtype=np.float64)


def exact_match(answer: str, target: str) -> float:
    """1 if the answer is the target, surrounding white space aside."""
    return float(answer.strip() == target.strip())


def contains(answer: str, target: str) -> float:
    """1 if the target occurs in the answer."""
    return float(target.strip() in answer)


def numeric(answer: str, target: str) -> float:
    """1 if the last number in the answer equals the target as a number."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))
    return float(bool(numbers) and float(numbers[-1]) == float(target.replace(",", "")))


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "numeric": numeric,
}


class Evaluator(Protocol):
    """Holds one model of the catalogue's architecture and answers prompts with it.

    `name` is written into every label. `load` puts the weights of a plan into it, and raises `EngineError` when it
    cannot vouch for what it then holds. `generate` answers greedily: same weights, same answers.
    """

    name: str

    def load(self, resolved: ResolvedPlan) -> None: ...

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]: ...


def evaluate(evaluator: Evaluator, task: Task) -> np.ndarray:
    """Per-item utilities (num_items,) of the loaded weights on a task."""
    return task.score(evaluator.generate([item.prompt for item in task.items], task.max_new_tokens))


def load_task(path: Path) -> Task:
    """Read one task file.

    Raises:
        TaskError: unreadable or empty, or a line without prompt or target, with its number.
    """
    items: list[Item] = []
    settings: dict[str, object] = {}
    for number, row in read_jsonl(path, TaskError):
        for key in ("prompt", "target"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise TaskError(
                    f"{path}, line {number}: an item needs a non-empty string under {key!r}, got {row.get(key)!r}"
                )
        for key in row.keys() - {"prompt", "target"}:
            if key not in ("metric", "max_new_tokens"):
                known = ("prompt", "target", "metric", "max_new_tokens")
                raise TaskError(f"{path}, line {number}: {unknown_name('key', key, known)}")
            if settings.setdefault(key, row[key]) != row[key]:
                raise TaskError(f"{path}, line {number}: {key!r} is {row[key]!r}, earlier lines say {settings[key]!r}")
        items.append(Item(row["prompt"], row["target"]))
    if not items:
        raise TaskError(f'{path} holds no items; write one {{"prompt": ..., "target": ...}} a line')
    metric, max_new_tokens = settings.get("metric", "exact_match"), settings.get("max_new_tokens", 16)
    if not isinstance(metric, str):
        raise TaskError(f"{path}: 'metric' must be a string, got {metric!r}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise TaskError(f"{path}: 'max_new_tokens' must be a positive integer, got {max_new_tokens!r}")
    return Task(path.stem, tuple(items), metric, max_new_tokens)


def load_tasks(directory: Path) -> dict[str, Task]:
    """All `<task>.jsonl` files of a directory, by task.

    Raises:
        TaskError: there is none, or one is malformed.
    """
    paths = sorted(directory.glob("*.jsonl"))
    if not paths:
        raise TaskError(f"{directory} holds no <task>.jsonl task files")
    return {path.stem: load_task(path) for path in paths}
