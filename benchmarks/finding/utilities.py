"""Measured utility of any plan on a zoo's tasks: exact match, teacher-forced.

An item counts when every token of the target and the token that ends a text is the model's likeliest after what came
before: what greedy generation gives right, but for float32 sums of another order. `check_against_evaluator` compares
the two. Items are cut in two halves, even and odd, so that what chose by labels is reported on items it never saw.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.finding.kept import Kept, OutOfTimeError
from simmerge_ray.base.storage import digest_json
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import ProbeSet, TokenBatch, load_probe_sets
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.model import end_of_text, load_model, put_tensors
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.search.evaluation.files import load_tasks
from simmerge_ray.search.evaluation.tasks import Task
from simmerge_ray.signals.candidates.answers import Answers, answer_logits, join_answers

HALVES = (0, 1)
_BATCH_SIZE = 50
T = TypeVar("T")
Tensors = Callable[[], Iterable[tuple[str, Tensor]]]


def plan_key(plan: MergePlan) -> str:
    """Name of a plan's results: of its JSON form as it is, which stays when what counts as one merge changes."""
    return digest_json(plan.to_json())[:16]


class LiveModel:
    """One model in memory, whose weights are those of what was put in last."""

    def __init__(self, catalogue: Catalogue) -> None:
        assert catalogue.base is not None
        self.catalogue = catalogue
        self.model: Any = load_model(catalogue.base)
        self.ends = end_of_text(catalogue.base, self.model.config).tolist()
        self._held: str | None = None

    def put(self, key: str, tensors: Tensors) -> Any:
        """The model with these weights; read only where it holds others.

        Raises:
            ValueError: the tensors do not cover the model's parameters.
        """
        if self._held != key:
            self._held = None
            if not put_tensors(self.model, tensors()):
                raise ValueError(f"weights {key!r} do not cover the model's parameters")
            self._held = key
        return self.model

    def put_plan(self, plan: MergePlan) -> Any:
        """The model with the weights of a plan, merged by the product's engine."""
        return self.put(plan_key(plan), self.tensors_of(plan))

    def tensors_of(self, plan: MergePlan) -> Tensors:
        return lambda: merged_tensors(resolve_plan(plan, self.catalogue))


class Utilities:
    """Per-item utilities, kept by (weights, task, half)."""

    def __init__(self, live: LiveModel, tasks: Mapping[str, Task], tokenizer: Any, kept: Kept) -> None:
        self._live, self._kept = live, kept
        self.num_items = {name: task.num_items for name, task in tasks.items()}
        self._halves = {
            (name, half): _teacher_forced(task, half, tokenizer, live.ends)
            for name, task in tasks.items()
            for half in HALVES
        }

    def of_plan(self, plan: MergePlan, task: str, half: int) -> np.ndarray:
        """(items of the half,) bool."""
        return self.of_weights(plan_key(plan), self._live.tensors_of(plan), task, half)

    def of_weights(self, key: str, tensors: Tensors, task: str, half: int) -> np.ndarray:
        """The same of weights that no plan describes; `key` names them once and for all."""

        def measure() -> str:
            right = self._measure(self._live.put(key, tensors), *self._halves[task, half])
            return np.packbits(right).tobytes().hex()

        bits = np.frombuffer(bytes.fromhex(self._kept.of(f"{key} {task} {half}", measure)), dtype=np.uint8)
        return np.unpackbits(bits, count=len(self._halves[task, half][1])).astype(bool)

    def mean(self, plan: MergePlan, tasks: Sequence[str], half: int | None = None) -> float:
        """Mean over tasks of the mean over items, of one half or of all items."""
        return mean_utility([[self.of_plan(plan, task, one) for one in _chosen(half)] for task in tasks])

    def mean_of_weights(self, key: str, tensors: Tensors, tasks: Sequence[str]) -> float:
        return mean_utility([[self.of_weights(key, tensors, task, half) for half in HALVES] for task in tasks])

    @torch.no_grad()
    def _measure(self, model: Any, answers: Answers, order: np.ndarray) -> np.ndarray:
        right = np.empty(len(order), dtype=bool)
        found = []
        for batch in answers.batches:
            best = (answer_logits(model, batch).argmax(-1) == batch.tokens).numpy()
            owners = batch.answer.numpy()
            starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
            found.append(np.logical_and.reduceat(best, starts))
        right[order] = np.concatenate(found)
        return right


def mean_utility(by_task: Sequence[Sequence[np.ndarray]]) -> float:
    """Mean over tasks; a task's parts (halves) are joined first."""
    return float(np.mean([np.concatenate(parts).mean() for parts in by_task]))


def _chosen(half: int | None) -> Sequence[int]:
    return HALVES if half is None else (half,)


