"""`jobs/retrain.py` as it is run: its exit codes, its last line, and what it leaves behind."""

from __future__ import annotations

import asyncio
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simmerge_ray.base.config import RetrainConfig
from simmerge_ray.pipelines.retrain import run_retraining, run_roll_back
from simmerge_ray.selector.data.files import find_dataset, read_dataset
from simmerge_ray.selector.models.train import train_selector
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.log.database import upgrade_database
from simmerge_ray.service.schemas import DecisionRequest, RewardRequest
from tests.job_lines import read_last_line
from tests.unit.selector.made_up import write_study
from tests.unit.service.published import write_published
from tests.unit.service.rewarded import CONFIG, NAMESPACE, Service, served, url_of

JOB = Path(__file__).parents[3] / "jobs" / "retrain.py"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), ["p"], num_checkpoints=8)


@pytest.fixture
def service(tmp_path: Path, study: Path) -> Iterator[Service]:
    loaded = read_dataset(find_dataset(study))
    with served(tmp_path, loaded, train_selector(loaded.dataset, CONFIG)) as made:
        yield made


@pytest.fixture
def job(tmp_path: Path, study: Path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the job with more options; exit code, what it says before the last line, errors."""

    def run(*options: str, **changed: str) -> tuple[int, str, str]:
        given = {
            "database": url_of(tmp_path),
            "namespace": NAMESPACE,
            "registry": f"{tmp_path}/registry",
            "dataset": str(study),
            "out": f"{tmp_path}/out",
            **changed,
        }
        named = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value) if value]
        named = [word for word in named if word]
        monkeypatch.setattr(sys, "argv", ["retrain.py", *named, *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(JOB), run_name="__main__")
        said = capsys.readouterr()
        lines = said.out.splitlines()
        if lines:  # the options were understood
            told = read_last_line(lines[-1])
            assert told["job"] == "retrain" and told["exit_code"] == ended.value.code
        return ended.value.code, ["", *lines[:-1]][-1], said.err

    return run


@pytest.mark.slow
def test_from_a_dry_run_to_a_roll_back(service, job, tmp_path):
    former = service.present.version
    service.serve(120)
    head = service.log.head()
    code, line, _ = job("--dry-run")
    assert code == 0 and "90 rewards to train on" in line and "30 held out" in line and not (tmp_path / "out").exists()

    code, line, _ = job()
    (made,) = (tmp_path / "out").iterdir()
    assert code == 0 and " trained: would " in line and line.endswith(f"-> {made}/retrain.md")
    assert "# Retraining of" in (made / "retrain.md").read_text()

    code, line, _ = job("--promote", margin="1.0")
    version = line.split()[1]
    assert code == 0 and line.startswith(f"selector {version} promoted: on the log +")
    assert service.registry.path(former) != service.registry.path(version) and service.log.head() == head + 1

    code, line, _ = job("--promote", margin="1.0")
    assert code == 0 and line.startswith(f"selector {version} unchanged") and service.log.head() == head + 1

    code, line, _ = job("--roll-back", former, dataset="", out="")
    assert code == 0 and line == f"selector {former} promoted: rolled back from {version}"
    code, line, _ = job("--roll-back", former, dataset="", out="")
    assert code == 0 and line == f"selector {former} unchanged: it is the present selector"
    assert service.log.head() == head + 2
    code, _, error = job("--roll-back", "none", dataset="", out="")
    assert code == 2 and "unknown former selector 'none'" in error


@pytest.mark.slow
def test_a_refused_promotion_has_a_code_of_its_own(service, job):
    service.serve(120)
    service.serve(40, turned=True, seed=1)
    head = service.log.head()
    code, line, _ = job("--promote")
    assert code == 3 and " not promoted: " in line and service.log.head() == head


def test_bad_input_and_a_lost_database_are_told_apart(service, job, tmp_path, capsys):
    code, _, error = job()
    assert code == 2 and "no rewards" in error
    code, _, error = job(dataset=str(tmp_path / "none"))
    assert code == 2 and "no data set at" in error
    code, _, error = job(margin="7")
    assert code == 2 and "margin" in error
    code, _, error = job(dataset="")
    assert code == 2 and "--dataset and --out are needed" in error
    code, _, error = job(namespace="another")
    assert code == 2 and "names no selector" in error
    code, _, error = job(database=f"sqlite:///{tmp_path}/nowhere/log.db")
    assert code == 1 and "opening the event log failed" in error


def test_help_answers_without_heavy_libraries():
    code = f"""
import runpy, sys
sys.argv = ["retrain.py", "--help"]
try:
    runpy.run_path({str(JOB)!r}, run_name="__main__")
except SystemExit:
    print({{"torch", "numpy", "sqlalchemy"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--roll-back VERSION" in done.stdout and done.stdout.endswith("set()\n")


@pytest.mark.slow
def test_a_running_service_goes_on_with_the_promoted_selector_and_back(tmp_path):
    files = write_published(tmp_path)
    study = write_study(tmp_path / "study", ["s1"], num_checkpoints=6)  # the labels that it was trained on
    settings = files.settings(tmp_path)
    upgrade_database(settings.database)
    config = RetrainConfig(
        database=settings.database, registry=settings.registry, dataset=study, out=tmp_path / "out", margin=1.0
    )

    async def serve() -> None:
        learner = Learner(settings)
        await learner.start()
        try:
            ids = [one.id for one in (await learner.catalogue()).checkpoints]
            pairs = [(left, right) for left in ids for right in ids if left < right]
            for number in range(100):
                left, right = pairs[number % len(pairs)]
                _, decision = await learner.decide(DecisionRequest(left=left, right=right))
                await learner.reward(
                    decision.decision_id, RewardRequest(utility=0.9 if decision.arm == "ties" else 0.2)
                )
            _, plan = await learner.decide(DecisionRequest(checkpoints=ids[:4], ways=3))
            await learner.reward(plan.decision_id, RewardRequest(utility=0.5))
            former = decision.model_version

            result = await asyncio.to_thread(run_retraining, config, True, False)
            assert result.done == "promoted", result.line
            _, decision = await learner.decide(DecisionRequest(left=ids[0], right=ids[1]))
            assert (decision.model_version, decision.epoch) == (result.version, 1) and result.version != former
            policy = await learner.policy()
            assert policy.num_rewards == 101 and policy.model_version == result.version
            # All 100 rewards of pairs were folded again with the new encoder, on top of the labels.
            assert sum(one.count for one in policy.arms) == 2 * len(pairs) + 100
            assert (await asyncio.to_thread(run_retraining, config, True, False)).done == "unchanged"

            run_roll_back(config, former)
            _, decision = await learner.decide(DecisionRequest(left=ids[0], right=ids[1]))
            assert (decision.model_version, decision.epoch) == (former, 2)
        finally:
            await learner.stop()

    asyncio.run(serve())
