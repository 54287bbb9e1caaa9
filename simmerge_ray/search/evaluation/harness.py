"""Tasks of lm-evaluation-harness by name: its prompts, its answers' processing, its metrics, our evaluators.

A task's requests are put together once, for all its documents in their order, as a whole run of lm_eval does: examples
of a few-shot prompt are drawn from one stream of random numbers, so a document's prompt depends on those before it.
Evaluating some items, or again, then asks what the whole run would have asked. Scores equal those of lm_eval's `hf`.

lm_eval is imported when the first task is loaded (extra `lm_eval`).
"""

from __future__ import annotations

import copy
import difflib
import inspect
import io
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.errors import TaskError, unknown_name
from simmerge_ray.base.extras import require
from simmerge_ray.base.storage import canonical_json, digest_bytes, digest_json
from simmerge_ray.search.evaluation.evaluator import Evaluator

_logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("generate_until", "loglikelihood", "multiple_choice")
# Metrics that are known to lie in [0, 1] for every item. Others that are means can be asked for by name.
PER_ITEM_METRICS = (
    "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "contains", "accuracy",
    "prompt_level_strict_acc", "prompt_level_loose_acc",
)  # fmt: skip
# Of a task's config: its name and where its documents lie. The documents themselves count in the digest.
_NOT_CONTENT = ("task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")
_FEWSHOT_SEED = 1234  # lm_eval's own default


@dataclass(frozen=True)
class _Source:
    """Where a task comes from: `name` is the task, group or tag that was asked for."""

    name: str
    include_path: str | None
    directory: str  # relative data files of a local task are relative to it
    num_fewshot: int | None
    fewshot_seed: int


@dataclass(frozen=True)
class _Leaf:
    """A task as lm_eval built it, with the requests of every document."""

    task: Any
    requests: list[list[Any]]
    digest: str


