"""The real zoo in miniature: made by one command, and kept by the next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import read_json
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.pipelines import second_study
from simmerge_ray.pipelines.second_study import SecondStudy
from simmerge_ray.research.second_study.real_recipes import draw_real_experts
from simmerge_ray.research.second_study.real_tasks import REAL_TASKS
from simmerge_ray.search.evaluation import load_tasks
from tests import tiny
from tests.unit.research.second_study.made_up import write_real_tasks


@pytest.fixture
def study(tmp_path, monkeypatch):
    def few(data):
        """A full and a LoRA expert of two steps, of different tasks."""
        drawn = draw_real_experts(data)
        chosen = next(one for one in drawn if one.lora_rank), next(one for one in drawn if not one.lora_rank)
        return tuple(replace(one, num_steps=2, num_rows=2) for one in chosen)

    monkeypatch.setattr(second_study, "draw_real_experts", few)
    tiny.save(tiny.make_model(hidden_size=32), tmp_path / "base")
    tasks = write_real_tasks(tmp_path / "tasks")
    return SecondStudy(tmp_path / "out", tasks, tmp_path / "base", Narrator.silent())


def test_the_real_zoo_is_made_once_and_assessed(study, tmp_path):
    study.run(["real-held-out", "real-zoo"])  # in their order, whatever is asked first
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
    study.run(["real-zoo"])
    assert stamps() == made
    second_task = write_real_tasks(tmp_path / "others", num=14)
    replace(study, tasks=second_task).run(["real-zoo"])  # other data: experts are trained anew, the base stays
    assert sum(stamps()[path] != before for path, before in made.items()) == 2


@pytest.mark.parametrize("missing", ["tasks", "base"])
def test_real_stages_need_tasks_and_a_base(study, missing):
    with pytest.raises(ConfigError, match=f"--{missing}"):
        replace(study, **{missing: None}).run(["real-pilot"])
