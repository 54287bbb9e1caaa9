"""Tasks, metrics, and the transformers evaluator on tiny real models."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.errors import ProbeError, TaskError
from simmerge_ray.checkpoints.probes import load_probe_set, load_probe_sets
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import pair_plan, resolve_plan, unmerged
from simmerge_ray.search.evaluation import METRICS, Item, Task, cut, load_task, load_tasks, shards
from simmerge_ray.search.evaluation.metrics import best_choice, contains, exact_match, numeric, token_probability
from simmerge_ray.search.evaluation.tasks import encode_pair
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator


def test_metrics():
    assert exact_match(" 12\n", "12") == 1.0 and exact_match("12.", "12") == 0.0
    assert contains("it is 12.", "12") == 1.0 and contains("1 2", "12") == 0.0
    assert numeric("3 + 4 = 1,007.0", "1007") == 1.0 and numeric("none", "7") == 0.0
    assert token_probability(-2.0, 2) == pytest.approx(math.exp(-1)) and token_probability(1e-9, 3) == 1.0
    assert best_choice([-2.0, -3.0], [1, 1], 0) == 1.0 and best_choice([-2.0, -3.0], [1, 2], 0) == 0.0
    assert best_choice([-2.0, -2.0], [1, 1], 1) == 0.0  # the first of equals counts
    assert len(METRICS) == 7
    assert cut("one\ntwo;three", (";", "\n")) == "one" and cut("one", ("\n",)) == "one"


@given(st.integers(1, 200), st.integers(1, 12))
def test_shards_hold_every_item_once_and_are_nearly_equal(num_items, count):
    parts = shards(num_items, count)
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_items))
    sizes = [len(part) for part in parts]
    assert len(parts) == min(count, num_items) and max(sizes) - min(sizes) <= 1


def test_a_sample_of_items_is_fixed_by_its_seed_and_keeps_their_order():
    task = Task("t", tuple(Item(str(number), "x") for number in range(20)))
    first = task.sampled(7, seed=1)
    assert first == task.sampled(7, seed=1) != task.sampled(7, seed=2)
    assert [int(item.prompt) for item in first.items] == sorted(int(item.prompt) for item in first.items)
    assert len(first.items) == 7 and task.sampled(None) is task and task.sampled(20) is task


def test_the_digest_of_a_task_sees_items_order_metric_and_length():
    items = (Item("a", "1"), Item("b", "2"))
    digests = {Task("t", items).digest, Task("t", items[::-1]).digest, Task("t", items, "contains").digest}
    assert len(digests | {Task("t", items, max_new_tokens=3).digest}) == 4
    others = [{"stop": (";",)}, {"examples": items}, {"examples": items, "separator": " "}, {"chat": True}]
    others.append({"chat": True, "system": "Answer."})
    assert len({Task("t", items, **other).digest for other in others} | digests) == 8
    assert Task("t", items, separator=" ").digest == Task("t", items).digest  # nothing to separate


GOOD = {"prompt": "a", "target": "b"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"settings": {"metrc": "exact_match"}}, GOOD], r"unknown key 'metrc' \(did you mean 'metric'\?\)"),
        ([{"settings": {"stop": "x"}}, GOOD], "'stop': .*list"),
        ([{"settings": {"max_new_tokens": True}}, GOOD], "'max_new_tokens'"),
        ([{"settings": {"examples": [{"prompt": "a"}]}}, GOOD], "'examples.0.target' is missing"),
        ([GOOD, {"settings": {}}], "line 2: 'settings' is an object and stands alone in the first line"),
        ([{"settings": {"system": "Be brief."}}, GOOD], "set chat: true"),
        ([{"settings": {"metric": "multiple_choice"}}, GOOD | {"choices": ["a"]}], "line 2: 'choices' needs two texts"),
        ([GOOD | {"metric": "multiple_choice", "choices": ["c", "d"]}], "the target among them"),
        ([GOOD | {"choices": "ab"}], "line 1: 'choices' must be a list"),
        ([{"prompt": 1}, {"target": "b"}], r"(?s)line 1: .*'prompt'.*line 1: .*'target'.*line 2: .*'prompt'"),
        ([], "holds no items"),
        ([{"prompt": "a"}], "line 1: an item needs a non-empty string under 'target', got None"),
        ([{"prompt": "a", "target": "b"}, {"prompt": "", "target": "b"}], "line 2: .*'prompt'"),
        ([{"prompt": "a", "target": "b", "metric": "exact"}], "unknown metric 'exact'.*exact_match"),
        ([{"prompt": "a", "target": "b", "metrics": "x"}], "unknown key 'metrics'"),
        ([{"prompt": "a", "target": "b", "max_new_tokens": 0}], "'max_new_tokens'.*greater than or equal to 1"),
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


def test_settings_of_a_task_stand_in_its_first_line(tmp_path):
    settings = {"metric": "multiple_choice", "stop": [";"], "chat": True, "system": "Be brief.", "max_new_tokens": 3}
    lines = [{"settings": settings | {"examples": [GOOD]}}, GOOD | {"choices": ["b", "c"]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = Task("t", (Item("a", "b", ("b", "c")),), "multiple_choice", 3, (";",), (Item("a", "b"),), "\n\n", True)
    assert load_task(tmp_path / "t.jsonl") == replace(expected, system="Be brief.")


def test_problems_of_all_files_are_said_together(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "u.jsonl").write_text("")
    with pytest.raises(TaskError, match=r"(?s)t\.jsonl:\n  line 1: .*u\.jsonl:\n  holds no items"):
        load_tasks(tmp_path)


def test_examples_and_chat_templates_come_before_the_prompt(catalogue):
    tokenizer = TransformersEvaluator(catalogue.base).tokenizer
    items = (Item("c=", "d"),)
    plain = Task("t", items, examples=(Item("a=", "b"),), separator=";")
    assert plain.prompt_text(items[0], tokenizer) == "a=b;c="
    chat = replace(plain, chat=True, system="ab")
    with pytest.raises(TaskError, match="no chat template"):
        chat.prompt_text(items[0], tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    assert chat.prompt_text(items[0], tokenizer) == "s:ab;u:a=;a:b;u:c=;a:"
    (ids,) = chat.encoded_prompts(items, tokenizer)
    assert tokenizer.decode(ids).replace(" ", "") == "s:ab;u:a=;a:b;u:c=;a:"


def test_a_context_and_its_answer_are_cut_from_the_tokens_of_the_whole_text(catalogue):
    tokenizer = TransformersEvaluator(catalogue.base).tokenizer
    before, after = encode_pair("a b ", "cd", tokenizer)
    assert [*before, *after] == tokenizer("a b cd")["input_ids"] and len(before) == 3
    assert encode_pair("  ", "c", tokenizer)[1] == tokenizer("c")["input_ids"]


def test_likelihoods_are_those_of_a_forward_pass(catalogue):
    """Against log-probabilities taken position by position in float64 sums."""
    evaluator = TransformersEvaluator(catalogue.base)
    pairs = [([5, 6, 7], [8, 9]), ([5], [10, 11, 12]), ([5, 6, 7], [8])]
    for (before, after), found in zip(pairs, evaluator.log_likelihoods(pairs), strict=True):
        expected, greedy, probabilities = 0.0, True, []
        for place, token in enumerate(after):
            log_probs = evaluator.log_probs([*before, *after[:place]])[-1]
            expected += float(log_probs[token])
            probabilities.append(math.exp(float(log_probs[token])))
            greedy &= int(log_probs.argmax()) == token
        assert found.total == pytest.approx(expected, abs=1e-5) and found.num_tokens == len(after)
        assert found.is_greedy == greedy
        assert found.mean_probability == pytest.approx(sum(probabilities) / len(after), rel=1e-5)


def test_likelihood_tasks_give_utilities(catalogue):
    evaluator = TransformersEvaluator(catalogue.base)
    items = (Item("a+b=", "c", ("c", "d", "e")), Item("b+b=", "d", ("c", "d", "e")))
    choice = Task("t", items, "multiple_choice").evaluate(evaluator)
    smooth = Task("t", items, "cross_entropy").evaluate(evaluator)
    assert set(choice) <= {0.0, 1.0} and ((smooth > 0) & (smooth < 1)).all()
    assert Task("t", items, "cross_entropy").evaluate(evaluator, np.array([1])).tolist() == smooth[1:].tolist()
    ids = evaluator.tokenizer("a+b=")["input_ids"]
    log_probs = evaluator.log_probs(ids)[-1]
    choices = [float(log_probs[evaluator.tokenizer(text)["input_ids"][0]]) for text in "cde"]
    assert choice[0] == float(int(np.argmax(choices)) == 0)
    assert Task("t", items, "cross_entropy").longest(evaluator.tokenizer) == (6, 1)


def test_one_unlikely_token_lowers_the_arithmetic_mean_less_than_the_geometric(catalogue):
    evaluator = TransformersEvaluator(catalogue.base)
    items = (Item("a+b=", "cab"), Item("a+b=", "c"))
    geometric, arithmetic = (
        Task("t", items, name).evaluate(evaluator) for name in ("cross_entropy", "mean_probability")
    )
    assert 0 < geometric[0] < arithmetic[0] < 1 and geometric[1] == pytest.approx(arithmetic[1])


def test_the_evaluator_holds_the_weights_it_was_given_last(catalogue, catalogue_path):
    tasks = load_tasks(catalogue_path.parent / "tasks")
    swapped = TransformersEvaluator(catalogue.base)
    prompts = tasks["add"].encoded_prompts(tasks["add"].items, swapped.tokenizer)
    for resolved in (
        unmerged(catalogue.checkpoints[1]),
        resolve_plan(pair_plan("m0", "m1", make_arm("ties")), catalogue),
    ):
        swapped.load(resolved)
        if resolved.plan.source:
            fresh = TransformersEvaluator(resolved.checkpoints[0])
            assert swapped.generate(prompts, 5) == fresh.generate(prompts, 5)
            assert torch.equal(swapped.log_probs([5, 9])[-1], fresh.log_probs([5, 9])[-1])
    items = tasks["add"].evaluate(swapped)
    assert items.shape == (len(prompts),) and set(items) <= {0.0, 1.0}
    assert swapped.generate(prompts[::-1], 5) == swapped.generate(prompts, 5)[::-1]
    letter = next(answer[1] for answer in swapped.generate(prompts, 5) if len(answer) > 1)
    assert all(letter not in answer for answer in swapped.generate(prompts, 5, (letter,)))
