"""The retraining of `jobs/retrain.py`: opens log, registry and data set, and reports in one line what happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from simmerge_ray.base.config import RetrainConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import write_atomically
from simmerge_ray.plans.keeping import keeps
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.selector.data.dataset import with_keep
from simmerge_ray.selector.data.files import find_dataset, read_dataset
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.service.bandit.artifact import identical_arms
from simmerge_ray.service.log.database import open_database
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.registry import Registry
from simmerge_ray.service.retraining.material import material_of
from simmerge_ray.service.retraining.promotion import TRAINED, UNCHANGED, Result, present_setup, promote, roll_back
from simmerge_ray.service.retraining.report import report_text
from simmerge_ray.service.retraining.reward_labels import all_rows, logged_merges
from simmerge_ray.service.retraining.shadow import verdict
from simmerge_ray.service.retraining.training import train_candidate

REPORT = "retrain.md"


def run_retraining(config: RetrainConfig, promote_it: bool, dry_run: bool) -> Result:
    """Train, compare, write the report, and promote if asked to.

    Raises:
        InputError: log, registry, data set or present selector are missing or do not fit. StoreError: the database.
    """
    if config.dataset is None or config.out is None:
        raise ConfigError("--dataset and --out are needed (only --roll-back does without)")
    with _opened(config.database, config.namespace) as log:
        logged = logged_merges(all_rows(log))
        setup = present_setup(logged.setups, config.namespace)
        registry = Registry(config.registry)
        present = read_selector(registry.path(setup.version))
        files = find_dataset(config.dataset)
        loaded = read_dataset(files, present.reference)
        if keeps(present.arms):
            loaded = replace(loaded, dataset=with_keep(loaded.dataset))
        identical = identical_arms(label for path in files.labels for label in LabelStore(path).read())
        material = material_of(loaded, present, logged, config.namespace, config.held_out, identical)
        if dry_run:
            told = f"{len(material.rewards)} rewards to train on beside {len(material.labelled.contexts)} contexts"
            return Result("kept", setup.version, f"a dry run; {told}, {len(material.held_out)} held out")
        candidate = train_candidate(material, present, config.out)
        if candidate.version == setup.version:
            return Result(UNCHANGED, candidate.version, "it is what these labels and rewards make")
        if promote_it:
            result = promote(log, registry, candidate, setup, logged.head, config.margin)
        else:
            decided = verdict(candidate.log, candidate.labels, config.margin)
            would = "would be promoted" if decided.promote else "would not be promoted"
            result = Result(TRAINED, candidate.version, f"{would}: {decided.reason}")
        path = candidate.path / REPORT
        write_atomically(path, report_text(material, candidate, setup, result, config.margin).encode())
        return Result(result.done, result.version, f"{result.reason} -> {path}")


def run_roll_back(config: RetrainConfig, version: str) -> Result:
    """Let a former selector answer again; errors as `run_retraining`."""
    with _opened(config.database, config.namespace) as log:
        return roll_back(log, Registry(config.registry), version)


@contextmanager
def _opened(database: str, namespace: str) -> Iterator[EventLog]:
    engine = open_database(database, patient=True)
    try:
        with closing(EventLog(engine, namespace)) as log:
            yield log
    finally:
        engine.dispose()
