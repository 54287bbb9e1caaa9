"""From items to tokens: examples before the prompt, chat templates, and where a prompt ends and its answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simmerge_ray.base.errors import TaskError
from simmerge_ray.search.evaluation.evaluator import TokenPair

if TYPE_CHECKING:
    from simmerge_ray.search.evaluation.tasks import Item, Task


def prompt_text(task: Task, item: Item, tokenizer: Any) -> str:
    """What the model is shown of an item.

    Raises:
        TaskError: the task is a chat and the tokenizer has no chat template.
    """
    if not task.chat:
        shown = [f"{example.prompt}{example.target}" for example in task.examples]
        return task.separator.join([*shown, item.prompt])
    turns = [{"role": "system", "content": task.system}] if task.system else []
    for example in task.examples:
        turns += [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.target}]
    turns.append({"role": "user", "content": item.prompt})
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError(f"task {task.name!r} is a chat, and the checkpoints' tokenizer has no chat template")
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def encode_prompts(task: Task, items: Sequence[Item], tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts. A chat template writes its special tokens itself."""
    texts = [prompt_text(task, item, tokenizer) for item in items]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=not task.chat)["input_ids"]]


def encode_pairs(task: Task, items: Sequence[Item], tokenizer: Any) -> list[list[TokenPair]]:
    """Token ids (prompt, answer) of every answer whose likelihood is measured: the choices, or the target alone."""
    found = []
    for item in items:
        context = prompt_text(task, item, tokenizer)
        answers = item.choices or (item.target,)
        found.append([encode_pair(context, answer, tokenizer, not task.chat) for answer in answers])
    return found


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
