"""Every format, changed at random, through the command that reads it: made, or refused in words with nothing written.

The suite's examples are always the same 200 a format (some 9 ms of a core each). A campaign has new ones, and holds
every command to 2 seconds of a core and the process to 500 MB more than it had:
`SIMMERGE_FUZZ_FILES=20000 pytest tests/fuzz/test_files.py`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from simmerge_ray.base.errors import ConfigError, LabelError, StoreError
from simmerge_ray.base.storage import digest_bytes
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.search.labels.outcomes import check_comparable
from simmerge_ray.service.bandit.policy import NeuralLinearTS
from simmerge_ray.service.deciding import noise_of
from simmerge_ray.service.log.replica import Replica
from simmerge_ray.signals.signature import SignatureStore, TaskOutputs, TensorSample
from tests.fuzz.files import (
    MERGEKIT,
    changed_bytes,
    changed_safetensors,
    changed_values,
    contents,
    run,
    text_of,
    write_files,
    write_learned,
)
from tests.unit.service.event_logs import encode, opened

EXAMPLES = int(os.environ.get("SIMMERGE_FUZZ_FILES", "200"))
IS_CAMPAIGN = "SIMMERGE_FUZZ_FILES" in os.environ
MOST_SECONDS, MOST_BYTES = 2.0, 500e6


def fuzzed(strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Run `check` for many draws of a strategy."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=not IS_CAMPAIGN,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if IS_CAMPAIGN else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def every(drawn: Any) -> None:
        check(drawn)

    every()


def ends_well(root: Path, *command: str, codes: tuple[int, ...] = (0, 2)) -> int:
    """Run a command on what lies below a directory, and hold it to what every command owes."""
    before, held, loaded, begun = contents(root), memory_at_start(), len(sys.modules), time.process_time()
    ended = run(*command, cwd=root)
    seconds = time.process_time() - begun
    assert ended.code in codes, ended
    assert len(ended.said) < 60_000, len(ended.said)
    if ended.code:
        assert "rror" in ended.said and contents(root) == before, (ended, contents(root).keys() ^ before.keys())
    if IS_CAMPAIGN:
        is_first = len(sys.modules) > loaded  # of its kind: what it imports is not the input's fault
        assert seconds < MOST_SECONDS or is_first, (seconds, ended.said[:500])
        assert peak_memory() - held < MOST_BYTES, (peak_memory(), held)
    return ended.code


def memory_at_start() -> int:
    """Bytes that this process holds; its peak is counted from now on. A campaign remembers what it has drawn."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


SEARCH = ("search", "catalogue.yaml", "--tasks=tasks", "--out=store", "--budget=1", "--dry-run", "--log=../log")
CHECKPOINTS = ("base", "a", "b", "lora")
READ_BY_PAIR = ("made-up.yaml", "base", "a", "pairs.parquet", "selector")
PAIR = ("plan", "made-up.yaml", "--left=s1-c00", "--right=s1-c01", "--out=chosen.json")
ARTIFACTS = ("--signals=pairs.parquet", "--selector=selector")
# A campaign takes as long as it takes: 20,000 examples of a merge are ten minutes of a core.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Generating overly large repr"),  # it would hide what was found
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # what comes of it is no number, and that is told
]
if IS_CAMPAIGN:
    pytestmark.append(pytest.mark.timeout(0))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_learned(write_files(tmp_path_factory.mktemp("sound")))
    for plan in ("plan.json", "lora.json", "recipe.json", "merge.yaml", "union.yaml"):
        with copied(root) as copy:
            assert run("merge", plan, "out", cwd=copy).code == 0
    for command in (
        SEARCH,
        (*PAIR, *ARTIFACTS),
        ("labels", "check", "labels"),
        ("catalogue", "list", "catalogue.yaml"),
    ):
        with copied(root) as copy:
            ended = run(*command, cwd=copy)
            assert ended.code == 0, ended
    return root


class copied:  # noqa: N801  used as a function
    """A copy of a directory, or of these of its files and directories alone, while the block runs."""

    def __init__(self, root: Path, *names: str) -> None:
        self._root, self._names = root, names

    def __enter__(self) -> Path:
        self._directory = tempfile.mkdtemp()
        to = Path(self._directory) / "x"
        to.mkdir()
        for name in self._names or os.listdir(self._root):
            if (self._root / name).is_dir():
                shutil.copytree(self._root / name, to / name, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(self._root / name, to / name)
        return to

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._directory)


def json_texts(file: Path) -> st.SearchStrategy[bytes]:
    """A JSON file, changed as a value or as bytes."""
    data = file.read_bytes()
    values = changed_values(json.loads(data)).map(lambda value: text_of(value).encode("utf-8", "surrogatepass"))
    return values | values | changed_bytes(data)


