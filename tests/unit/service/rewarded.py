"""A made-up service for tests of retraining: rewards follow a rule that the labels do not know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.selector.data.dataset import pair_features
from simmerge_ray.selector.data.files import LoadedDataset
from simmerge_ray.selector.models.model import Selector, read_selector
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.warm_start import contexts_of
from simmerge_ray.service.log.database import upgrade_database
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import Activation, DecisionMade, Event, RewardGiven, WarmStart
from simmerge_ray.service.log.fold import Setup, fold
from simmerge_ray.service.registry import Registry
from simmerge_ray.service.retraining.material import Material, material_of
from simmerge_ray.service.retraining.promotion import Result, present_setup, promote
from simmerge_ray.service.retraining.reward_labels import all_rows, logged_merges
from simmerge_ray.service.retraining.training import Retrained, train_candidate
from tests.unit.service.event_logs import opened

CONFIG = TrainConfig(num_epochs=60, num_members=2, hidden_sizes=(8,), num_folds=4)
ARMS = ("linear", "ties")
NAMESPACE = "tests"


@dataclass
class Service:
    """What a service writes into its log."""

    log: EventLog
    loaded: LoadedDataset
    present: Selector
    registry: Registry
    num: int = 0
    tasks: tuple[str, ...] = ("s", "t")

    def start(self) -> None:
        size = contexts_of(self.present.fitted, self.features("p-c00", "p-c01"), self.tasks).z.shape[1]
        priors = {arm: GaussianPosterior.prior(size, 2.0) for arm in ARMS}
        self.append(WarmStart(priors, Noise(0.01)))
        self.append(Activation(self.present.version))

    def append(self, event: Event) -> int:
        outcome = self.log.append(event)
        assert outcome.row is not None, outcome.reason
        return outcome.row.seq

    def features(self, left: str, right: str) -> np.ndarray:
        return np.array([pair_features(self.loaded.tables[0], left, right, task) for task in self.tasks])

    def decide(self, left: str, right: str, arm: str, explored: bool = True, **changes: Any) -> str:
        features = self.features(left, right)
        encoded = contexts_of(self.present.fitted, features, self.tasks)
        self.num += 1
        event = DecisionMade(
            f"d{self.num}",
            {"kind": "pair", "left": left, "right": right, "tasks": list(self.tasks)},
            features,
            encoded.z.mean(0),
            float(encoded.level.mean()),
            0,
            ARMS,
            (0.5, 0.5),
            arm,
            (arm,),
            explored,
            0,
            self.present.version,
        )
        self.append(replace(event, **changes))
        return f"d{self.num}"

    def utility(self, arm: str, turned: bool = False) -> float:
        """The arm that the labels take for the best fixed one is by far the worse one; or the other, if turned."""
        return 0.25 if (arm == self.present.best_fixed) != turned else 0.75

    def serve(self, num_rewards: int, turned: bool = False, explored: bool = True, seed: int = 0) -> None:
        """Decisions by a fair coin about pairs in turn, and their rewards."""
        generator = np.random.default_rng(seed)
        pairs = [(one.left, one.right) for one in self.loaded.dataset.contexts if one.task == "s"]
        for index in generator.integers(len(pairs), size=num_rewards):
            arm = ARMS[generator.integers(2)]
            utility = self.utility(arm, turned) + float(generator.normal(scale=0.02))
            self.append(RewardGiven(self.decide(*pairs[index], arm, explored), utility))

    def material(self, **options: Any) -> Material:
        return material_of(self.loaded, self.present, logged_merges(all_rows(self.log)), NAMESPACE, **options)

    def retrain(self, out: Path, margin: float = 0.03) -> tuple[Material, Retrained, Setup, Result]:
        material = self.material()
        setup = present_setup(material.logged.setups, NAMESPACE)
        selector = read_selector(self.registry.path(setup.version)) if setup.epoch else self.present
        material = material_of(self.loaded, selector, material.logged, NAMESPACE)
        candidate = train_candidate(material, selector, out)
        result = promote(self.log, self.registry, candidate, setup, material.logged.head, margin)
        return material, candidate, setup, result

    def posteriors(self, selectors: Sequence[Selector]) -> dict[str, GaussianPosterior]:
        """The fold of the log, by the encoders of the epochs."""

        def encode(epoch: int, features: np.ndarray, keep: bool) -> tuple[np.ndarray, float]:
            encoded = contexts_of(selectors[epoch].fitted, features, self.tasks)
            return (encoded.z_by_order[:, 0] if keep else encoded.z).mean(0), float(encoded.level.mean())

        return dict(fold(all_rows(self.log), encode).view().posteriors)


@contextmanager
def served(directory: Path, loaded: LoadedDataset, present: Selector) -> Iterator[Service]:
    """A service that has just started, with its log and registry in a directory."""
    upgrade_database(url_of(directory))
    present.write(directory / "present")
    registry = Registry(directory / "registry")
    registry.publish(directory / "present")
    with opened(url_of(directory), namespace=NAMESPACE) as log:
        made = Service(log, loaded, present, registry)
        made.start()
        yield made


def url_of(directory: Path) -> str:
    return f"sqlite:///{directory}/log.db"
