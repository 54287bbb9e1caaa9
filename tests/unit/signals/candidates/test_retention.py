"""The report card of a merge: a member keeps all of its own answers, the base and others what a slow look finds."""

from __future__ import annotations

import json

import pytest

from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.signals.candidates.answers import AnswerSpec
from simmerge_ray.signals.candidates.retention import answers_of, member_retentions, repetition
from simmerge_ray.signals.collect import ProbeModel
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.tokens import tokenize_probes

SPEC = AnswerSpec(max_tokens=6, num_kept=10)


@pytest.fixture(scope="module")
def batches(catalogue, catalogue_path):
    return tokenize_probes(catalogue, load_probe_sets(catalogue_path.parent / "probes"), SignatureSpec(), 6)


def test_a_member_keeps_all_of_its_own_answers(catalogue, batches):
    cards = {card.member: card for card in member_retentions(catalogue.ref("m1"), catalogue, batches, SPEC)}
    assert cards["m1"].scores.retention == 1.0
    assert cards["m1"].scores.mean_kl == pytest.approx(0.0, abs=1e-6)
    assert cards["m1"].own == cards["m1"].answers
    assert cards["m0"].scores.mean_kl > 0.001
    assert [card.task for card in cards.values()] == [catalogue.own_task[name] for name in catalogue.ids]


def test_probed_by_an_evaluator_is_the_same_retention(catalogue, batches, tmp_path):
    """One definition, two ways: hooks over micro-batches, and the evaluator's likelihoods of whole sequences."""
    merge = resolve_plan(MergePlan(recipe=plain_average(["m0", "m1"])), catalogue)
    written = write_merge(merge, tmp_path / "merged").path
    cards = member_retentions(type(catalogue.ref("m0"))("merged", written), catalogue, batches, SPEC)
    evaluator = TransformersEvaluator(catalogue.base)
    evaluator.load(merge)
    runner = ProbeModel()
    for card in cards:
        member = catalogue.ref(card.member)
        answers = answers_of(runner, member, card.task, batches[card.task], SPEC)
        rows = [
            ids[mask.bool()].tolist()
            for batch in batches[card.task]
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        pairs = [(prompt, list(own)) for prompt, own in zip(rows, card.own, strict=True)]
        assert answers.num_answers == len(pairs)
        task = AnswersTask(card.member, pairs)
        kept, nll = task.kept_and_nll(task.evaluate(evaluator))
        assert kept.tolist() == card.scores.kept.tolist()
        assert nll == pytest.approx(card.scores.nll.tolist(), abs=1e-4)
        found = [-likelihood.total for likelihood in evaluator.log_likelihoods(pairs)]
        assert found == pytest.approx(card.scores.nll.tolist(), abs=1e-4)


def test_answers_of_one_token_at_the_most_are_answers(catalogue, batches):
    cards = member_retentions(catalogue.ref("m0"), catalogue, batches, AnswerSpec(max_tokens=1, num_kept=10))
    assert cards[0].scores.retention == 1.0 and set(map(len, cards[0].own)) == {1}


def test_repetition_counts_trigrams_that_came_before():
    assert repetition([[1, 2, 3, 1, 2, 3]]) == 0.25
    assert repetition([[1, 2], []]) == 0.0


def test_the_command_prints_a_table_and_writes_json(catalogue_path, tmp_path, simmerge):
    root = catalogue_path.parent
    options = ("--catalogue", catalogue_path, "--probes", root / "probes", "--max-tokens", "4", "--examples", "1")
    result = simmerge("retention", "m0", *options, "--out", tmp_path / "card.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "100 %" in result.stdout and "farthest from m1" in result.stdout
    rows = json.loads((tmp_path / "card.json").read_text())["members"]
    assert [row["member"] for row in rows] == list(load_catalogue(catalogue_path).ids)
    assert rows[0]["retention"] == 1.0 and rows[0]["num_answers"] == 24
    assert len(rows[1]["examples"]) == 1


def test_members_without_task_or_probes_are_one_error(catalogue_path, tmp_path, simmerge):
    text = (
        catalogue_path.read_text()
        .replace("path: ", f"path: {catalogue_path.parent}/")
        .replace("task: add", "task: sub")
    )
    (tmp_path / "catalogue.yaml").write_text(text.replace("  task: copy\n", ""))
    result = simmerge(
        "retention", "m0", "--catalogue", "catalogue.yaml", "--probes", catalogue_path.parent / "probes", cwd=tmp_path
    )
    assert result.returncode == 2
    assert "'m0': no probes of its task; write sub.jsonl" in result.stderr and "'m1' has no task" in result.stderr