@pytest.mark.parametrize(
    ("file", "plan"),
    [
        ("a/model.safetensors", "plan.json"),
        ("b/model-00001-of-00003.safetensors", "plan.json"),
        ("b/model.safetensors.index.json", "plan.json"),
        ("a/config.json", "plan.json"),
        ("a/tokenizer.json", "plan.json"),
        ("a/tokenizer.json", "union.yaml"),
        ("a/tokenizer_config.json", "union.yaml"),
        ("lora/adapter_config.json", "lora.json"),
        ("lora/adapter_model.safetensors", "lora.json"),
        ("plan.json", "plan.json"),
        ("recipe.json", "recipe.json"),
    ],
)
def test_a_merge_of_changed_files_is_made_or_refused(sound, file, plan):
    data = (sound / file).read_bytes()

    def check(changed: bytes) -> None:
        with copied(sound, *CHECKPOINTS, plan) as root:
            (root / file).write_bytes(changed)
            if ends_well(root, "merge", plan, "out") == 0 and file.endswith(".safetensors"):
                with safe_open(root / file, "np") as opened:  # the format's own library reads what was merged
                    for name in opened.keys():  # noqa: SIM118
                        opened.get_slice(name)

    fuzzed(changed_safetensors(data) if file.endswith(".safetensors") else json_texts(sound / file), check)


@pytest.mark.parametrize("file", ["merge.yaml", "catalogue.yaml"])
def test_changed_yaml_is_read_or_refused(sound, file):
    data = (sound / file).read_bytes()
    value = MERGEKIT if file == "merge.yaml" else yaml.safe_load(data)
    values = changed_values(value).map(lambda one: text_of(one).encode("utf-8", "surrogatepass"))
    command = ("merge", file, "out", "--dry-run") if file == "merge.yaml" else ("catalogue", "list", file)

    def check(changed: bytes) -> None:
        with copied(sound, *CHECKPOINTS, file) as root:
            (root / file).write_bytes(changed)
            ends_well(root, *command)

    fuzzed(values | values | changed_bytes(data), check)


def test_changed_lines_of_a_task_are_read_or_refused(sound):
    data = (sound / "tasks" / "add.jsonl").read_bytes()
    rows = [json.loads(line) for line in data.splitlines()]
    lines = changed_values(rows).map(
        lambda one: "\n".join(map(text_of, one)) if isinstance(one, list) else text_of(one)
    )
    texts = lines.map(lambda text: text.encode("utf-8", "surrogatepass"))

    def check(changed: bytes) -> None:
        with copied(sound, *CHECKPOINTS, "catalogue.yaml", "tasks") as root:
            (root / "tasks" / "add.jsonl").write_bytes(changed)
            ends_well(root, *SEARCH)

    fuzzed(texts | texts | changed_bytes(data), check)


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def tables(file: Path) -> st.SearchStrategy[bytes]:
    """A Parquet file with other rows, other metadata, or other bytes."""
    table = pq.read_table(file)
    rows, about = table.to_pylist(), json.loads((table.schema.metadata or {}).get(b"simmerge_ray", b"null"))

    def written(changed: tuple[Any, Any]) -> bytes:
        rows, about = changed
        metadata = {"simmerge_ray": text_of(about).encode("utf-8", "surrogatepass")} if about is not None else None
        try:
            kept = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            return parquet(pa.Table.from_pylist(kept).replace_schema_metadata(metadata))
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, ValueError, TypeError):
            return parquet(table.replace_schema_metadata(metadata))  # no Parquet file could hold such rows

    abouts = st.just(about) if about is None else st.just(about) | changed_values(about)
    changed = st.tuples(st.just(rows) | changed_values(rows), abouts).map(written)
    return changed | changed | changed | changed_bytes(file.read_bytes())


def are_comparable(store: Path) -> bool:
    """Whether labels, each of them well, were made with the same items under one name."""
    try:
        check_comparable(LabelStore(store).read())
    except LabelError:
        return False
    return True


def test_changed_label_files_are_folded_or_refused_and_then_left_as_they_are(sound):
    file = sorted((sound / "labels").iterdir())[0]

    def check(changed: bytes) -> None:
        with copied(sound, "labels") as root:
            (root / "labels" / file.name).write_bytes(changed)
            is_read = ends_well(root, "labels", "show", "labels") == 0
            is_sound = ends_well(root, "labels", "check", "labels", codes=(0, 1)) == 0
            assert is_read or not is_sound
            fits = is_read and are_comparable(root / "labels")
            assert ends_well(root, "labels", "merge", "into", "labels") == (0 if fits else 2) or not is_sound
            assert ends_well(root, "labels", "compact", "labels") == (0 if is_read else 2)

    fuzzed(tables(file), check)


