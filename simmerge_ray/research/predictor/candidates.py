"""Merges of every pair of a small zoo: what each keeps of both members, and its utility on their tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.storage import digest_json
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import Probe, ProbeSet
from simmerge_ray.checkpoints.references import local_files
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe
from simmerge_ray.research.zoo.domains import evaluation_items, probe_texts
from simmerge_ray.search.evaluation.evaluator import Evaluator, TokenPair
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.search.runner import TrialRunner
from simmerge_ray.search.setup import PreparedSearch, grid_trials, prepare_search
from simmerge_ray.selector.predictor.answers import answers_by_owner, note_answers
from simmerge_ray.signals.candidates.answers import AnswerSpec
from simmerge_ray.signals.candidates.signatures import collect_answers
from simmerge_ray.signals.compute import local_executor
from simmerge_ray.signals.signature import SignatureStore

NUM_ITEMS, NUM_PROBES, MAX_TOKENS = 200, 64, 16
_LEVELS = (0.3, 0.5, 0.7, 1.0)  # of a member's weight in a sum of task vectors
_DENSITIES, _SCALES = (0.1, 0.3), (0.7, 1.0, 1.4)  # of ties
_RATIOS = ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0))  # of norm-matched weights


@dataclass(frozen=True)
class TeacherForcedTask:
    """A task whose item is worth 1 where greedy decoding would give the whole target and the end of the text, read off
    one forward pass: as generated exact match, a generation sooner."""

    name: str
    pairs: Sequence[TokenPair]

    @property
    def digest(self) -> str:
        return digest_json(["teacher-forced", [list(map(list, pair)) for pair in self.pairs]])

    @property
    def num_items(self) -> int:
        return len(self.pairs)

    def longest(self, tokenizer: Any) -> tuple[int, int]:
        del tokenizer  # they are tokens already
        lengths = [len(prompt) + len(target) for prompt, target in self.pairs]
        return max(lengths), int(np.argmax(lengths)) + 1

    def evaluate(self, evaluator: Evaluator, indices: np.ndarray | None = None) -> np.ndarray:
        chosen = range(self.num_items) if indices is None else indices.tolist()
        found = evaluator.log_likelihoods([self.pairs[index] for index in chosen], padded=True)
        return np.array([float(one.is_greedy) for one in found])


def pair_candidates(left: str, right: str) -> list[MergePlan]:
    """Sums over a grid of weights, ties, and norm-matched weights."""
    pair = (left, right)
    sums = [Recipe(make_arm("task_arithmetic"), pair, weights) for weights in product(_LEVELS, repeat=2)]
    ties = [
        Recipe(make_arm("ties", {"density": density, "scale": scale}), pair, (1.0, 1.0))
        for density, scale in product(_DENSITIES, _SCALES)
    ]
    matched = [Recipe(make_arm("scale_matched_linear"), pair, ratio) for ratio in _RATIOS]
    return [MergePlan(recipe=one) for one in (*sums, *ties, *matched)]


def cross_task_pairs(catalogue: Catalogue) -> list[tuple[str, str]]:
    """Pairs of checkpoints with different tasks."""
    own = catalogue.own_task
    return [(a, b) for a, b in combinations(catalogue.ids, 2) if own[a] != own[b]]


def measure_zoo(
    zoo: Path, labels: Path, num_items: int = NUM_ITEMS, report: Callable[[int, int], None] | None = None
) -> None:
    """Fill a label store with the candidates of all cross-task pairs of the catalogue in `zoo`, and all checkpoints.
    What it holds is not measured again."""
    catalogue = load_catalogue(zoo / "catalogue.yaml")
    assert catalogue.base is not None
    tasks = {task for task in catalogue.own_task.values() if task}
    probe_sets = {task: ProbeSet(task, tuple(map(Probe, probe_texts(task, NUM_PROBES)))) for task in sorted(tasks)}
    store = SignatureStore(labels / "_signatures")
    answers = collect_answers(catalogue, probe_sets, store, local_executor(catalogue), AnswerSpec(MAX_TOKENS))
    note_answers(labels, answers, catalogue.base.id)
    search = prepare_search(
        catalogue,
        {task: _task(catalogue, task, num_items) for task in sorted(tasks)},
        SearchConfig(evaluator="transformers", pairs="all"),
        str(labels),
        plans_given=True,
        answers=answers_by_owner(answers, catalogue.base.id),
    )
    singles = [MergePlan(source=ref.id) for ref in catalogue.all_refs]
    plans = [*singles, *(plan for pair in cross_task_pairs(catalogue) for plan in pair_candidates(*pair))]
    trials = grid_trials(search, plans)
    runner = TrialRunner(search, _start)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, trial in enumerate(trials, 1):
            runner.run(trial)
            if report:
                report(number, len(trials))
    finally:
        torch.set_num_threads(threads)


def _start(search: PreparedSearch) -> Evaluator:
    return TransformersEvaluator(search.template, "float32", max_model_len=search.settings.max_model_len)


def _task(catalogue: Catalogue, domain: str, num_items: int) -> TeacherForcedTask:
    from transformers import AutoTokenizer

    with local_files(catalogue.all_refs[0]) as directory:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    pairs = []
    for item in evaluation_items(domain, num_items):
        target = tokenizer(item.target, add_special_tokens=False)["input_ids"]
        pairs.append((tokenizer(item.prompt)["input_ids"], [*target, tokenizer.eos_token_id]))
    return TeacherForcedTask(domain, pairs)
