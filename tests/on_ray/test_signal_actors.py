"""Signals on Ray actors: the same bits as in one process, whatever the number of workers, and after a crash."""

from __future__ import annotations

import io
import os
import re
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from simmerge_ray.base.config import SignalsConfig
from simmerge_ray.base.errors import CheckpointError, WorkerError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.on_ray.actor_pool import ActorPool
from simmerge_ray.on_ray.signal_actors import compute_signals_on_ray, ray_executor
from simmerge_ray.pipelines.stages import signals_stage
from simmerge_ray.service.retention import RetentionRanker
from simmerge_ray.service.schemas import PlansRequest
from simmerge_ray.signals.bounds import working_bytes
from simmerge_ray.signals.candidates.answers import AnswerSpec
from simmerge_ray.signals.candidates.signatures import collect_answers
from simmerge_ray.signals.compute import compute_signals, local_executor
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.stages import model_bytes
from simmerge_ray.signals.table import read_signal_table
from simmerge_ray.signals.worker import SignalWorker

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

CONFIG = SignalsConfig(num_workers=2, batch_size=8)


@pytest.fixture(scope="module")
def probe_sets(catalogue_path):
    return load_probe_sets(catalogue_path.parent / "probes")


@pytest.fixture(scope="module")
def one_thread():
    """As the actors: float32 sums depend on the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def local_table(catalogue, probe_sets, one_thread):
    return compute_signals(catalogue, probe_sets, SignatureSpec.of(CONFIG))


class DyingWorker(SignalWorker):
    """Dies by its own hand in the middle, once."""

    marker = ""

    def run_unit(self, unit):
        if unit.kind == "outputs" and unit.checkpoint == "m1" and not os.path.exists(self.marker):
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run_unit(unit)


def test_the_table_has_the_same_bits_as_in_one_process_also_when_a_worker_dies(
    catalogue, probe_sets, local_table, monkeypatch, tmp_path
):
    marker = str(tmp_path / "died")
    worker = type("DyingWorker", (DyingWorker,), {"marker": marker})
    monkeypatch.setattr("simmerge_ray.signals.worker.SignalWorker", worker)
    seen: list[tuple[int, int]] = []
    store = SignatureStore(tmp_path / "signatures")
    table = compute_signals_on_ray(catalogue, probe_sets, CONFIG, lambda *x: seen.append(x), store)
    assert os.path.exists(marker)
    assert table == local_table
    assert seen[-1][0] == seen[-1][1]
    # Everything is in the store: no actor is started any more.
    with ray_executor(catalogue, 2) as run:
        again = compute_signals(catalogue, probe_sets, SignatureSpec.of(CONFIG), store=store, executor=run)
    assert again == local_table


def test_answers_have_the_same_bits_as_in_one_process(catalogue, probe_sets, one_thread, tmp_path):
    spec, found = AnswerSpec(max_tokens=4, num_kept=10), []
    with ray_executor(catalogue, 2) as run:
        for number, executor in enumerate((run, local_executor(catalogue))):
            store = SignatureStore(tmp_path / str(number))
            found.append(collect_answers(catalogue, probe_sets, store, executor, spec, SignatureSpec.of(CONFIG)))
    for one, other in zip(*found, strict=True):
        assert one.owner == other.owner and one.answers.digest == other.answers.digest
        for name in ("likely", "rest", "base_likely", "base_rest"):
            assert getattr(one.kept, name).tobytes() == getattr(other.kept, name).tobytes()


def stored_answers(directory: Path) -> list[Path]:
    return [path for kind in ("written", "answers", "kept") for path in directory.glob(f"{kind}-*")]


def test_the_signals_of_a_run_bring_the_members_answers_unless_a_checkpoint_runs_in_stages(catalogue_path, tmp_path):
    out, signatures, printed = tmp_path / "pairs.parquet", tmp_path / "signatures", io.StringIO()
    narrator = Narrator(Console(file=printed, width=200))

    def make(**changes: object) -> str:
        printed.truncate(printed.seek(0))
        config = CONFIG.model_copy(update=changes)
        signals_stage(catalogue_path, catalogue_path.parent / "probes", out, config, narrator)
        return printed.getvalue()

    ref = load_catalogue(catalogue_path).checkpoints[0]
    memory = (working_bytes(ref, SignatureSpec.of(CONFIG)) + 0.8 * model_bytes(read_headers(ref))) / 1e9
    assert "answers: none, since a checkpoint is run in stages" in make(memory_per_worker=memory)
    table = out.read_bytes()
    assert "answers" not in make(answers=False) and not stored_answers(signatures)
    said = make()
    stated = float(re.search(r"answers: 3 checkpoints' own, at most (\d+) MB on disk", said)[1]) * 1e6
    size = sum(path.stat().st_size for path in stored_answers(signatures))
    assert 0 < size <= stated + 0.5e6 and out.read_bytes() == table
    # A service computes nothing, and finds all that it needs.
    probe_sets, catalogue = load_probe_sets(catalogue_path.parent / "probes"), load_catalogue(catalogue_path)
    ranker = RetentionRanker(read_signal_table(out), catalogue, probe_sets, str(signatures))
    assert ranker.best(PlansRequest(by="retention")).plans
    assert "unchanged" in make(num_workers=1)


class Square:
    """Squares numbers; dies by its own hand at the first 3, and raises at a negative one."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def run(self, number: int) -> int:
        if number < 0:
            raise CheckpointError("negative")
        if number == 3 and not os.path.exists(self._marker):
            open(self._marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number


def taking(numbers):
    waiting = list(enumerate(numbers))
    return lambda _: waiting.pop(0) if waiting else None


def pool_of(marker=""):
    import ray

    return ActorPool(lambda: ray.remote(Square).options(num_cpus=1).remote(marker))


def test_a_killed_actor_is_replaced_and_no_result_is_missing_or_double(tmp_path):
    with pool_of(str(tmp_path / "died")) as pool:  # the cluster has room for two of the three
        assert sorted(pool.drain("run", taking(range(8)), 3)) == [(n, n * n) for n in range(8)]
    assert (tmp_path / "died").exists()


def test_work_that_arrives_while_others_run_is_done_and_errors_keep_their_type():
    waiting = [(0, 5)]
    found = []
    with pool_of() as pool:
        for index, result in pool.drain("run", lambda _: waiting.pop() if waiting else None, 1):
            found.append((index, result))
            if index < 2:
                waiting.append((index + 1, result))
        assert found == [(0, 25), (1, 625), (2, 390625)]
        with pytest.raises(CheckpointError, match="negative"):
            list(pool.drain("run", taking([-1]), 1))


class Slow:
    """Hangs at the first 5 until somebody has answered another 5, as on a node that hardly gets on."""

    def __init__(self, marker: str) -> None:
        self._marker = Path(marker)

    def run(self, number: int) -> int:
        if number == 5 and not self._marker.exists():
            self._marker.touch()
            while not self._marker.with_suffix(".answered").exists():
                time.sleep(0.05)
        elif number == 5:
            self._marker.with_suffix(".answered").touch()
        return number * number


def test_a_call_that_takes_long_is_given_to_another_actor_and_counts_once(tmp_path):
    import ray

    def spawn():
        return ray.remote(Slow).options(num_cpus=1).remote(str(tmp_path / "slow"))

    with ActorPool(spawn, patience_s=0.1) as pool:
        assert sorted(pool.drain("run", taking([5, 1, 2, 3]), 2)) == [(0, 25), (1, 1), (2, 4), (3, 9)]
        assert (tmp_path / "slow.answered").exists()
        assert sorted(pool.drain("run", taking([5, 1]), 2)) == [(0, 25), (1, 1)]  # late answers are not mixed in


KILLED = (
    "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.1, ID: ab) was 30.33GB used"
    " / 31.86GB limit (0.952), which exceeds the threshold.\nTo adjust the kill threshold, see the docs."
)


def killed_for_memory(monkeypatch, times: int) -> None:
    """The first results of squares come as Ray tells it when it has killed the worker."""
    import ray

    import simmerge_ray.on_ray.actor_pool as pool

    left, real = [times], pool.get_result

    def get_result(task):
        result = real(task)
        if isinstance(result, int) and left[0]:
            left[0] -= 1
            raise ray.exceptions.OutOfMemoryError(KILLED)
        return result

    monkeypatch.setattr(pool, "get_result", get_result)


def test_work_of_an_actor_that_was_killed_for_memory_is_done_by_fewer(monkeypatch):
    killed_for_memory(monkeypatch, times=1)
    with pool_of() as pool:
        assert sorted(pool.drain("run", taking([4, 5, 6]), 2)) == [(0, 16), (1, 25), (2, 36)]
        assert len(pool._actors) == 1  # the other had no room
    killed_for_memory(monkeypatch, times=1)
    with pool_of() as pool:  # the only one is replaced
        assert sorted(pool.drain("run", taking(range(2)), 1)) == [(n, n * n) for n in range(2)]


def test_actors_that_are_killed_for_memory_again_and_again_end_in_one_error(monkeypatch):
    import ray

    killed_for_memory(monkeypatch, times=99)
    spawn = lambda: ray.remote(Square).options(num_cpus=1).remote("")  # noqa: E731
    with ActorPool(spawn, max_losses=1, worker_bytes=2.5e9) as pool, pytest.raises(WorkerError) as caught:
        list(pool.drain("run", taking([1]), 1))
    assert str(caught.value) == (
        "Ray killed a worker since its machine ran out of memory (30.33 of 31.86 GB were in use); a worker needs about "
        "2.5 GB; it was tried 2 times; what was finished is kept: run the same command again, with fewer workers at a "
        "time, or when other programs have ended"
    )
