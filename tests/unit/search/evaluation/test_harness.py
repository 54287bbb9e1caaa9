"""Tasks of lm-evaluation-harness: the same scores as through its own `hf` model, without a hub."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from simmerge_ray.base.errors import MissingLibraryError, TaskError
from simmerge_ray.search.evaluation import harness
from simmerge_ray.search.evaluation.harness import HarnessTask, load_harness_tasks
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator

pytest.importorskip("lm_eval")
# What datasets and lm_eval warn of while a task is loaded is theirs.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
NUM_ITEMS = 12
LETTERS = "abcdefghij"


def write_suite(root: Path, evaluator: TransformersEvaluator) -> Path:
    """Tasks `spell` (generate_until), `pick` (multiple_choice), `next` (loglikelihood) and group `three` of them.

    The model's own answers are the targets of every other item, so that scores are neither 0 nor 1.
    """
    root.mkdir(parents=True, exist_ok=True)
    questions = [f"{LETTERS[i % 7]}+{LETTERS[i % 5]}{i}=" for i in range(NUM_ITEMS)]
    prompts = [evaluator.tokenizer(question)["input_ids"] for question in questions]
    answers = evaluator.generate(prompts, 6, (";",))
    rows = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        target = answer if number % 2 and answer.strip() else LETTERS[number % 10]
        choices = [LETTERS[number % 10], LETTERS[(number + 3) % 10] * 2, LETTERS[(number + 5) % 10]]
        rows.append({"q": question, "a": target, "first": target[0], "choices": choices, "gold": number % 3})
    data = root / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{q}}",
        "target_delimiter": "",
        "fewshot_delimiter": ";",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    write_task(
        root,
        "spell",
        common,
        output_type="generate_until",
        doc_to_target="{{a}}",
        generation_kwargs={"until": [";", ":"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0},
        filter_list=[
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {"name": "start", "filter": [{"function": "regex", "regex_pattern": "^(.)"}, {"function": "take_first"}]},
        ],
        metric_list=[{"metric": "exact_match", **mean}],
    )
    write_task(
        root,
        "pick",
        common,
        output_type="multiple_choice",
        doc_to_target="gold",
        doc_to_choice="choices",
        metric_list=[{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    )
    write_task(
        root,
        "next",
        common,
        output_type="loglikelihood",
        doc_to_target="{{first}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
        + [{"metric": "acc", **mean}],
    )
    (root / "three.yaml").write_text(yaml.safe_dump({"group": "three", "task": ["spell", "pick", "next"]}))
    return root


def write_task(root: Path, name: str, common: dict, **settings: object) -> None:
    config = {"task": name, **common, **settings, "metadata": {"version": 1.0}}
    (root / f"{name}.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def evaluator(catalogue) -> TransformersEvaluator:
    return TransformersEvaluator(catalogue.base)


@pytest.fixture(scope="module")
def suite(tmp_path_factory, evaluator) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), evaluator)


@pytest.fixture(scope="module")
def hf(catalogue):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(catalogue.base.path), device="cpu", dtype="float32", batch_size=1)


def of_lm_eval(model, suite: Path, num_fewshot: int | None = None) -> dict:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(suite), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=["three"], task_manager=manager, num_fewshot=num_fewshot, bootstrap_iters=0
    )


def per_item(results: dict, task: HarnessTask) -> list[float]:
    samples = [one for one in results["samples"][task.name] if one["filter"] == task.filter]
    return [float(one[task.metric]) for one in sorted(samples, key=lambda one: one["doc_id"])]


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_scores_are_those_of_lm_eval_s_own_model(suite, evaluator, hf, num_fewshot):
    """Per item and on the whole, for every kind of output, metric and filter, with examples and without."""
    from simmerge_ray.search.evaluation.harness_lm import HarnessLM

    theirs = of_lm_eval(hf, suite, num_fewshot)
    through_ours = of_lm_eval(HarnessLM(evaluator), suite, num_fewshot)
    tasks = list(load_harness_tasks(["three"], suite, num_fewshot).values())
    assert [(task.name, task.metric, task.filter, task.num_items) for task in tasks] == [
        ("spell", "exact_match", "strict", NUM_ITEMS),
        ("pick", "acc", "none", NUM_ITEMS),
        ("next", "acc", "none", NUM_ITEMS),
    ]
    tasks += load_harness_tasks(["spell"], suite, num_fewshot, "exact_match,start").values()
    tasks += load_harness_tasks(["pick"], suite, num_fewshot, "acc_norm").values()
    for task in tasks:
        utilities = task.evaluate(evaluator)
        assert utilities.dtype == np.float64 and utilities.shape == (NUM_ITEMS,)
        assert utilities.tolist() == per_item(theirs, task) == per_item(through_ours, task)
        score = theirs["results"][task.name][f"{task.metric},{task.filter}"]
        assert score == through_ours["results"][task.name][f"{task.metric},{task.filter}"]
        assert utilities.mean() == pytest.approx(score, abs=1e-12)
        if num_fewshot is None and task.metric != "acc_norm" and task.filter != "start":
            assert 0 < score < 1, task.name  # or equal scores would say little
    likelihoods = [
        [[response[0][0] for response in one["resps"]] for one in results["samples"]["pick"]]
        for results in (theirs, through_ours)
    ]
    assert np.allclose(*likelihoods, rtol=0, atol=1e-5)  # float32 sums in another order


def test_items_are_asked_the_same_in_every_evaluation(suite, evaluator):
    """Examples are drawn from one stream: a second evaluation, or one of some items, must not go on in it."""
    for task in load_harness_tasks(["three"], suite, num_fewshot=3).values():
        whole = task.evaluate(evaluator)
        chosen = np.array([7, 2, 11])
        assert task.evaluate(evaluator, chosen).tolist() == whole[chosen].tolist()
        assert task.evaluate(evaluator).tolist() == whole.tolist()
        assert task.evaluate(evaluator, np.array([], dtype=int)).tolist() == []
        sample = task.sampled(5, seed=3)
        assert sample.num_items == 5 and list(sample.chosen) == sorted(sample.chosen)
        assert sample.evaluate(evaluator).tolist() == whole[list(sample.chosen)].tolist()
        assert sample.evaluate(evaluator, np.array([4])).tolist() == [whole[sample.chosen[4]]]
        assert sample.sampled(2).num_items == 2 and set(sample.sampled(2).chosen) < set(sample.chosen)
    limited = load_harness_tasks(["pick"], suite, num_fewshot=3, max_items=5, seed=3)["pick"]
    assert limited.chosen == sample.chosen and limited.digest not in {task.digest, sample.digest}


def test_the_longest_item_counts_what_is_generated(suite, evaluator):
    lines = [json.loads(line) for line in (suite / "items.jsonl").read_text().splitlines()]
    tasks = load_harness_tasks(["three"], suite)
    lengths = {
        "spell": [len(row["q"]) + 6 for row in lines],
        "pick": [len(row["q"]) + 2 + 1 for row in lines],
        "next": [len(row["q"]) + 1 + 1 for row in lines],
    }
    for name, task in tasks.items():
        expected = (max(lengths[name]), lengths[name].index(max(lengths[name])) + 1)
        assert task.longest(evaluator.tokenizer) == expected
        short = TransformersEvaluator.__new__(TransformersEvaluator)
        short.__dict__ |= evaluator.__dict__ | {"max_model_len": expected[0] - 1}
        with pytest.raises(TaskError, match=f"needs {expected[0]} tokens, max_model_len is {expected[0] - 1}"):
            task.evaluate(short)


def test_a_task_is_the_same_in_another_process_and_another_with_other_documents(suite, evaluator, tmp_path):
    tasks = load_harness_tasks(["three"], suite, num_fewshot=2)
    longest = [task.longest(evaluator.tokenizer) for task in tasks.values()]
    script = (
        "import pickle, sys; from pathlib import Path\n"
        "class Letters:\n"
        "    bos_token = bos_token_id = eos_token_id = None\n"
        "    def __call__(self, texts, add_special_tokens):\n"
        "        return {'input_ids': [list(map(ord, text)) for text in texts]}\n"
        "tasks = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        f"assert [task.longest(Letters()) for task in tasks.values()] == {longest}\n"
        "assert 'torch' not in sys.modules\n"
        "from simmerge_ray.search.evaluation.harness import load_harness_tasks\n"
        "again = load_harness_tasks(['three'], Path(sys.argv[2]), num_fewshot=2)\n"
        "print(*[task.digest for task in again.values()])"
    )
    (tmp_path / "tasks.pkl").write_bytes(pickle.dumps(tasks))
    command = [sys.executable, "-c", script, str(tmp_path / "tasks.pkl"), str(suite)]
    environment = os.environ | {"PYTHONPATH": str(Path(harness.__file__).parents[2]), "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [task.digest for task in tasks.values()], done.stderr  # and nothing else is printed

    digests = {task.digest for task in tasks.values()}
    for variant in ({}, {"num_fewshot": 1}, {"num_fewshot": 2, "fewshot_seed": 5}):
        digests |= {task.digest for task in load_harness_tasks(["three"], suite, **variant).values()}
    digests |= {load_harness_tasks(["pick"], suite, 2, "acc_norm")["pick"].digest}
    assert len(digests) == 13
    moved = write_suite(tmp_path / "moved", evaluator)
    assert {t.digest for t in load_harness_tasks(["three"], moved, 2).values()} == {t.digest for t in tasks.values()}
    lines = (moved / "items.jsonl").read_text().splitlines(keepends=True)
    (moved / "items.jsonl").write_text("".join(lines[:-1]) + lines[-1].replace('"gold": 2', '"gold": 1'))
    changed = load_harness_tasks(["three"], moved, 2)
    assert not {task.digest for task in changed.values()} & {task.digest for task in tasks.values()}
    # A process that has not loaded the task yet, and finds other documents than those of the description.
    stale = replace(tasks["pick"], source=changed["pick"].source)
    harness._LEAVES.pop(stale.content)
    with pytest.raises(TaskError, match="'pick' is not the one that was loaded first"):
        stale.evaluate(evaluator)


def test_data_files_are_relative_to_where_the_study_was_started(suite, evaluator, tmp_path, monkeypatch):
    config = yaml.safe_load((suite / "pick.yaml").read_text())
    config |= {"task": "relative", "dataset_kwargs": {"data_files": {"test": "items.jsonl"}}}
    (tmp_path / "relative.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(suite)
    task = load_harness_tasks(["relative"], tmp_path)["relative"]
    expected = task.evaluate(evaluator)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "_LEAVES", {})
    assert task.evaluate(evaluator).tolist() == expected.tolist()
    assert Path.cwd() == tmp_path


def test_problems_of_all_tasks_are_said_together(suite, tmp_path):
    base = yaml.safe_load((suite / "spell.yaml").read_text())
    choice = yaml.safe_load((suite / "pick.yaml").read_text())
    lost = {"dataset_path": "nobody/nothing", "dataset_kwargs": None}
    sampling = {"until": [";"], "do_sample": True, "temperature": 0.7}
    variants = {
        "rolling": base | {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]},
        "lost": base | lost,
        "sampling": base | {"generation_kwargs": sampling},
        "beams": base | {"generation_kwargs": {"until": [";"], "num_beams": 4}},
        "brier": choice | {"metric_list": [{"metric": "brier_score"}, {"metric": "f1"}]},
        "broken": choice | {"doc_to_choice": "{{nothing}}"},
    }
    for name, config in variants.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config | {"task": name}))
    (tmp_path / "round.yaml").write_text(yaml.safe_dump({"group": "round", "task": [{"group": "round"}]}))
    with pytest.raises(TaskError) as caught:
        load_harness_tasks([*variants, "round", "rollin", "hellaswagg"], tmp_path)
    lines = str(caught.value).split("\n  ")
    expected = {
        "rolling": "output type 'loglikelihood_rolling' is not supported; supported: generate_until, loglikelihood",
        "lost": "cannot be built: .*nobody/nothing",
        "sampling": "ask for sampling",
        "beams": "generation_kwargs .'num_beams'. are not supported",
        "brier": "no metric is known to lie in .0, 1. for every item; it has brier_score, f1",
        "broken": "cannot be built: .*nothing",
        "round": "cannot be built: RecursionError",
        "rollin": "unknown task 'rollin' of lm_eval; near: .*rolling",
        "hellaswagg": "unknown task 'hellaswagg' of lm_eval; near: .*hellaswag",
    }
    for name, message in expected.items():
        assert any(repr(name) in line and re.search(message, line) for line in lines), (name, lines)


def test_bad_input(suite, evaluator, tmp_path, monkeypatch):
    with pytest.raises(TaskError, match=r"unknown metric .*'acc_nrm' \(did you mean 'acc_norm'\?\); known: acc, acc_"):
        load_harness_tasks(["pick"], suite, metric="acc_nrm")
    with pytest.raises(TaskError, match="unknown metric .*'perplexity'"):
        load_harness_tasks(["next"], suite, metric="perplexity")
    with pytest.raises(TaskError, match="unknown filter 'loose'; known: start, strict"):
        load_harness_tasks(["spell"], suite, metric="exact_match,loose")
    with pytest.raises(TaskError, match="no names"):
        load_harness_tasks([], suite)
    with pytest.raises(TaskError, match="is not a directory"):
        load_harness_tasks(["pick"], tmp_path / "absent")
    other = yaml.safe_load((suite / "pick.yaml").read_text())
    other |= {"metric_list": [{"metric": "likelihood", "aggregation": "mean", "higher_is_better": True}], "task": "odd"}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(other))
    task = load_harness_tasks(["odd"], tmp_path, metric="likelihood")["odd"]
    with pytest.raises(TaskError, match="'odd', document 0: metric 'likelihood' is .*no number in"):
        task.evaluate(evaluator)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingLibraryError, match=r'pip install "simmerge_ray\[lm_eval\]"'):
        load_harness_tasks(["pick"], suite)


def test_tokens_of_contexts_and_continuations(catalogue, tmp_path):
    """With a tokenizer that begins texts, and one that does not."""
    from transformers import AutoTokenizer

    from simmerge_ray.search.evaluation.harness_lm import encode_pairs, encode_prompts

    plain = TransformersEvaluator(catalogue.base).tokenizer
    letters = dict(zip("abcd", plain("abcd")["input_ids"], strict=True))
    a, b, c = (letters[one] for one in "abc")
    space = plain(" ")["input_ids"][0]
    assert encode_pairs([("a ", "b"), ("", "c"), ("ab", "c")], plain) == [([a], [space, b]), ([1], [c]), ([a, b], [c])]
    with pytest.raises(TaskError, match="the continuation '' of the context 'ab' has no tokens"):
        encode_pairs([("ab", "")], plain)
    beginning = AutoTokenizer.from_pretrained(catalogue.base.path)
    beginning.add_special_tokens({"bos_token": "<bos>"})
    from tokenizers.processors import TemplateProcessing

    bos = beginning.bos_token_id
    beginning.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    assert encode_prompts(["ab", "<bos>ab"], beginning) == [[bos, a, b]] * 2
    pairs = [("a", "b"), ("<bos>a", "b"), ("", "b"), ("", "<bos>b")]
    assert encode_pairs(pairs, beginning) == [([bos, a], [b])] * 2 + [([bos], [b])] * 2


def test_the_data_cache_of_tests_is_private():
    import datasets

    assert str(datasets.config.HF_DATASETS_CACHE).startswith(os.environ["HOME"])
