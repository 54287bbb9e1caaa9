"""The real tasks: word problems, shell commands, translations and questions on passages, read from a directory.

    DIRECTORY/<task>/train.jsonl    {"prompt": ..., "target": ...}
    DIRECTORY/<task>/items.jsonl    the same, for evaluation alone
    DIRECTORY/<task>/probes.jsonl   {"text": ...}, prompts alone

The data are not part of the project; `benchmarks.finding.real_tasks` makes such a directory from public repositories.
A hundred training examples of each task are held out, so that recipes can be tried without a look at the items.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simmerge_ray.base.errors import InputError
from simmerge_ray.base.storage import digest_json, read_jsonl
from simmerge_ray.research.zoo.domains import Example
from simmerge_ray.search.evaluation.metrics import MEAN_PROBABILITY

NUM_HELD_OUT = 100
GENERAL = "general"  # text that belongs to no task
_NUM_PROMPT_WORDS = 3  # of a general text; the rest of it is learned


@dataclass(frozen=True)
class RealTask:
    """How a task is scored. A command or a translation is rarely met to the letter, so that a smooth metric is used."""

    name: str
    metric: str
    max_new_tokens: int

    def settings(self, metric: str) -> dict[str, object]:
        """First line of the task's file."""
        return {"settings": {"metric": metric, "max_new_tokens": self.max_new_tokens, "stop": ["\n"]}}


REAL_TASKS: Mapping[str, RealTask] = {
    task.name: task
    for task in (
        RealTask("math", "exact_match", 32),
        RealTask("bash", MEAN_PROBABILITY, 40),
        RealTask("translation", MEAN_PROBABILITY, 48),
        RealTask("qa", "exact_match", 24),
    )
}


@dataclass(frozen=True)
class RealData:
    """The files of a directory. Raises InputError where one is missing or has other lines."""

    directory: Path

    def path(self, task: str, kind: str) -> Path:
        return self.directory / task / f"{kind}.jsonl"

    def items(self, task: str) -> list[Example]:
        return self._examples(task, "items")

    def probes(self, task: str, num: int) -> list[str]:
        """A random sample of `num`, the same whatever the order of the lines."""
        texts = sorted(self._column(task, "probes", "text"))
        return random.Random(f"probes/{task}").sample(texts, min(num, len(texts)))

    def held_out(self, task: str) -> list[Example]:
        """Training examples that no checkpoint is trained on."""
        examples, chosen = self._split(task)
        return [examples[place] for place in chosen]

    def training(self, task: str) -> list[Example]:
        """All others."""
        examples, chosen = self._split(task)
        return [one for place, one in enumerate(examples) if place not in set(chosen)]

    def stream(self, source: str, seed: int) -> Iterator[Example]:
        """Endless training examples of a task or of `GENERAL`, each once before any comes again."""
        examples = self._general() if source == GENERAL else self.training(source)
        if not examples:
            raise InputError(f"{self.path('qa', 'train')}: no passage of {_NUM_PROMPT_WORDS + 1} words or more")
        generator = random.Random(f"{source}/{seed}")
        while True:
            yield from generator.sample(examples, len(examples))

    def digest(self) -> str:
        """Of all that is trained on, whatever the order of its lines."""
        return digest_json({task: self._examples(task, "train") for task in REAL_TASKS})[:16]

    def _general(self) -> list[Example]:
        """Passages of Wikipedia, the contexts of questions that are trained on."""
        found: dict[str, Example] = {}
        for one in self.training("qa"):
            passage = one.prompt.removeprefix("Context: ").partition("\nQuestion:")[0]
            words = passage.split(" ")
            start, rest = words[:_NUM_PROMPT_WORDS], words[_NUM_PROMPT_WORDS:]
            if rest:
                found[passage] = Example(" ".join(start), " " + " ".join(rest))
        return list(found.values())

    def _split(self, task: str) -> tuple[list[Example], list[int]]:
        examples = self._examples(task, "train")
        num = min(NUM_HELD_OUT, len(examples) // 2)
        return examples, sorted(random.Random(f"held out/{task}").sample(range(len(examples)), num))

    def _examples(self, task: str, kind: str) -> list[Example]:
        """Sorted by prompt, so that the order of the lines decides nothing."""
        columns = (self._column(task, kind, "prompt"), self._column(task, kind, "target"))
        return sorted(Example(prompt, target) for prompt, target in zip(*columns, strict=True))

    def _column(self, task: str, kind: str, key: str) -> list[str]:
        path, values = self.path(task, kind), []
        for number, row in read_jsonl(path, InputError):
            if not isinstance(row.get(key), str) or not row[key]:
                raise InputError(f"{path}, line {number}: needs a non-empty string under {key!r}, got {row.get(key)!r}")
            values.append(row[key])
        if not values:
            raise InputError(f"{path} has no lines")
        return values
