"""Places in a real S3 server: names, back-off, refusals, and uploads that are cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from simmerge_ray.base import storage
from simmerge_ray.base.errors import AccessError, ConfigError, InputError, StorageError
from simmerge_ray.base.storage import RemotePath, as_place, list_objects, place_in, read_bytes, write_atomically
from simmerge_ray.service.http.listening import free_port
from tests.object_store import Proxy, endpoint, make_bucket, s3_server


@pytest.fixture
def proxy(s3_url):
    """A proxy before the server, that this process' clients go through."""
    made = Proxy(int(s3_url.rsplit(":", 1)[1]))
    with endpoint(f"http://127.0.0.1:{made.port}"):
        yield made
    made.down()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s3://b/a/../x/./y/", "s3://b/x/y"),
        ("S3://b", "s3://b"),
        ("gcs://b/x", "gs://b/x"),
        ("s3a://b/x", "s3://b/x"),
        ("file:///tmp/x", "/tmp/x"),
        ("a/b", "a/b"),
        ("c:/x", "c:/x"),
    ],
)
def test_a_name_is_a_uri_or_a_path(name, text):
    assert str(as_place(name)) == text
    assert isinstance(as_place(name), Path) == (not text.startswith(("s3", "gs")))


@pytest.mark.parametrize("name", ["s3://", "s3:///", "gs://.."])
def test_a_uri_needs_a_bucket(name):
    with pytest.raises(InputError, match="names no bucket"):
        as_place(name)


def test_remote_names_are_computed_as_paths_are():
    place = as_place("s3://b/runs/one/pairs.parquet")
    local = Path("/runs/one/pairs.parquet")
    for one in ("name", "stem", "suffix"):
        assert getattr(place, one) == getattr(local, one)
    assert str(place.with_suffix(".json")) == "s3://b/runs/one/pairs.json"
    assert str(place.parent / "signatures") == "s3://b/runs/one/signatures"
    assert place.relative_to(as_place("s3://b/runs")) == local.relative_to("/runs")
    assert not place.is_relative_to(as_place("s3://b/run")) and not place.is_relative_to(local)
    with pytest.raises(TypeError):
        os.fspath(place)  # nothing opens a local file of that name by mistake
    assert place_in(place.parent, "../two") == as_place("s3://b/runs/two")
    assert place_in(Path("/x"), "s3://b/y") == as_place("s3://b/y")
    assert place_in(place.parent, "/x") == Path("/x")


def test_objects_of_a_real_server_are_written_read_and_listed(bucket):
    place = as_place(bucket) / "run"
    assert not place.exists() and list_objects(place, ".json") == [] and place.glob("*") == []
    for name in ("b.json", "a.json", "x.txt", "sub/c.json"):
        write_atomically(place / name, name.encode())
    assert [name.removeprefix(f"{place}/") for name in list_objects(place, ".json")] == ["a.json", "b.json"]
    assert [one.name for one in place.glob("*/*.json")] == ["c.json"]
    assert place.is_dir() and (place / "a.json").is_file() and not (place / "a").exists()
    assert read_bytes(f"{place}/a.json") == b"a.json" and (place / "sub/c.json").read_text() == "sub/c.json"
    assert storage.read_range(place / "x.txt", 2, 4) == b"tx"
    before = storage.file_version(place / "a.json")
    write_atomically(place / "a.json", b"other")
    assert storage.file_version(place / "a.json") != before and read_bytes(place / "a.json") == b"other"
    storage.delete_objects([f"{place}/a.json", f"{place}/never.json"])
    assert not (place / "a.json").exists()
    with pytest.raises(FileNotFoundError, match="no such object"):
        read_bytes(place / "a.json")


def test_a_store_that_was_away_is_used_when_it_is_back(bucket, proxy):
    """The real figure, a store that is away for 60 s, is in docs/storage.md."""
    place = as_place(bucket) / "x"
    proxy.down()
    timer = threading.Timer(1.5, proxy.up)
    timer.start()
    write_atomically(place, b"here")
    timer.join()
    assert read_bytes(place) == b"here"


