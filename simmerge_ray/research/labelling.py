"""Utilities and candidate signals of given merges in this process, as studies label them: nothing is generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.storage import digest_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import ProbeSet
from simmerge_ray.checkpoints.references import local_files
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.evaluation import EvaluationTask
from simmerge_ray.search.evaluation.evaluator import Evaluator, TokenPair
from simmerge_ray.search.evaluation.tasks import Task, encode_pair
from simmerge_ray.search.runner import TrialRunner
from simmerge_ray.search.setup import PreparedSearch, grid_trials, prepare_search
from simmerge_ray.selector.predictor.answers import answers_by_owner, note_answers
from simmerge_ray.signals.candidates.answers import AnswerSpec
from simmerge_ray.signals.candidates.signatures import members_answers
from simmerge_ray.signals.compute import local_executor
from simmerge_ray.signals.signature import SignatureStore


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


def teacher_forced(task: Task, tokenizer: Any) -> TeacherForcedTask:
    """The same items; prompts are shown as they are."""
    pairs = []
    for item in task.items:
        prompt, target = encode_pair(item.prompt, item.target, tokenizer)
        pairs.append((prompt, [*target, tokenizer.eos_token_id]))
    return TeacherForcedTask(task.name, pairs)


def tokenizer_of(catalogue: Catalogue) -> Any:
    """The one that its checkpoints share."""
    from transformers import AutoTokenizer

    with local_files(catalogue.all_refs[0]) as directory:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def measure_plans(
    catalogue: Catalogue,
    tasks: Mapping[str, EvaluationTask],
    probe_sets: Mapping[str, ProbeSet],
    labels: Path,
    plans: Sequence[MergePlan] | Mapping[MergePlan, Sequence[str]],
    report: Callable[[int, int], None] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_tokens: int = 16,
) -> None:
    """Fill a label store with the plans, in their order: utilities on the members' own tasks (a checkpoint's on all),
    and what each keeps of its members' own answers. What the store holds is not measured again.

    Args:
        plans: with further tasks of each, where its members' own do not suffice. probe_sets: of all own tasks. labels:
            directory; signatures lie in it, too. dtype: of the merges that are run. max_tokens: of an answer.

    Raises:
        ProbeError, CheckpointError: see `members_answers`. InputError: tasks that cannot be used.
    """
    assert catalogue.base is not None, "answers are compared with those of the base"
    store = SignatureStore(str(labels / "_signatures"))
    answers = members_answers(catalogue, probe_sets, store, local_executor(catalogue), AnswerSpec(max_tokens))
    note_answers(labels, answers, catalogue.base.id)
    search = prepare_search(
        catalogue,
        tasks,
        SearchConfig(evaluator="transformers", pairs="all", dtype=dtype),
        str(labels),
        plans_given=True,
        answers=answers_by_owner(answers, catalogue.base.id),
    )
    further = plans if isinstance(plans, Mapping) else dict.fromkeys(plans, ())
    asked = {plan: tuple(dict.fromkeys((*search.asked_of(plan), *names))) for plan, names in further.items()}
    trials = grid_trials(search, asked)
    runner = TrialRunner(search, start_here)
    for number, trial in enumerate(trials):
        if report:
            report(number, len(trials))
        runner.run(trial)


def start_here(search: PreparedSearch) -> Evaluator:
    """The evaluator by transformers, in this process."""
    from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator

    settings = search.settings
    return TransformersEvaluator(search.template, settings.dtype, max_model_len=settings.max_model_len)
