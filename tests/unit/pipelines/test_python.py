"""`import simmerge_ray as sm`: what the commands do, from Python, on the tiny catalogue."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import simmerge_ray as sm
from simmerge_ray.plans.plan import plan_from_json
from simmerge_ray.signals.candidates import units
from simmerge_ray.signals.candidates.answers import write_answers
from tests.artifacts import write_artifacts

FIND = sm.FindConfig(members=("m0", "m1"), num_recipes=200, shortlist=2, tune="none", max_tokens=4)


@pytest.fixture(scope="module")
def best(catalogue, catalogue_path) -> sm.Best:
    return sm.auto(catalogue, catalogue_path.parent / "probes", FIND)


def test_every_name_is_there_documented_and_typed():
    for name in sm.__all__:
        found = getattr(sm, name)
        assert name in dir(sm)
        if callable(found):
            assert found.__doc__, name
            names = {**vars(importlib.import_module(found.__module__)), **_later()}
            hints = typing.get_type_hints(found, names)
            assert isinstance(found, type) or "return" in hints, name
    with pytest.raises(AttributeError, match="'autom'"):
        _ = sm.autom


def _later() -> dict[str, object]:
    """Names that are imported for type checkers only."""
    from simmerge_ray.merging.write.output import MergeResult
    from simmerge_ray.selector.planning.scorer import Ranking
    from simmerge_ray.signals.table import SignalTable

    return {"MergeResult": MergeResult, "Ranking": Ranking, "SignalTable": SignalTable}


def test_the_names_for_type_checkers_are_those_at_run_time():
    """The imports under TYPE_CHECKING and the table say the same."""
    source = (importlib.util.find_spec("simmerge_ray") or pytest.fail()).loader.get_source("simmerge_ray")
    block = source.split("if TYPE_CHECKING:\n")[1].split("\n\n")[0]
    names: dict[str, object] = {}
    exec("\n".join(line.strip() for line in block.splitlines()), names)
    names = {name: value for name, value in names.items() if not name.startswith("__")}
    assert names == {name: getattr(sm, name) for name in sm.__all__ if name != "__version__"}


def test_importing_is_light_and_the_names_are_lazy():
    code = (
        "import sys, simmerge_ray as sm; dir(sm); sm.Catalogue, sm.auto; print(*{m.split('.')[0] for m in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "transformers"} & set(loaded)


def test_auto_finds_what_it_keeps_and_writes_it(best, catalogue, tmp_path):
    assert set(best.retention) == {"m0 on add", "m1 on copy"}
    json.dumps(best.content)
    assert best.retention == best.content["keeps"] and all(0 <= kept <= 1 for kept in best.retention.values())
    by_label = {row["label"]: row for row in best.candidates}
    assert by_label["m0"]["retention"]["m0 on add"] == by_label["m1"]["retention"]["m1 on copy"] == 1.0
    assert best.candidates[0]["label"] == best.label and {"base"} <= set(by_label)
    assert ("merge " if best.is_merge else "keep ") + best.label in repr(best)
    merge = next(row for row in best.candidates if "m0" in row["label"] and "m1" in row["label"])
    plan = sm.Best(best.catalogue, plan_from_json(merge["plan"]), best.content)
    assert plan.is_merge and plan.retention == merge["retention"]
    result = plan.write(str(tmp_path / "merged"))
    assert (result.path / "model.safetensors").is_file()
    assert "m0 on add" in (result.path / "README.md").read_text()
    kept = sm.Best(best.catalogue, plan_from_json(by_label["m0"]["plan"]), best.content)
    with pytest.raises(sm.InputError, match="keep 'm0' as it is"):
        kept.write(tmp_path / "kept")


def test_auto_goes_on_from_a_directory_and_takes_probe_sets(best, catalogue, catalogue_path, tmp_path):
    probes = {
        task: sm.ProbeSet(task, (sm.Probe(f"{task[0]}1+2="), sm.Probe(f"{task[0]}3="))) for task in ("add", "copy")
    }
    first = sm.auto(catalogue, probes, FIND, out=tmp_path)
    assert first.candidates[0]["num_probes"] == 2
    assert (tmp_path / "signatures").is_dir() and (tmp_path / "labels").is_dir()
    assert sm.auto(catalogue, probes, FIND, out=tmp_path).content == first.content


def test_what_does_not_fit_is_one_error_before_anything_runs(catalogue, catalogue_path, tmp_path):
    probes, tasks = catalogue_path.parent / "probes", catalogue_path.parent / "tasks"
    with pytest.raises(sm.InputError, match="unknown checkpoint 'm9'"):
        sm.auto(catalogue, probes, sm.FindConfig(members=("m9",)), out=tmp_path / "out")
    with pytest.raises(sm.InputError, match=r"FindConfig:\n.*'num_recipe' \(did you mean 'num_recipes'\?\)"):
        sm.FindConfig(num_recipe=500)
    with pytest.raises(sm.InputError, match=r"'ways': .*got 'x'\n.*'tune': .*'layer'.*, got 'layers'"):
        sm.FindConfig(ways="x", tune="layers")
    with pytest.raises(sm.InputError, match="give both"):
        sm.auto(catalogue, probes, FIND, out=tmp_path / "out", tasks=tasks)
    with pytest.raises(sm.InputError, match="on_ray=True"):
        sm.auto(catalogue, probes, FIND, out=tmp_path / "out", tasks=tasks, evaluate=2)
    with pytest.raises(sm.InputError, match="absent"):
        sm.Catalogue.load(tmp_path / "absent.yaml")
    assert not list(tmp_path.iterdir())


def test_merge_takes_mergekits_yaml(catalogue_path, tmp_path):
    members = [{"model": str(catalogue_path.parent / name), "parameters": {"weight": 0.5}} for name in ("m0", "m1")]
    (tmp_path / "merge.yml").write_text(json.dumps({"merge_method": "linear", "models": members, "dtype": "float32"}))
    result = sm.merge(tmp_path / "merge.yml", tmp_path / "merged")
    left, right, merged = (
        load_file(path / "model.safetensors")
        for path in (catalogue_path.parent / "m0", catalogue_path.parent / "m1", result.path)
    )
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, 0.5 * left[name] + 0.5 * right[name], rtol=1e-6)


@pytest.fixture(scope="module")
def artifacts(catalogue_path, tmp_path_factory):
    return write_artifacts(tmp_path_factory.mktemp("run"), catalogue_path)


def test_signals_are_those_of_the_command_and_ranks_read_them(catalogue, catalogue_path, artifacts, tmp_path):
    config = sm.SignalsConfig(batch_size=8, num_positions=20, num_attention_positions=6, num_coordinates=500)
    table = sm.pair_signals(catalogue, str(catalogue_path.parent / "probes"), config, tmp_path / "pairs.parquet")
    assert table.get("m0", "m1", "add").features["kl_lr_mean"] >= 0
    assert (tmp_path / "pairs.parquet").read_bytes() == (artifacts / "pairs.parquet").read_bytes()
    files = sm.RankingFiles(signals=tmp_path / "pairs.parquet", selector=artifacts / "selector")
    ranking = sm.rank(catalogue, files, sm.RankingConfig(propagator="second_order"), top=3)
    assert len(ranking.plans) == 3 and ranking.plans[0].score >= ranking.plans[-1].score


def test_retention_is_the_report_card_of_any_checkpoint(catalogue, catalogue_path, capfd):
    rows = sm.retention("m0", catalogue, catalogue_path.parent / "probes", max_tokens=4)
    assert {row["member"] for row in rows} == {"m0", "m1", "m2"}
    assert next(row for row in rows if row["member"] == "m0")["retention"] == 1.0
    assert capfd.readouterr() == ("", "")  # no progress bars either


def test_retention_takes_the_answers_that_auto_has_written(catalogue, catalogue_path, tmp_path, monkeypatch):
    """Those of two members of three; the third one's are written, and kept."""
    probes, calls = catalogue_path.parent / "probes", []

    def counted(*given):
        calls.append(given)
        return write_answers(*given)

    sm.auto(catalogue, probes, FIND, out=tmp_path)
    monkeypatch.setattr(units, "write_answers", counted)
    plain = sm.retention("m1", catalogue, probes, max_tokens=4)
    for of, expected in ((tmp_path / "empty", 3), (tmp_path / "signatures", 1), (tmp_path / "signatures", 0)):
        calls.clear()
        assert sm.retention("m1", catalogue, probes, max_tokens=4, signatures=of) == plain
        assert len(calls) == expected * 2  # batches of a task's 24 probes


def test_the_notebook_runs_from_top_to_bottom(catalogue_path, tmp_path, monkeypatch):
    """docs/quickstart.ipynb: its code cells in order, on the tiny catalogue in the place of the demo's zoo."""
    shutil.copytree(catalogue_path.parent, tmp_path / "runs" / "quick" / "zoo")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((Path(__file__).parents[3] / "docs" / "quickstart.ipynb").read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert isinstance(names["best"], sm.Best) and len(names["ranking"].plans) == 3
    assert (tmp_path / "runs" / "quick" / "from-notebook").exists() == names["best"].is_merge
    assert (tmp_path / "runs" / "quick" / "linear" / "model.safetensors").exists()


def test_it_is_found_from_a_directory_that_holds_a_clone_of_its_name(tmp_path):
    (tmp_path / "simmerge_ray" / "docs").mkdir(parents=True)
    code = "import simmerge_ray as sm; print(sm.Catalogue.__name__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout == "Catalogue\n", found.stderr