# By digest, so that a process builds a task once, and a task whose files changed meanwhile is another one.
_LEAVES: dict[str, _Leaf] = {}


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm_eval: a description that pickles, whose documents every process loads for itself, once.

    metric: the utility. filter: which of the task's ways to read an answer. chosen: documents, None for all.
    """

    name: str
    metric: str
    filter: str
    num_documents: int
    source: _Source
    content: str
    chosen: tuple[int, ...] | None = None

    @property
    def num_items(self) -> int:
        return self.num_documents if self.chosen is None else len(self.chosen)

    @property
    def digest(self) -> str:
        """Identity of documents, prompts, settings, metric, filter and lm_eval's version."""
        chosen = [] if self.chosen is None else [list(self.chosen)]
        return digest_json(["lm_eval", self.content, self.metric, self.filter, *chosen])

    def sampled(self, num_items: int | None, seed: int = 0) -> HarnessTask:
        """The task with at most `num_items` items, drawn without replacement by `seed`, in their old order."""
        if num_items is None or num_items >= self.num_items:
            return self
        drawn = np.sort(np.random.default_rng(seed).permutation(self.num_items)[:num_items])
        return replace(self, chosen=tuple(self._documents(drawn)))

    def longest(self, tokenizer: Any) -> tuple[int, int]:
        """See `EvaluationTask`. Raises TaskError where an item cannot be put into tokens."""
        from simmerge_ray.search.evaluation.harness_lm import encode_pairs, encode_prompts, generation_settings

        leaf = self._leaf()
        items = [leaf.requests[document] for document in self._documents(None)]
        requests = [(number, request) for number, item in enumerate(items, 1) for request in item]
        generated = [one for one in requests if one[1].request_type == "generate_until"]
        scored = [one for one in requests if one[1].request_type == "loglikelihood"]
        prompts = encode_prompts([request.args[0] for _, request in generated], tokenizer)
        try:
            pairs = encode_pairs([request.args for _, request in scored], tokenizer)
        except TaskError as error:
            raise TaskError(f"task {self.name!r}: {error}") from error
        lengths = [
            (len(prompt) + generation_settings(request.args[1])[0], number)
            for prompt, (number, request) in zip(prompts, generated, strict=True)
        ]  # and an engine generates one token at least
        lengths += [(len(a) + len(b) + 1, number) for (a, b), (number, _) in zip(pairs, scored, strict=True)]
        return max(lengths, key=lambda one: (one[0], -one[1]))

    def evaluate(self, evaluator: Evaluator, indices: np.ndarray | None = None) -> np.ndarray:
        """See `EvaluationTask`.

        Raises:
            TaskError: the task is not the one that was loaded, an item does not fit the evaluator, or a value is none
                of [0, 1].
        """
        from simmerge_ray.search.evaluation.harness_lm import HarnessLM

        leaf, documents = self._leaf(), self._documents(indices)
        items = [[copy.copy(request) for request in leaf.requests[document]] for document in documents]
        requests = [request for item in items for request in item]
        model = HarnessLM(evaluator)
        for kind in ("generate_until", "loglikelihood"):
            asked = [request for request in requests if request.request_type == kind]
            for request, answer in zip(asked, getattr(model, kind)(asked) if asked else [], strict=True):
                # Greedy answers are the same however often a task asks for them.
                request.resps, request.filtered_resps = [answer] * (request.repeats or 1), {}
        if not requests:
            return np.zeros(0)
        next(one for one in leaf.task._filters if one.name == self.filter).apply(requests)
        utilities = []
        for document, item in zip(documents, items, strict=True):
            found = leaf.task.process_results(item[0].doc, [request.filtered_resps[self.filter] for request in item])
            utilities.append(self._utility(found.get(self.metric), document))
        return np.array(utilities, dtype=np.float64)

    def _documents(self, indices: np.ndarray | None) -> list[int]:
        every = range(self.num_documents) if self.chosen is None else self.chosen
        return [every[int(index)] for index in indices] if indices is not None else list(every)

    def _utility(self, value: Any, document: int) -> float:
        if isinstance(value, (bool, int, float, np.generic)) and 0 <= float(value) <= 1:
            return float(value)
        raise TaskError(
            f"task {self.name!r}, document {document}: metric {self.metric!r} is {value!r}, no number in [0, 1]"
        )

    def _leaf(self) -> _Leaf:
        if self.content not in _LEAVES:
            with _prepared(self.source):  # all tasks of a group at once, in the order of the first time
                for task in _load(self.source, _manager([self.source])).values():
                    _with_requests(task, self.source)
        if self.content not in _LEAVES:
            raise TaskError(
                f"task {self.name!r} is not the one that was loaded first: its files, its data or lm_eval's version "
                "differ in this process"
            )
        return _LEAVES[self.content]


def load_harness_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    metric: str | None = None,
    max_items: int | None = None,
    seed: int = 0,
    fewshot_seed: int = _FEWSHOT_SEED,
) -> dict[str, HarnessTask]:
    """Tasks by name, or by one's own name for a task, as in `math=gsm8k`; a group or a tag stands for its tasks, each a
    task of its own.

    The utility is the first metric of the task that is a mean over items and known to lie in [0, 1] for each of them,
    read with the task's first filter.

    Args:
        include_path: directory with YAML files of local tasks; they come before lm_eval's own of the same name.
        num_fewshot: examples before each prompt. As in lm_eval, a task that says 0 itself keeps it.
        metric: name of the metric, or "metric,filter", instead of the task's first.
        max_items: as many documents of each task, drawn by `seed`.
        fewshot_seed: of the examples.

    Raises:
        MissingLibraryError: lm_eval is not installed.
        TaskError: `include_path` is no directory, or some tasks cannot be used: unknown, documents that cannot be
            fetched, another kind of output, no such metric; every problem of all of them.
    """
    require("lm_eval.tasks", "lm_eval")
    if include_path is not None and not include_path.is_dir():
        raise TaskError(f"include_path {include_path} is not a directory")
    path = None if include_path is None else str(include_path.resolve())
    asked = [text.rpartition("=")[::2] for text in dict.fromkeys(names)]
    sources = [_Source(name, path, os.getcwd(), num_fewshot, fewshot_seed) for _, name in asked]
    if not sources:
        raise TaskError("no names of lm_eval tasks were given")
    found: dict[str, HarnessTask] = {}
    problems: list[str] = []
    with _prepared(sources[0]):
        manager = _manager(sources)
        for (own_name, _), source in zip(asked, sources, strict=True):
            try:
                tasks = _load(source, manager)
            except TaskError as error:
                problems.append(str(error))
                continue
            if own_name and len(tasks) > 1:
                problems.append(f"{source.name!r} is {len(tasks)} tasks ({', '.join(tasks)}); {own_name!r} can be one")
                continue
            for leaf_name, task in tasks.items():
                name = own_name or leaf_name
                try:
                    one = replace(_described(leaf_name, task, source, metric), name=name)
                except TaskError as error:
                    problems.append(f"task {leaf_name!r}: {error}")
                    continue
                if found.setdefault(name, one).digest != one.digest:
                    problems.append(f"task {name!r} comes with other settings from {source.name!r} than before")
    if problems:
        raise TaskError("\n  ".join(["tasks of lm_eval:", *problems]))
    return {name: task.sampled(max_items, seed) for name, task in found.items()}


