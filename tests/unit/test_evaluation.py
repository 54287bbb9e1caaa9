"""Tasks, metrics, and the transformers evaluator on tiny real models."""

from __future__ import annotations

import json

import pytest
import torch

from simmerge_ray.errors import ProbeError, TaskError
from simmerge_ray.evaluation import METRICS, Item, Task, contains, evaluate, exact_match, load_task, load_tasks, numeric
from simmerge_ray.operators.specs import make_arm
from simmerge_ray.plans import pair_plan, resolve_plan, unmerged
from simmerge_ray.probes import load_probe_set, load_probe_sets
from simmerge_ray.transformers_evaluator import TransformersEvaluator


def test_metrics():
    assert exact_match(" 12\n", "12") == 1.0 and exact_match("12.", "12") == 0.0
    assert contains("it is 12.", "12") == 1.0 and contains("1 2", "12") == 0.0
    assert numeric("3 + 4 = 1,007.0", "1007") == 1.0 and numeric("none", "7") == 0.0
    assert set(METRICS) == {"exact_match", "contains", "numeric"}


def test_a_task_scores_each_answer():
    task = Task("t", (Item("a", "1"), Item("b", "2")))
    assert task.score(["1", "1"]).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="zip"):
        task.score(["1"])


def test_the_digest_of_a_task_sees_items_order_metric_and_length():
    items = (Item("a", "1"), Item("b", "2"))
    digests = {Task("t", items).digest, Task("t", items[::-1]).digest, Task("t", items, "contains").digest}
    assert len(digests | {Task("t", items, max_new_tokens=3).digest}) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no items"),
        ([{"prompt": "a"}], "line 1: an item needs a non-empty string under 'target', got None"),
        ([{"prompt": "a", "target": "b"}, {"prompt": "", "target": "b"}], "line 2: .*'prompt'"),
        ([{"prompt": "a", "target": "b", "metric": "exact"}], "unknown metric 'exact'.*exact_match"),
        ([{"prompt": "a", "target": "b", "metrics": "x"}], "unknown key 'metrics'"),
        ([{"prompt": "a", "target": "b", "max_new_tokens": 0}], "positive integer"),
        (
            [{"prompt": "a", "target": "b", "metric": "contains"}, {"prompt": "a", "target": "b", "metric": "numeric"}],
            "line 2",
        ),
    ],
)
def test_malformed_tasks_are_refused_with_the_line(tmp_path, lines, message):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TaskError, match=message):
        load_task(path)


def test_empty_directories_of_tasks_and_probes_are_refused(tmp_path):
    with pytest.raises(TaskError, match="no <task>.jsonl"):
        load_tasks(tmp_path)
    with pytest.raises(ProbeError, match="no <task>.jsonl"):
        load_probe_sets(tmp_path)
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(ProbeError, match="holds no probes"):
        load_probe_set(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(ProbeError, match="line 1: a probe needs"):
        load_probe_set(tmp_path / "t.jsonl")


def test_the_evaluator_holds_the_weights_it_was_given_last(catalogue, catalogue_path):
    tasks = load_tasks(catalogue_path.parent / "tasks")
    prompts = [item.prompt for item in tasks["add"].items]
    swapped = TransformersEvaluator(catalogue.base)
    for resolved in (
        unmerged(catalogue.checkpoints[1]),
        resolve_plan(pair_plan("m0", "m1", make_arm("ties")), catalogue),
    ):
        swapped.load(resolved)
        if resolved.plan.source:
            fresh = TransformersEvaluator(resolved.checkpoints[0])
            assert swapped.generate(prompts, 5) == fresh.generate(prompts, 5)
            assert torch.equal(swapped.next_token_log_probs("a1"), fresh.next_token_log_probs("a1"))
    items = evaluate(swapped, tasks["add"])
    assert items.shape == (len(prompts),) and set(items) <= {0.0, 1.0}
    assert swapped.generate(prompts[::-1], 5) == swapped.generate(prompts, 5)[::-1]