def test_a_store_that_stays_away_is_one_error(bucket, proxy, monkeypatch):
    monkeypatch.setenv("SIMMERGE_STORE_PATIENCE", "0.5")
    proxy.down()
    for call in (
        lambda: read_bytes(f"{bucket}/x"),
        lambda: write_atomically(f"{bucket}/x", b""),
        as_place(bucket).exists,
    ):
        with pytest.raises(StorageError, match=f"cannot .* {bucket}.*tried for .*SIMMERGE_STORE_PATIENCE"):
            call()
    monkeypatch.setenv("SIMMERGE_STORE_PATIENCE", "soon")
    with pytest.raises(ConfigError, match="'soon'; expected a number of seconds"):
        read_bytes(f"{bucket}/x")


@pytest.mark.parametrize("num_bytes", [3 << 20, 110 << 20], ids=["one request", "in parts"])
def test_an_upload_that_is_cut_is_done_again_and_never_half_visible(bucket, proxy, tmp_path, num_bytes):
    data = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8).tobytes()
    (tmp_path / "file").write_bytes(data)
    place = as_place(bucket) / "weights"
    proxy.cut_after = 2 << 20
    entry = place.upload(tmp_path / "file")
    assert proxy.num_cut == 1
    assert entry.size == num_bytes and read_bytes(place) == data


def test_an_upload_that_never_ends_is_one_error_and_leaves_the_old_object(bucket, proxy, tmp_path, monkeypatch):
    place = as_place(bucket) / "weights"
    write_atomically(place, b"old")
    monkeypatch.setenv("SIMMERGE_STORE_PATIENCE", "0.5")
    (tmp_path / "file").write_bytes(bytes(120 << 20))
    proxy.down_after = 60 << 20  # in the midst of the parts
    with pytest.raises(StorageError, match="cannot write"):
        place.upload(tmp_path / "file")
    proxy.up()
    assert read_bytes(place) == b"old"
    assert [one.name for one in as_place(bucket).glob("*")] == ["weights"]


def test_a_bucket_that_is_not_there_is_said(s3_url):
    with pytest.raises(StorageError, match="cannot write s3://no-such-bucket-1/x: .*is there such a bucket"):
        write_atomically("s3://no-such-bucket-1/x", b"")
    assert not as_place("s3://no-such-bucket-1/x").exists()


def test_an_unknown_scheme_is_said():
    with pytest.raises(InputError, match="unknown scheme of a URI 's4'"):
        read_bytes("s4://bucket/x")


CODE = """
import sys
from simmerge_ray.base.errors import SimmergeError
from simmerge_ray.base.storage import write_atomically
try:
    write_atomically(sys.argv[1], b"x")
except SimmergeError as error:
    print(type(error).__name__, error)
"""


def said(uri: str, **environment: str | None) -> str:
    """What a process with another environment says when it writes."""
    variables = {key: value for key, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, "-c", CODE, uri]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=120)
    return result.stdout


def test_without_credentials_there_is_one_error_at_once(bucket):
    text = said(f"{bucket}/x", AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    assert text.startswith(f"AccessError cannot write {bucket}/x: NoCredentialsError")
    assert "AWS_PROFILE" in text and len(text.splitlines()) == 1


def test_wrong_credentials_are_one_error_at_once(tmp_path):
    """A server that checks signatures."""
    port = free_port()
    with s3_server(port, tmp_path / "log", INITIAL_NO_AUTH_ACTION_COUNT="1") as url:
        make_bucket(url, "guarded")
        text = said("s3://guarded/x", AWS_ENDPOINT_URL=url)
    assert text.startswith("AccessError cannot write s3://guarded/x: PermissionError"), text
    assert "AWS_ACCESS_KEY_ID" in text and len(text.splitlines()) == 1


def test_errors_of_a_store_travel_between_processes():
    import pickle

    for error in (AccessError("a"), StorageError("b")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    place = as_place("s3://b/x")
    assert pickle.loads(pickle.dumps(place)) == place and json.dumps(str(place)) == '"s3://b/x"'
    assert isinstance(place, RemotePath)