@contextmanager
def _prepared(source: _Source) -> Iterator[None]:
    """What lm_eval and the code of tasks expect while documents are loaded, put back afterwards.

    Documents may be shuffled by the global generators, which lm_eval seeds; bars and prints are not our output; data
    files of local tasks are relative to where the search was started, which is not where a Ray worker runs.
    """
    states = random.getstate(), np.random.get_state()
    there = chdir(source.directory) if Path(source.directory).is_dir() else nullcontext()
    said = io.StringIO()
    try:
        with there, redirect_stdout(said), redirect_stderr(said):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        _logger.debug("lm_eval said: %s", said.getvalue())


@cache
def _shipped() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager(sources: Sequence[_Source]) -> Any:
    """Index of the local tasks, and of lm_eval's own (14,000 files, 10 s) where a name is not found in it."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=sources[0].include_path, include_defaults=False)
    index = manager.task_index
    if not all(_is_complete(source.name, index) for source in sources):
        for name, entry in _shipped().task_index.items():
            index.setdefault(name, entry)
    return manager


def _is_complete(name: str, index: Mapping[str, Any]) -> bool:
    """Whether a name and all that it is made of are in the index."""
    seen: set[str] = set()
    waiting: list[Any] = [name]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):  # a member with settings of its own
            one = one.get("task") or one.get("group")
        if not isinstance(one, str) or one not in index:
            return False
        if one not in seen:
            seen.add(one)
            config = index[one].cfg or {}
            members = config.get("task") if "group" in config else None
            waiting += members if isinstance(members, list) else []
    return True


def _load(source: _Source, manager: Any) -> dict[str, Any]:
    """The tasks that a name stands for, with their documents, settled as `lm_eval.simple_evaluate` settles them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    if source.name not in manager.task_index:
        near = difflib.get_close_matches(source.name, manager.all_tasks + _shipped().all_tasks, n=3)
        hint = f"; near: {', '.join(dict.fromkeys(near))}" if near else ""
        raise TaskError(f"unknown task {source.name!r} of lm_eval{hint} (all: lm_eval ls tasks)")
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        tasks = manager.load([source.name])["tasks"]
    except Exception as error:  # documents are fetched and the code of tasks runs: anything may come
        raise TaskError(f"task {source.name!r} cannot be built: {type(error).__name__}: {error}") from error
    if not tasks:
        raise TaskError(f"{source.name!r} of lm_eval holds no tasks")
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if source.num_fewshot is not None and own == 0 != source.num_fewshot:
            _logger.warning("task %r is defined without examples and keeps num_fewshot 0", name)
        elif source.num_fewshot is not None or own is None:
            task.set_config("num_fewshot", source.num_fewshot or 0)
        task.set_fewshot_seed(seed=source.fewshot_seed)
    return dict(tasks)


