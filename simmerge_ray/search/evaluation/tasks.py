"""A task: items with one metric, how their prompts become tokens, and how answers are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simmerge_ray.base.errors import TaskError, unknown_name
from simmerge_ray.base.storage import digest_json
from simmerge_ray.search.evaluation.evaluator import Evaluator, TokenPair
from simmerge_ray.search.evaluation.metrics import (
    CHOICE_METRICS,
    MEAN_PROBABILITY,
    METRICS,
    TEXT_METRICS,
    best_choice,
    token_probability,
)


@dataclass(frozen=True)
class Item:
    """One evaluation item: the prompt, what should be answered, and (multiple choice) what can be."""

    prompt: str
    target: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Items with one metric. Answers are greedy and end at the end-of-text token, a stop string or `max_new_tokens`.

    examples: solved items that are shown before every prompt. chat: the checkpoint's chat template is applied, prompts
    being user turns and targets assistant turns; else examples are joined by `separator`. system: first turn of a chat.
    """

    name: str
    items: tuple[Item, ...]
    metric: str = "exact_match"
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ()
    examples: tuple[Item, ...] = ()
    separator: str = "\n\n"
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.items:
            raise TaskError(f"task {self.name!r} has no items")
        if self.metric not in METRICS:
            raise TaskError(f"task {self.name!r}: {unknown_name('metric', self.metric, METRICS)}")
        if self.system is not None and not self.chat:
            raise TaskError(f"task {self.name!r}: 'system' is a turn of a chat; set chat: true")
        if self.metric in CHOICE_METRICS:
            for number, item in enumerate(self.items, 1):
                if len(item.choices) < 2 or item.target not in item.choices:
                    raise TaskError(
                        f"task {self.name!r}, item {number}: metric {self.metric!r} needs at least two 'choices', the "
                        f"target among them; got {list(item.choices)} and {item.target!r}"
                    )

    @property
    def generates(self) -> bool:
        """Whether text is generated; else the likelihood of given texts is measured."""
        return self.metric in TEXT_METRICS

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def digest(self) -> str:
        """Identity of items, metric, prompts and generation settings."""
        items = [[item.prompt, item.target, *([list(item.choices)] if item.choices else [])] for item in self.items]
        content: list[Any] = [self.name, self.metric, self.max_new_tokens, items]
        examples = [[item.prompt, item.target] for item in self.examples]
        others = {"stop": list(self.stop), "examples": examples, "chat": self.chat, "system": self.system}
        if self.examples and not self.chat:
            others["separator"] = self.separator
        # What is not used is left out, so that a task keeps its identity when this class learns something new.
        given = {key: value for key, value in others.items() if value}
        return digest_json([*content, given] if given else content)

    def sampled(self, num_items: int | None, seed: int = 0) -> Task:
        """The task with at most `num_items` items, drawn without replacement by `seed`, in their old order."""
        if num_items is None or num_items >= self.num_items:
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(self.num_items)[:num_items])
        return replace(self, items=tuple(self.items[index] for index in chosen))

    def prompt_text(self, item: Item, tokenizer: Any) -> str:
        """What the model is shown of an item.

        Raises:
            TaskError: the task is a chat and the tokenizer has no chat template.
        """
        if not self.chat:
            shown = [f"{example.prompt}{example.target}" for example in self.examples]
            return self.separator.join([*shown, item.prompt])
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for example in self.examples:
            turns += [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.target}]
        turns.append({"role": "user", "content": item.prompt})
        if not getattr(tokenizer, "chat_template", None):
            raise TaskError(f"task {self.name!r} is a chat, and the checkpoints' tokenizer has no chat template")
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def encoded_prompts(self, items: Sequence[Item], tokenizer: Any) -> list[list[int]]:
        """Token ids of the prompts. A chat template writes its special tokens itself."""
        texts = [self.prompt_text(item, tokenizer) for item in items]
        return [list(ids) for ids in tokenizer(texts, add_special_tokens=not self.chat)["input_ids"]]

    def encoded_pairs(self, items: Sequence[Item], tokenizer: Any) -> list[list[TokenPair]]:
        """Token ids (prompt, answer) of every answer whose likelihood is measured: the choices, or the target alone."""
        return [
            [encode_pair(context, answer, tokenizer, not self.chat) for answer in item.choices or (item.target,)]
            for item in items
            for context in [self.prompt_text(item, tokenizer)]
        ]

    def longest(self, tokenizer: Any) -> tuple[int, int]:
        """(tokens that an evaluator must hold, number of the item from 1) of the longest item."""
        if self.generates:
            lengths = [len(ids) + self.max_new_tokens for ids in self.encoded_prompts(self.items, tokenizer)]
        else:  # an engine generates one token at least
            pairs = self.encoded_pairs(self.items, tokenizer)
            lengths = [max(len(before) + len(after) + 1 for before, after in of_item) for of_item in pairs]
        most = max(lengths)
        return most, lengths.index(most) + 1

    def evaluate(self, evaluator: Evaluator, indices: np.ndarray | None = None) -> np.ndarray:
        """Per-item utilities float64 in [0, 1] of the loaded weights, of all items or of those at `indices`."""
        items = self.items if indices is None else [self.items[index] for index in indices]
        if not self.generates:
            return np.array(self._likelihood_utilities(evaluator, items), dtype=np.float64)
        prompts = self.encoded_prompts(items, evaluator.tokenizer)
        answers = evaluator.generate(prompts, self.max_new_tokens, self.stop)
        metric = TEXT_METRICS[self.metric]
        pairs = zip(answers, items, strict=True)
        return np.array([metric(answer, item.target) for answer, item in pairs], dtype=np.float64)

    def _likelihood_utilities(self, evaluator: Evaluator, items: Sequence[Item]) -> list[float]:
        pairs = self.encoded_pairs(items, evaluator.tokenizer)
        found = iter(evaluator.log_likelihoods([pair for of_item in pairs for pair in of_item]))
        utilities = []
        for item, of_item in zip(items, pairs, strict=True):
            results = [next(found) for _ in of_item]
            if self.metric in CHOICE_METRICS:
                lengths = [len(choice.encode()) if CHOICE_METRICS[self.metric] else 1 for choice in item.choices]
                totals = [one.total for one in results]
                utilities.append(best_choice(totals, lengths, item.choices.index(item.target)))
            elif self.metric == MEAN_PROBABILITY:
                utilities.append(min(results[0].mean_probability, 1.0))
            else:
                utilities.append(token_probability(results[0].total, results[0].num_tokens))
        return utilities


def encode_pair(context: str, answer: str, tokenizer: Any, special: bool = True) -> TokenPair:
    """Token ids of a context and of the answer that follows it, cut from those of the whole text.

    White space at the end of the context goes to the answer: with most tokenizers it begins a word.
    """
    kept = context.rstrip()
    context, answer = (kept, context[len(kept) :] + answer) if kept else (context, answer)
    before = list(tokenizer(context, add_special_tokens=special)["input_ids"])
    whole = list(tokenizer(context + answer, add_special_tokens=special)["input_ids"])
    if len(whole) <= len(before):  # the answer melts into the context's last token
        return before, list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return whole[: len(before)], whole[len(before) :]


def shards(num_items: int, count: int) -> list[np.ndarray]:
    """Indices of the items in `count` parts of nearly equal size, each a random sample fixed by the number of items.

    A trial that is stopped after some of them was measured on a sample of all items, whatever order the file has.
    """
    order = np.random.default_rng(num_items).permutation(num_items)
    return [np.sort(part) for part in np.array_split(order, min(count, num_items))]
