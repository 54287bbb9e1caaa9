"""Candidate signals beside labels, from a search in this process to the rows that a predictor learns from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.checkpoints.probes import ProbeSet, load_probe_sets
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe
from simmerge_ray.research.predictor.regret import regrets, rule
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.evaluation.answers import PREFIX
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.search.labels import LabelStore, pair_contexts
from simmerge_ray.search.runner import TrialRunner
from simmerge_ray.search.setup import grid_trials, prepare_search
from simmerge_ray.selector.predictor.answers import answers_by_owner, note_answers, read_notes
from simmerge_ray.selector.predictor.rows import read_candidates
from simmerge_ray.signals.candidates.answers import AnswerSpec
from simmerge_ray.signals.candidates.signatures import collect_answers, members_answers
from simmerge_ray.signals.compute import local_executor
from simmerge_ray.signals.signature import SignatureStore

LOCAL = SearchConfig(arms=("linear",), evaluator="transformers", pairs="all", max_items=4)


@pytest.fixture(scope="module")
def answers(catalogue, catalogue_path, tmp_path_factory):
    probes = load_probe_sets(catalogue_path.parent / "probes")
    few = {task: ProbeSet(task, some.probes[:4]) for task, some in probes.items()}
    place = tmp_path_factory.mktemp("signatures")
    store = SignatureStore(place)
    written = members_answers(catalogue, few, store, local_executor(catalogue), AnswerSpec(4))
    assert not list(place.glob("kept-*"))  # no checkpoint is run over the answers of the others
    whole = collect_answers(catalogue, few, store, local_executor(catalogue), AnswerSpec(4))
    assert list(written) == [one.owner for one in whole]
    for one in whole:
        assert (written[one.owner].tokens == one.answers.tokens).all()
    return written


@pytest.fixture(scope="module")
def study(catalogue, catalogue_path, answers, tmp_path_factory):
    """A grid with answers, run whole, and the plans of a recipe beside it."""
    labels = tmp_path_factory.mktemp("labels")
    tasks = {name: task.sampled(4, 0) for name, task in load_tasks(catalogue_path.parent / "tasks").items()}
    note_answers(labels, answers, "base")
    search = prepare_search(catalogue, tasks, LOCAL, str(labels), answers=answers_by_owner(answers, "base"))
    runner = TrialRunner(
        search, lambda one: TransformersEvaluator(one.template, max_model_len=one.settings.max_model_len)
    )
    recipe = MergePlan(recipe=Recipe(make_arm("task_arithmetic"), ("m1", "m0"), (0.4, 0.9)))
    for trial in (*grid_trials(search), *grid_trials(search, [recipe])):
        runner.run(trial)
    return search, labels, recipe


def test_a_merge_is_asked_for_its_members_answers_and_a_checkpoint_for_all(study):
    search, _, recipe = study
    assert search.asked_of(recipe) == ("add", "copy", "answers of m0 to add", "answers of m1 to copy")
    of_base = search.asked_of(MergePlan(source="base"))
    assert of_base == ("add", "copy", "answers of m0 to add", "answers of m1 to copy", "answers of m2 to add")
    assert grid_trials(search) == [] == grid_trials(search, [recipe])


def test_answers_are_labels_like_any_other_and_count_for_nothing(study):
    search, labels, _ = study
    assert not LabelStore(labels).check().problems
    written = {label.task for label in LabelStore(labels).read()}
    assert {name for name in written if name.startswith(PREFIX)} == {
        "answers of m0 to add", "answers of m1 to copy", "answers of m2 to add",
    }  # fmt: skip
    assert {context.task for context in pair_contexts(LabelStore(labels).read(), ["linear"])} == {"add", "copy"}
    assert all(set(found) <= {"add", "copy"} for found in search.labels().values())
    assert search.values({"add": 0.25, "copy": 0.5, "answers of m0 to add": 1.0}) == (0.375,)
    assert np.isnan(search.values({"answers of m0 to add": 1.0})[0])


def test_without_answers_nothing_is_asked_and_the_labels_are_the_same(study, catalogue):
    search, _, recipe = study
    plain = prepare_search(catalogue, search.tasks, LOCAL, search.labels_uri)
    assert plain.asked_of(recipe) == ("add", "copy")
    assert grid_trials(plain) == [] and plain.key(recipe, "add") == search.key(recipe, "add")


def test_rows_are_what_was_measured(study, answers):
    search, labels, recipe = study
    rows = read_candidates([labels])
    assert set(rows.members) == {("m0", "m1"), ("m0", "m2"), ("m1", "m2")}
    assert {base.split("@")[0] for base in rows.bases} == {"base"}
    own = [n for n, plan in enumerate(rows.plans) if plan == recipe]
    assert [rows.tasks[n] for n in own] == ["add", "copy"]
    known = {(label.plan, label.task): label.outcome for label in LabelStore(labels).read()}
    for n in own:
        assert rows.utility[n] == known[recipe, rows.tasks[n]].utility
        owner = {"add": "m0", "copy": "m1"}[rows.tasks[n]]
        (task,) = search.answers[owner]
        kept, nll = task.kept_and_nll(known[recipe, task.name].items)
        assert rows.features[n, :2] == pytest.approx([kept.mean(), nll.sum() / task.num_tokens.sum()])
    # Each member as it is and the base are candidates of every set of members, and a member keeps all of its answers.
    for members in set(rows.members):
        sources = {p.source for p, of in zip(rows.plans, rows.members, strict=True) if of == members and p.source}
        assert sources == {"base", *members}
    place = next(n for n, p in enumerate(rows.plans) if p.source == "m1" and rows.tasks[n] == "copy")
    assert rows.features[place, 0] == 1.0
    # Both owners of one task share it.
    both = [n for n, of in enumerate(rows.members) if of == ("m0", "m2")]
    assert {rows.tasks[n] for n in both} == {"add"}


def test_members_that_answer_alike_are_both_told_of(catalogue, catalogue_path, answers, tmp_path):
    """Their answers are one task, so that a label of them stands once, under either name."""
    owners = {owner.checkpoint: owner for owner in answers}
    alike = dict(answers) | {owners["m2"]: answers[owners["m0"]]}
    tasks = {name: task.sampled(4, 0) for name, task in load_tasks(catalogue_path.parent / "tasks").items()}
    note_answers(tmp_path, alike, "base")
    search = prepare_search(catalogue, tasks, LOCAL, str(tmp_path), answers=answers_by_owner(alike, "base"))
    runner = TrialRunner(
        search, lambda one: TransformersEvaluator(one.template, max_model_len=one.settings.max_model_len)
    )
    for trial in grid_trials(search):
        runner.run(trial)
    of_base = [label.task for label in LabelStore(tmp_path).read() if label.plan == MergePlan(source="base")]
    assert sum(name.startswith(PREFIX) for name in of_base) == 2
    assert set(read_candidates([tmp_path]).members) == {("m0", "m1"), ("m0", "m2"), ("m1", "m2")}


def test_the_note_says_whose_answers_they_are(study, answers):
    _, labels, _ = study
    notes = {note.name: note for note in read_notes(labels)}
    assert notes["answers of m1 to copy"].owner == "m1" and notes["answers of m1 to copy"].task == "copy"
    tasks = {one.name: one for some in answers_by_owner(answers, "base").values() for one in some}
    for name, note in notes.items():
        assert (note.num_tokens == tasks[name].num_tokens).all() and note.digest == tasks[name].digest
    (path,) = (labels / "_answers").iterdir()
    path.write_text('{"schema": 7, "answers": []}')
    with pytest.raises(LabelError, match="schema 7, this version reads 1"):
        read_notes(labels)
    path.unlink()
    with pytest.raises(LabelError, match="no candidate signals in .*--probes"):
        read_candidates([labels])
    note_answers(labels, answers, "base")


def test_regret_is_lost_to_the_best_candidate(study):
    _, labels, _ = study
    rows = read_candidates([labels])
    rows = replace(rows, utility=rule(rows))  # the truth is what the rule says
    assert set(regrets(rows, rule(rows)).values()) == {0.0}
    worst = regrets(rows, -rule(rows))
    spread = {}
    for choice, plans in rows.choices().items():
        means = [rows.utility[some].mean() for some in plans.values()]
        spread[choice] = max(means) - min(means)
    assert worst == pytest.approx(spread)