def _teacher_forced(task: Task, half: int, tokenizer: Any, ends: Sequence[int]) -> tuple[Answers, np.ndarray]:
    """Items of a half in batches of similar length, and the place in the half of each of them."""
    items = task.items[half::2]
    prompts = task.encoded_prompts(items, tokenizer)
    targets = [[*tokenizer(item.target, add_special_tokens=False)["input_ids"], ends[0]] for item in items]
    order = np.argsort([len(p) + len(t) for p, t in zip(prompts, targets, strict=True)], kind="stable")
    batches, written = [], []
    for start in range(0, len(order), _BATCH_SIZE):
        rows = order[start : start + _BATCH_SIZE]
        width = max(len(prompts[row]) for row in rows)
        ids, mask = torch.zeros((len(rows), width), dtype=torch.long), torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(prompts[row])] = torch.tensor(prompts[row])
            mask[place, : len(prompts[row])] = 1
        batches.append(TokenBatch(ids, mask))
        written.append([targets[row] for row in rows])
    return join_answers(batches, written, task.name), order


class Bench:
    """A zoo with everything the parts share.

    Args:
        zoo: directory of `catalogue.yaml`, `probes/`, `tasks/`. out: of results. writer, until: see `Kept`.
    """

    def __init__(self, zoo: Path, out: Path, writer: str, until: float | None = None) -> None:
        from transformers import AutoTokenizer

        torch.set_num_threads(1)
        self.catalogue = load_catalogue(zoo / "catalogue.yaml")
        assert self.catalogue.base is not None
        self.tasks: dict[str, Task] = load_tasks(zoo / "tasks")
        self.probes: dict[str, ProbeSet] = load_probe_sets(zoo / "probes")
        self.tokenizer = AutoTokenizer.from_pretrained(self.catalogue.base.path)
        digest = digest_json([self.catalogue.digests(), {n: task.digest for n, task in self.tasks.items()}])[:12]
        self.out, self.cache = out, out / f"zoo-{digest}"
        self._writer, self._until = writer, until
        self.live = LiveModel(self.catalogue)
        self.utilities = Utilities(self.live, self.tasks, self.tokenizer, self.kept("utilities"))

    def report(self, text: str) -> None:
        """Say what was done, with the time."""
        print(time.strftime("%H:%M:%S"), text, flush=True)

    def kept(self, kind: str) -> Kept:
        return Kept(self.cache, kind, self._writer, self._until)

    def each(self, what: str, groups: Iterable[tuple[str, ...]], compute: Callable[..., T]) -> dict[str, T]:
        """By members (`a+b`): what is computed of a group, said as it comes; groups that time is over for are left
        out."""
        found: dict[str, T] = {}
        for members in groups:
            joined = "+".join(members)
            try:
                found[joined] = compute(members)
            except OutOfTimeError:
                continue
            self.report(f"{what}: {joined}")
        return found

    def spread_pairs(self) -> list[tuple[str, str]]:
        """The pairs of two tasks, every third first, so that a part of them has all kinds."""
        pairs = self.pairs()
        return [*pairs[::3], *pairs[1::3], *pairs[2::3]]

    def task_of(self, member: str) -> str:
        task = self.catalogue.own_task[member]
        assert task is not None
        return task

    def tasks_of(self, members: Sequence[str]) -> tuple[str, ...]:
        """The members' own tasks, each once."""
        return tuple(dict.fromkeys(map(self.task_of, members)))

    def pairs(self, same_task: bool = False) -> list[tuple[str, str]]:
        """All pairs of checkpoints of two tasks, or of one task."""
        pairs = combinations(self.catalogue.ids, 2)
        return [pair for pair in pairs if (len(self.tasks_of(pair)) == 1) == same_task]


def check_against_evaluator(bench: Bench, plans: Sequence[tuple[MergePlan, tuple[str, ...]]]) -> dict[str, Any]:
    """Teacher-forced against generated exact match, by the real evaluator: items that differ, of all.

    Args:
        plans: each with the tasks it is measured on.
    """
    from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator

    assert bench.catalogue.base is not None
    evaluator = TransformersEvaluator(bench.catalogue.base)
    differ, total, largest = 0, 0, 0.0
    for plan, tasks in plans:
        evaluator.load(resolve_plan(plan, bench.catalogue))
        for task in tasks:
            generated = bench.tasks[task].evaluate(evaluator)
            forced = np.empty(len(generated))
            for half in HALVES:
                forced[half::2] = bench.utilities.of_plan(plan, task, half)
            differ, total = differ + int((generated != forced).sum()), total + len(generated)
            largest = max(largest, abs(float(generated.mean() - forced.mean())))
    return {"plans": len(plans), "items": total, "items_that_differ": differ, "largest_difference_of_utility": largest}
