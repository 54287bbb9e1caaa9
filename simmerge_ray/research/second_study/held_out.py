"""What a checkpoint of the real zoo is worth on training examples that none was trained on; no item is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.research.second_study.real_tasks import REAL_TASKS, RealData
from simmerge_ray.research.zoo.domains import Example
from simmerge_ray.search.evaluation import Evaluator
from simmerge_ray.search.evaluation.metrics import MEAN_PROBABILITY
from simmerge_ray.search.evaluation.tasks import encode_pair

EXACT = "exact_match"


def held_out_values(ref: CheckpointRef, data: RealData) -> dict[str, dict[str, float]]:
    """Mean by task and metric: exact match, and probability of the target's tokens. In bfloat16."""
    from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator

    evaluator = TransformersEvaluator(ref, dtype="bfloat16")
    return {task: values_on(evaluator, data.held_out(task)) for task in REAL_TASKS}


def values_on(evaluator: Evaluator, examples: Sequence[Example]) -> dict[str, float]:
    """Mean of both metrics. Nothing is generated: an answer is met where each of its tokens is the likeliest, and then
    the end of the text or of the line."""
    tokenizer = evaluator.tokenizer
    pairs = []
    for example in examples:
        prompt, target = encode_pair(example.prompt, example.target, tokenizer)
        with_line_end = encode_pair(example.prompt, f"{example.target}\n", tokenizer)[1]
        pairs += [(prompt, [*target, tokenizer.eos_token_id]), (prompt, with_line_end), (prompt, target)]
    found = evaluator.log_likelihoods(pairs, padded=True)
    exact = [ended.is_greedy or broken.is_greedy for ended, broken in zip(found[::3], found[1::3], strict=True)]
    smooth = [plain.mean_probability for plain in found[2::3]]
    return {EXACT: sum(exact) / len(exact), MEAN_PROBABILITY: sum(smooth) / len(smooth)}


def value_rows(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """A Markdown table: utility on each task, with exact match in brackets where the utility is another one."""
    rows = [f"| checkpoint | {' | '.join(REAL_TASKS)} |", "|---" * (1 + len(REAL_TASKS)) + "|"]
    for name, by_task in values.items():
        cells = []
        for task in REAL_TASKS.values():
            exact, own = by_task[task.name][EXACT], by_task[task.name][task.metric]
            cells.append(f"{own:.2f}" + ("" if task.metric == EXACT else f" ({exact:.2f})"))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows
