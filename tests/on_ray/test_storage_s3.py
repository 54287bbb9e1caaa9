"""Everything of a study in an S3 store: the same signals and labels as from local files, also with two drivers at once.

Real moto server, real Ray workers, which find the store by the environment alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from simmerge_ray.base.storage import RemotePath, as_place, read_json, write_atomically
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.digests import checkpoint_digest
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.write.directory import write_graph, write_merge
from simmerge_ray.merging.write.output import WriteOptions
from simmerge_ray.merging.write.to_store import make_file
from simmerge_ray.on_ray import merge_tasks as distributed_merge
from simmerge_ray.on_ray.merge_tasks import RayRunner
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import pair_plan, resolve_plan
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.signals.table import read_signal_table

ROOT = Path(__file__).parents[2]
SEARCH = {"arms": ["linear", "ties(density=0.2)"], "evaluator": "transformers", "concurrency": 1}


def upload(source: Path, target: RemotePath) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).upload(path)


def study(root: str, out: str) -> str:
    return yaml.safe_dump(
        {
            "catalogue": f"{root}/catalogue.yaml",
            "probes": f"{root}/probes",
            "tasks": f"{root}/tasks",
            "out": out,
            "signals": {"num_workers": 1, "batch_size": 8},
            "search": SEARCH,
        }
    )


@pytest.fixture
def zoo(catalogue_path, bucket) -> RemotePath:
    """The tiny zoo in a bucket."""
    place = as_place(bucket) / "zoo"
    upload(catalogue_path.parent, place)
    return place


def start(study_file: str | Path, ray_address: str | None = None) -> subprocess.Popen[str]:
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    if ray_address:
        environment["RAY_ADDRESS"] = ray_address
    command = [sys.executable, str(ROOT / "jobs" / "build_dataset.py"), str(study_file)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
    )


def results(out) -> tuple[object, object]:
    """Signals and labels, without what says when and where they were made."""
    table = read_signal_table(out / "signals" / "pairs.parquet")
    labels = [(label.key, label.outcome.items.tolist()) for label in LabelStore(out / "labels").read()]
    return {key: vars(row) for key, row in table.rows.items()}, labels


@pytest.fixture
def local_results(catalogue_path, tmp_path, ray_address):
    (tmp_path / "study.yaml").write_text(study(str(catalogue_path.parent), str(tmp_path / "out")))
    process = start(tmp_path / "study.yaml", ray_address)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return results(tmp_path / "out")


@pytest.fixture
def ray_address(ray_cluster) -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def test_a_catalogue_in_a_store_is_the_same_catalogue(zoo, catalogue):
    found = load_catalogue(zoo / "catalogue.yaml")
    assert found.ids == catalogue.ids and found.digests() == catalogue.digests()
    assert {str(ref.path) for ref in found.all_refs} == {f"{zoo}/{name}" for name in ("base", "m0", "m1", "m2")}


@pytest.mark.ray
def test_a_study_in_a_store_gives_what_a_local_one_gives_also_to_two_drivers_at_once(
    zoo, local_results, ray_address, bucket
):
    out = as_place(bucket) / "runs" / "one"
    (zoo.parent / "study.yaml").write_text(study("zoo", "runs/one"))  # relative to the file
    drivers = [start(str(zoo.parent / "study.yaml"), ray_address) for _ in range(2)]
    texts = [driver.communicate(timeout=400)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], "\n".join(texts)
    assert results(out) == local_results
    report = LabelStore(out / "labels").check()
    assert report.problems == () and report.num_labels == len(local_results[1])
    assert read_json(out / "labels" / "_search" / "headroom.json")
    before = {entry.path: entry.version for entry in out.list_below()}
    again = start(str(zoo.parent / "study.yaml"), ray_address)
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and text.count("unchanged since the last run") == 2, text
    assert {entry.path: entry.version for entry in out.list_below()} == before


# What the search does in every actor, without Ray's bookkeeping: two such processes know nothing of each other.
SEARCHING = """
import sys
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.base.config import SearchConfig
from simmerge_ray.on_ray.engines import start_evaluator
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.search.runner import TrialRunner
from simmerge_ray.search.setup import grid_trials, prepare_search
from simmerge_ray.base.storage import as_place

zoo, out, arms = as_place(sys.argv[1]), sys.argv[2], sys.argv[3:]
config = SearchConfig(arms=arms, evaluator="transformers")
study = prepare_search(load_catalogue(zoo / "catalogue.yaml"), load_tasks(zoo / "tasks"), config, out)
runner = TrialRunner(study, start_evaluator)
for trial in grid_trials(study):
    runner.run(trial)
    LabelStore(out).compact()
"""


def test_two_searches_that_know_nothing_of_each_other_make_each_label_once(zoo, bucket):
    arguments = [str(zoo), f"{bucket}/labels", *SEARCH["arms"]]
    both = [
        subprocess.Popen([sys.executable, "-c", SEARCHING, *arguments], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    texts = [one.communicate(timeout=300)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], "\n".join(texts)
    store = LabelStore(f"{bucket}/labels")
    labels = store.read()
    assert len({label.key for label in labels}) == len(labels) == 4 * 2 + 2 * 2 * 2
    assert store.check().problems == ()
    store.compact()
    assert store.check().num_duplicates == 0 and [one.key for one in store.read()] == [one.key for one in labels]


def dying_file(graph, file, out, num_threads):
    """Dies once, before its file is uploaded."""
    mark = out.parent / f"died.{file.file}"
    if file.file.startswith("model-00002") and not mark.exists():
        write_atomically(mark, b"")
        os.kill(os.getpid(), signal.SIGKILL)
    return make_file(graph, file, out, num_threads)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_tasks_merge_into_a_store_without_a_shared_directory(zoo, catalogue, bucket, tmp_path, monkeypatch):
    plan = pair_plan("m0", "m1", make_arm("ties"))
    local = write_merge(resolve_plan(plan, catalogue), tmp_path / "local", max_shard_bytes=100_000)
    graph = compile_plan(resolve_plan(plan, load_catalogue(zoo / "catalogue.yaml")))
    monkeypatch.setattr(distributed_merge, "make_file", dying_file)
    seen: list[tuple[int, int]] = []
    out = as_place(bucket) / "merged"
    result = write_graph(
        graph, out, WriteOptions(progress=lambda *x: seen.append(x), max_shard_bytes=100_000, runner=RayRunner(2))
    )
    assert len(as_place(bucket).glob("died.*")) == 1
    assert seen[-1] == (result.num_bytes, result.num_bytes)
    assert checkpoint_digest(CheckpointRef("m", out)) == checkpoint_digest(CheckpointRef("m", local.path))
