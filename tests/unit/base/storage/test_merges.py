"""Merges of and into a store: the bytes of a local merge, visible when whole, going on after an interruption."""

from __future__ import annotations

import json

import pytest

from simmerge_ray.base.errors import CheckpointError, OutputError, StorageError
from simmerge_ray.base.storage import RemotePath, as_place, write_atomically
from simmerge_ray.checkpoints.digests import checkpoint_digest
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.model import load_model
from simmerge_ray.merging.write import to_store
from simmerge_ray.merging.write.directory import write_graph, write_merge
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import pair_plan, read_plan, resolve_plan, write_plan
from tests import tiny
from tests.unit.checkpoints.test_adapters import CONFIGS, make_adapter

SHARD = 30_000  # bytes: several files


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMERGE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def resolved(catalogue):
    return resolve_plan(pair_plan("m0", "m1", make_arm("ties")), catalogue)


@pytest.fixture
def remote(resolved, catalogue_path, bucket):
    """The same plan, of checkpoints in the store."""
    for path in catalogue_path.parent.rglob("*"):
        if path.is_file():
            (as_place(bucket) / "zoo" / path.relative_to(catalogue_path.parent)).upload(path)
    write_plan(catalogue_path.parent / "plan.json", resolved)
    value = json.loads((catalogue_path.parent / "plan.json").read_text())
    (catalogue_path.parent / "plan.json").unlink()
    value["checkpoints"] = {name: name for name in value["checkpoints"]}
    value["base"]["path"] = "base"
    place = as_place(bucket) / "zoo" / "plan.json"
    write_atomically(place, json.dumps(value).encode())
    return read_plan(place)[0]


def weights(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def test_a_merge_of_and_into_a_store_has_the_bytes_of_a_local_one(resolved, remote, bucket, tmp_path):
    local = write_merge(resolved, tmp_path / "local", max_shard_bytes=SHARD)
    out = as_place(bucket) / "merged"
    seen: list[tuple[int, int]] = []
    result = write_merge(remote, out, max_shard_bytes=SHARD, progress=lambda *x: seen.append(x))
    assert weights(out) == weights(local.path) and len(weights(out)) > 3
    assert (result.num_bytes, result.num_tensors) == (local.num_bytes, local.num_tensors)
    assert seen[-1] == (result.num_bytes, result.num_bytes) and seen == sorted(seen)
    merged = CheckpointRef("merged", out)
    assert checkpoint_digest(merged) == checkpoint_digest(CheckpointRef("merged", local.path))
    names = {path.name for path in out.glob("*")}
    assert {"config.json", "tokenizer.json", "simmerge_plan.json", "model.safetensors.index.json"} <= names
    assert not [name for name in names if name.startswith("merge.")]
    ours, theirs = load_model(merged).state_dict(), load_model(CheckpointRef("merged", local.path)).state_dict()
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs) and ours.keys() == theirs.keys()
    write_merge(remote, out, max_shard_bytes=10 * SHARD)
    assert checkpoint_digest(merged) == checkpoint_digest(CheckpointRef("merged", local.path))
    assert len(weights(out)) < len(weights(local.path)), "files of the merge before are gone"


def test_only_what_a_merge_reads_of_a_checkpoint_is_fetched(remote, bucket, monkeypatch):
    """Headers and weights by ranges; no weight file is fetched as a whole."""
    whole = []
    original = RemotePath.read_range

    def read(place, start, stop):
        if start is None and place.suffix == ".safetensors":
            whole.append(place)
        return original(place, start, stop)

    monkeypatch.setattr(RemotePath, "read_range", read)
    write_merge(remote, as_place(bucket) / "merged")
    assert whole == []


def test_an_interrupted_merge_is_no_checkpoint_and_goes_on(resolved, remote, bucket, tmp_path, monkeypatch):
    local = write_merge(resolved, tmp_path / "local", max_shard_bytes=SHARD)
    out = as_place(bucket) / "merged"
    original, made, limit = RemotePath.upload, [], 3

    def away(target, source):
        if target.suffix == ".safetensors":
            if len(made) == limit:
                raise StorageError("the store is away")
            made.append(target)
        return original(target, source)

    monkeypatch.setattr(RemotePath, "upload", away)
    with pytest.raises(StorageError, match="is away"):
        write_merge(remote, out, max_shard_bytes=SHARD)
    assert not (out / "config.json").exists() and len(weights(out)) == 3
    limit = None
    result = write_merge(remote, out, max_shard_bytes=SHARD)
    assert result.num_resumed > 0 and len(made) == len(set(made)) == len(weights(out))
    assert weights(out) == weights(local.path)


def test_a_target_of_others_is_refused_and_a_refused_merge_leaves_nothing(remote, bucket, monkeypatch):
    foreign = as_place(bucket) / "foreign"
    write_atomically(foreign / "config.json", b"{}")
    with pytest.raises(OutputError, match="is not a merge made by simmerge"):
        write_merge(remote, foreign)
    monkeypatch.setattr(to_store, "write_tensors", lambda *_: (_ for _ in ()).throw(CheckpointError("ends early")))
    out = as_place(bucket) / "merged"
    with pytest.raises(CheckpointError, match="ends early"):
        write_graph(compile_plan(remote), out)
    assert out.glob("*") == []
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OutputError, match="0.00 GB free, model.safetensors needs .*TMPDIR"):
        write_graph(compile_plan(remote), out)


def test_the_command_merges_in_a_store(remote, bucket, simmerge):
    plan = f"{bucket}/zoo/plan.json"
    dry = simmerge("merge", plan, f"{bucket}/merged", "--dry-run")
    assert dry.returncode == 0 and f"-> {bucket}/merged" in dry.stdout
    result = simmerge("merge", plan, f"{bucket}/merged")
    assert result.returncode == 0, result.stderr
    assert read_headers(CheckpointRef("merged", as_place(bucket) / "merged"))
    absent = simmerge("merge", f"{bucket}/zoo/absent.json", f"{bucket}/other")
    assert absent.returncode == 2 and f"plan: cannot read {bucket}/zoo/absent.json: no such object" in absent.stderr
    nameless = simmerge("merge", plan, "s3://")
    assert nameless.returncode == 2 and "names no bucket" in nameless.stderr


def test_an_adapter_in_a_store_is_added(tmp_path, bucket):
    base = tiny.save(tiny.make_model(tied=False), tmp_path / "base")
    adapter, _ = make_adapter(tmp_path / "adapter", **CONFIGS["attention"])
    local, there = CheckpointRef("lora", base, adapter=adapter), as_place(bucket)
    for path in (*base.iterdir(), *adapter.iterdir()):
        (there / path.parent.name / path.name).upload(path)
    found = CheckpointRef("lora", there / "base", adapter=there / "adapter")
    assert checkpoint_digest(found) == checkpoint_digest(local)
    ours, theirs = load_model(found).state_dict(), load_model(local).state_dict()
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