def _described(name: str, task: Any, source: _Source, wanted: str | None) -> HarnessTask:
    """The task as a search knows it. Raises TaskError where it cannot be evaluated item by item."""
    if task.OUTPUT_TYPE not in OUTPUT_TYPES:
        raise TaskError(f"output type {task.OUTPUT_TYPE!r} is not supported; supported: {', '.join(OUTPUT_TYPES)}")
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        raise TaskError("tasks with images or sound, or that run generated code, are not supported")
    metric, filter_name = _metric(task, wanted)
    leaf = _with_requests(task, source)
    return HarnessTask(name, metric, filter_name, len(leaf.requests), source, leaf.digest)


def _metric(task: Any, wanted: str | None) -> tuple[str, str]:
    """(metric, filter)."""
    functions = getattr(task, "_metric_fn_list", {})
    absent = [name for name, function in functions.items() if function is None]
    if absent and task.get_config("process_results") is None:
        raise TaskError(f"metric {absent[0]!r} is not one of lm_eval and could not be fetched")
    aggregations, better = task.aggregation(), task.higher_is_better()
    means = [name for name, function in aggregations.items() if getattr(function, "__name__", "") == "mean"]
    usable = [name for name in means if better.get(name, True)]
    filters = [one.name for one in task._filters]
    if wanted is None:
        known = [name for name in usable if name in PER_ITEM_METRICS]
        if not known:
            raise TaskError(
                f"no metric is known to lie in [0, 1] for every item; it has {', '.join(aggregations) or 'none'}"
                + (f"; of these {', '.join(usable)} can be asked for by `metric`" if usable else "")
            )
        return known[0], filters[0]
    name, _, filter_name = wanted.partition(",")
    if name not in usable:
        raise TaskError(unknown_name("metric that is a mean of utilities", name, usable))
    if filter_name and filter_name not in filters:
        raise TaskError(unknown_name("filter", filter_name, filters))
    return name, filter_name or filters[0]


def _with_requests(task: Any, source: _Source) -> _Leaf:
    """Put the requests of all documents together, and keep them in this process. TaskError: some are not supported."""
    from simmerge_ray.search.evaluation.harness_lm import generation_settings

    try:
        task.build_all_requests()
    except Exception as error:  # templates and code of tasks
        raise TaskError(f"its requests cannot be built: {type(error).__name__}: {error}") from error
    by_document: dict[int, list[Any]] = {}
    for request in task.instances:
        by_document.setdefault(request.doc_id, []).append(request)
        if request.request_type == "generate_until":
            generation_settings(request.args[1])
        elif request.request_type != "loglikelihood":
            raise TaskError(f"requests {request.request_type!r} are not supported")
    requests = [sorted(by_document[document], key=lambda one: one.idx) for document in sorted(by_document)]
    leaf = _Leaf(task, requests, _digest(task, requests, source))
    return _LEAVES.setdefault(leaf.digest, leaf)


def _digest(task: Any, requests: Sequence[Sequence[Any]], source: _Source) -> str:
    config = {key: value for key, value in vars(task.config).items() if key not in (*_NOT_CONTENT, "metadata")}
    head = {
        "name": task.task_name,
        "version": str(task.VERSION),
        "class": _plain(type(task)) if type(task).__module__ != "lm_eval.api.task" else None,
        "config": _plain(config),
        "lm_eval": version("lm_eval"),
        "fewshot_seed": source.fewshot_seed,
    }
    items = [[_plain(item[0].doc), [[one.request_type, _plain(one.args)] for one in item]] for item in requests]
    return digest_bytes(*(canonical_json(one).encode() for one in (head, *items)))


def _plain(value: Any) -> Any:
    """A JSON value with the content of `value`: code as its source, no addresses, no NaN."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset, list, tuple)):
        found = [_plain(one) for one in value]
        return found if isinstance(value, (list, tuple)) else sorted(found, key=canonical_json)
    if isinstance(value, bytes):
        return digest_bytes(value)
    if callable(value):
        try:
            return inspect.getsource(value)
        except (TypeError, OSError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
