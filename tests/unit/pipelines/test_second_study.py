"""The second study's zoos in miniature: made by one command, and kept by the next."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import read_json
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.pipelines.choices import read_choice
from simmerge_ray.pipelines.second_study import real as real_module
from simmerge_ray.pipelines.second_study import small as small_module
from simmerge_ray.pipelines.second_study import work as work_module
from simmerge_ray.pipelines.second_study.run import StudyRun
from simmerge_ray.pipelines.second_study.study import run_stages
from simmerge_ray.research.second_study.candidates import fixed_candidates, pair_order
from simmerge_ray.research.second_study.real_recipes import draw_real_experts
from simmerge_ray.research.second_study.real_tasks import REAL_TASKS
from simmerge_ray.research.second_study.results import read_results
from simmerge_ray.research.second_study.small import foreign_part
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.evaluation.answers import PREFIX
from simmerge_ray.search.labels import LabelStore, Measured
from simmerge_ray.selector.predictor.rows import read_candidates
from tests import tiny
from tests.unit.research.second_study.made_up import write_real_tasks


@pytest.fixture
def study(tmp_path, monkeypatch):
    def few(data):
        """A full and a LoRA expert of two steps, of different tasks."""
        drawn = draw_real_experts(data)
        lora = next(one for one in drawn if one.lora_rank)
        chosen = lora, next(one for one in drawn if not one.lora_rank and one.task != lora.task)
        return tuple(replace(one, num_steps=2, num_rows=2) for one in chosen)

    monkeypatch.setattr(real_module, "draw_real_experts", few)
    tiny.save(tiny.make_model(hidden_size=32), tmp_path / "base")
    tasks = write_real_tasks(tmp_path / "tasks")
    return StudyRun(tmp_path / "out", tasks, tmp_path / "base", Narrator.silent())


def test_the_real_zoo_is_made_once_and_assessed(study, tmp_path):
    run_stages(study, ["real-held-out", "real-zoo"])  # in their order, whatever is asked first
    zoo = tmp_path / "out" / "real" / "zoo"
    catalogue = load_catalogue(zoo / "catalogue.yaml")
    assert len(catalogue.ids) == 2 and catalogue.base.id == "base"
    assert sum(ref.adapter is not None for ref in catalogue.checkpoints) == 1
    assert set(load_probe_sets(zoo / "probes")) == set(REAL_TASKS)
    metrics = {name: task.metric for name, task in load_tasks(zoo / "tasks").items()}
    assert metrics == {name: task.metric for name, task in REAL_TASKS.items()}
    assert {task.metric for task in load_tasks(zoo / "tasks-exact").values()} == {"exact_match"}
    held_out = tmp_path / "out" / "real" / "held-out"
    assert set(read_json(held_out / f"{catalogue.ids[0]}.json")["values"]) == set(REAL_TASKS)
    assert (held_out / "zoo.md").read_text().count("\n") == 2 + 3

    def stamps():
        return {path: path.stat().st_mtime_ns for path in zoo.rglob("*.safetensors")}

    made = stamps()
    run_stages(study, ["real-zoo"])
    assert stamps() == made
    second_task = write_real_tasks(tmp_path / "others", num=14)
    run_stages(replace(study, tasks=second_task), ["real-zoo"])  # other data: experts are trained anew, the base stays
    assert sum(stamps()[path] != before for path, before in made.items()) == 2


@pytest.mark.parametrize("missing", ["tasks", "base"])
def test_real_stages_need_tasks_and_a_base(study, missing):
    with pytest.raises(ConfigError, match=f"--{missing}"):
        run_stages(replace(study, **{missing: None}), ["real-pilot"])


def test_shares_of_the_work_add_up_to_all_of_it(study, tmp_path):
    shares = [replace(study, share=(i, 2)) for i in range(2)]
    real = tmp_path / "out" / "real"
    run_stages(shares[0], ["real-zoo"])
    assert len(list((real / "zoo").glob("*/recipe.json"))) == 1
    run_stages(shares[1], ["real-zoo"])
    assert len(list((real / "zoo").glob("*/recipe.json"))) == 2
    run_stages(shares[1], ["real-choices", "real-labels"])  # the one pair is not its own
    assert not (real / "choices" / "pairs").exists()
    labels = LabelStore(real / "labels")
    assert not any(one.plan.is_merge for one in labels.read()) and labels.read()
    run_stages(shares[0], ["real-choices", "real-labels"])
    together = {(one.plan.id, one.task) for one in labels.read()}
    run_stages(study, ["real-choices", "real-labels"])
    assert {(one.plan.id, one.task) for one in labels.read()} == together


def test_choices_and_labels_are_made_once_and_an_interrupted_run_goes_on(study, tmp_path, monkeypatch):
    run_stages(study, ["real-zoo", "real-choices", "real-labels"])
    real = tmp_path / "out" / "real"
    (pair,) = pair_order(load_catalogue(real / "zoo" / "catalogue.yaml"))
    assert [path.name for path in (real / "choices" / "pairs").iterdir()] == [f"{pair[0]}+{pair[1]}.json"]
    chosen = read_choice(real / "choices", pair).plan
    labels = LabelStore(real / "labels").read()
    plans = {one.plan for one in labels if one.plan.is_merge}
    assert plans == {*fixed_candidates(pair).values(), *([chosen] if chosen.is_merge else [])}
    assert all(isinstance(one.outcome, Measured) for one in labels)
    of_average = {one.task for one in labels if one.plan == fixed_candidates(pair)["average"]}
    tasks = {name.rpartition("-")[0] for name in pair}
    assert {one for one in of_average if not one.startswith(PREFIX)} == tasks
    assert sum(one.startswith(PREFIX) for one in of_average) == 2  # what it keeps of both members
    rows = read_candidates([real / "labels"])
    run_stages(study, ["real-results"])
    results = read_results(real / "results")
    assert [one.members for one in results.pairs] == [pair] and results.num_pairs == 1
    assert len(LabelStore(real / "results" / "labels").read()) == len(labels)
    assert read_json(real / "results" / "figures.json")["counts"]["pairs"] == 1
    run_stages(study, ["real-four"])  # of the two tasks that there are
    four = read_json(real / "four" / "four.json")["candidates"]
    by_label = {row["label"]: row["measured"] for row in four if row["measured"]}
    assert {*pair, "base"} < set(by_label) and all(set(found) >= tasks for found in by_label.values())
    pairs = replace(study, num_members=2)
    run_stages(pairs, ["real-sets", "real-sets-results"])
    sets = real / "sets"
    assert {one.settings.dtype for one in LabelStore(sets / "labels").read()} == {"bfloat16"}
    assert read_choice(sets / "choices", pair).members == pair
    assert read_json(sets / "results" / "figures.json")["sizes"]["2"]["counts"] == {"sets": 1, "of": 1}
    made = {path: path.stat().st_mtime_ns for path in sets.rglob("*.parquet")}
    run_stages(pairs, ["real-sets"])
    assert {path: path.stat().st_mtime_ns for path in sets.rglob("*.parquet")} == made
    shutil.copytree(sets / "results", tmp_path / "published" / "sets")
    shutil.rmtree(sets)
    again = replace(pairs, published=tmp_path / "published")
    monkeypatch.setattr(work_module, "choose_for", lambda *given: pytest.fail("what is published is not chosen again"))
    run_stages(again, ["real-sets", "real-sets-results"])
    assert read_json(sets / "results" / "choices.json") == read_json(tmp_path / "published" / "sets" / "choices.json")
    labels_of = [LabelStore(place / "labels").read() for place in (sets, tmp_path / "published" / "sets")]
    assert [one.key for one in labels_of[0]] == [one.key for one in labels_of[1]]
    assert len(list((sets / "labels").glob("*.parquet"))) == 1  # nothing was measured
    assert set(rows.tasks) == tasks and ((rows.utility >= 0) & (rows.utility <= 1)).all()

    for path in sorted((real / "labels").glob("*.parquet"))[:1]:
        path.unlink()  # as if interrupted before it
    run_stages(study, ["real-choices", "real-labels"])
    assert {one.key for one in LabelStore(real / "labels").read()} == {one.key for one in labels}


def test_small_zoos_are_trained_chosen_for_labelled_and_published(tmp_path, monkeypatch):
    def tiny_part(seed):
        part = foreign_part(seed, 1, step_share=0.002)
        base = replace(part.base, num_layers=1, hidden_size=32, intermediate_size=32)
        return replace(part, base=base, experts=part.experts[:2])

    monkeypatch.setattr(small_module, "foreign_part", tiny_part)
    study = StudyRun(tmp_path, None, None, Narrator.silent(), share=(1, 2), num_pairs=1, num_bases=3)
    small = tmp_path / "small"
    run_stages(study, ["small-zoos"])
    assert [path.name for path in (small / "zoo").glob("f*")] == ["f22"]  # the second of three
    run_stages(study, ["small-choices", "small-labels", "small-results"])
    (pair,) = load_catalogue(small / "zoo" / "f22" / "catalogue.yaml").pairs()
    choice = read_choice(small / "choices" / "f22", pair)
    labels = LabelStore(small / "labels" / "f22").read()
    assert {*fixed_candidates(pair).values(), choice.plan, choice.answer} <= {one.plan for one in labels}
    results = read_results(small / "results")
    assert results.bases == ("f22-base",) and [one.members for one in results.pairs] == [pair]
    assert set(results.singles) == {"f22-base", *pair} and results.own_task[pair[0]] == pair[0].split("-")[1]
    assert read_json(small / "results" / "figures.json")["counts"]["bases"] == 1
    whole = replace(study, share=(0, 1), num_bases=2)
    monkeypatch.setattr(small_module, "make_zoo_parts", lambda *given: pytest.fail("nothing is to be trained"))
    run_stages(whole, ["small-results"])  # of the bases that are labelled so far
    assert read_results(small / "results").bases == ("f22-base",)