def test_a_changed_signal_table_is_used_or_refused(sound):
    def check(changed: bytes) -> None:
        with copied(sound, *READ_BY_PAIR) as root:
            (root / "pairs.parquet").write_bytes(changed)
            ends_well(root, *PAIR, *ARTIFACTS)

    fuzzed(tables(sound / "pairs.parquet"), check)


@pytest.mark.parametrize("file", ["selector.json", "selector.safetensors"])
def test_a_changed_selector_is_used_or_refused(sound, file):
    place = sound / "selector" / file
    changes = json_texts(place) if file.endswith(".json") else changed_safetensors(place.read_bytes())

    def check(changed: bytes) -> None:
        with copied(sound, *READ_BY_PAIR) as root:
            (root / "selector" / file).write_bytes(changed)
            ends_well(root, *PAIR, *ARTIFACTS)

    fuzzed(changes, check)


def test_a_log_with_a_changed_row_is_sound_or_its_damage_is_told(sound):
    with closing(sqlite3.connect(sound / "service.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        kept = {
            "events": database.execute("SELECT seq, kind, body, data FROM events").fetchall(),
            "snapshots": database.execute("SELECT seq, NULL, NULL, data FROM snapshots").fetchall(),
        }

    @st.composite
    def changes(draw: Any) -> tuple[str, str, int, Any]:
        table = draw(st.sampled_from(["events", "events", "snapshots"]))
        seq, kind, body, data = draw(st.sampled_from(kept[table]))
        if table == "snapshots":
            size = int.from_bytes(data[:8], "little")
            header = text_of(draw(changed_values(json.loads(data[8 : 8 + size])))).encode("utf-8", "surrogatepass")
            made = st.just(len(header).to_bytes(8, "little") + header + data[8 + size :]) | changed_bytes(data)
            return table, "data", seq, draw(made)
        column = draw(st.sampled_from(["body", "body", "data", "kind", "version", "subject", "at"]))
        new = {
            "body": changed_values(json.loads(body)).map(text_of),
            "data": changed_bytes(data),
            "kind": st.sampled_from(["reward", "decision", "activation", "", "nonsense", None, 5, b"x"]),
        }.get(column, st.sampled_from([None, "", "x", 0, -1, 2**62, 0.5, b"x"]))
        return table, column, seq, draw(new)

    def check(change: tuple[str, str, int, Any]) -> None:
        table, column, seq, new = change
        with copied(sound, "service.db") as root:
            with closing(sqlite3.connect(root / "service.db")) as database, database:
                try:
                    database.execute(f"UPDATE {table} SET {column} = ? WHERE seq = ?", (new, seq))
                except (sqlite3.Error, UnicodeEncodeError):
                    return  # the table takes no such value
                if table == "snapshots":
                    database.execute("UPDATE snapshots SET checksum = ? WHERE seq = ?", (digest_bytes(new), seq))
            url = f"sqlite:///{root}/service.db"
            is_sound = run("db", "check", url).code == 0
            with opened(url) as log:
                try:
                    view = Replica(log, encode).catch_up()
                except StoreError as error:
                    assert not is_sound and "db restore" in str(error), (is_sound, str(error))
                else:
                    # Where there is a snapshot, damage before it is told by `check` alone.
                    policy = NeuralLinearTS(view.posteriors, noise_of(view))
                    policy.suggest(np.ones(len(next(iter(view.posteriors.values())).moment)), "d9")

    fuzzed(changes(), check)


@pytest.mark.parametrize("kind", ["outputs", "weights"])
def test_a_changed_signature_is_read_whole_or_refused(tmp_path, kind):
    """By its reader, not a command: sound signatures take a model."""
    store = SignatureStore(tmp_path)
    if kind == "outputs":
        logits, hidden, attention = np.ones((5, 7), "f4"), np.ones((2, 5, 4), "f4"), np.ones((1, 2, 3, 6), "f4")
        token = np.zeros(5, np.int64)
        outputs = TaskOutputs(logits, hidden, attention, token > 0, token, token, token[:3])
        store.write(kind, "key", vars(outputs), {})
    else:
        sample = TensorSample(9, np.ones(4, "f4"), np.ones(3), np.ones(3, "f4"))
        store.write_parts(kind, "key", {"model.x.weight": sample}, {})
    read = store.read_outputs if kind == "outputs" else store.read_weights
    file = Path(store.path(kind, "key"))
    read("key")

    def check(changed: bytes) -> None:
        file.write_bytes(changed)
        try:
            found = read("key")
        except ConfigError as error:
            assert "is damaged" in str(error)
            return
        if isinstance(found, TaskOutputs):
            assert len(found.logits) == len(found.probe) == found.hidden.shape[1]
        else:
            assert all(len(one.values) <= one.num_elements for one in found.values())

    fuzzed(changed_safetensors(file.read_bytes()), check)
