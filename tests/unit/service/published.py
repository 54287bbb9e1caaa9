"""A small selector with all its files, from made-up signals and labels, for tests of the service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simmerge_ray.base.config import ServiceConfig, TrainConfig
from simmerge_ray.selector.data.dataset import build_dataset, with_keep
from simmerge_ray.selector.models.train import train_selector
from simmerge_ray.selector.planning.files import write_selectors
from simmerge_ray.service.bandit.artifact import warm_start_of, write_warm_start
from simmerge_ray.signals.propagation.second_order import SecondOrder
from simmerge_ray.signals.table import SignalTable
from tests.unit.selector.made_up import made_up_labels, made_up_table

CONFIG = TrainConfig(num_members=2, num_epochs=20, num_folds=3)


@dataclass(frozen=True)
class PublishedFiles:
    """selector: directory of the artifact. signals: the table."""

    selector: Path
    signals: Path

    def settings(self, root: Path, database: str | None = None, **changes: object) -> ServiceConfig:
        """Of a replica whose database and registry lie in `root`."""
        return ServiceConfig(
            database=database or f"sqlite:///{root}/service.db",
            registry=root / "registry",
            signals=self.signals,
            selector=self.selector,
            **changes,  # type: ignore[arg-type]
        )


def write_published(
    root: Path, seed: int = 0, num_checkpoints: int = 6, keep: bool = False, table: SignalTable | None = None
) -> PublishedFiles:
    """Checkpoints `s1-...`, or those of a table, with two arms, linear and ties, and both parents if they may be kept;
    another seed is another version of the selector."""
    table = table or made_up_table("s1", num_checkpoints)
    labels = made_up_labels(table)
    dataset = build_dataset(table, labels)
    dataset = with_keep(dataset) if keep else dataset
    config = CONFIG.model_copy(update={"seed": seed})
    selector = train_selector(dataset, config)
    shortlist = train_selector(dataset.restricted(SecondOrder(table).columns), config)
    write_selectors(root / "selector", selector, shortlist, dataset)
    warm = warm_start_of(selector, dataset, labels, config)
    assert warm is not None
    write_warm_start(root / "selector", warm)
    table.write(root / "pairs.parquet")
    return PublishedFiles(root / "selector", root / "pairs.parquet")
