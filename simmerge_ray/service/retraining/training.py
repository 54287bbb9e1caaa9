"""Train a selector on labels and rewards, and compare it with the present one; all of it is kept in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from simmerge_ray.base.errors import LabelError
from simmerge_ray.base.storage import new_directory, read_json, write_json
from simmerge_ray.plans.keeping import merge_arms
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.rewards import RewardedMerge
from simmerge_ray.selector.models.model import Selector, read_selector
from simmerge_ray.selector.models.train import MIN_CONTEXTS, train_selector
from simmerge_ray.selector.planning.files import write_selectors
from simmerge_ray.service.bandit.artifact import WarmStartFile, read_warm_start, write_warm_start
from simmerge_ray.service.bandit.warm_start import cold_ridge, start_from_labels
from simmerge_ray.service.log.events import EncoderEpoch
from simmerge_ray.service.retraining import shadow
from simmerge_ray.service.retraining.material import Material
from simmerge_ray.service.retraining.reward_labels import reward_labels
from simmerge_ray.signals.propagation.second_order import SecondOrder

SELECTOR, LABELS = "selector", "labels"


@dataclass(frozen=True)
class Comparison:
    """With the present selector: on held-out rewards, and on the labels."""

    log: shadow.OnLog | None
    labels: shadow.OnLabels | None


@dataclass(frozen=True)
class Retrained:
    """A trained selector beside the present one. epoch: to be promoted by, its number still open."""

    version: str
    path: Path
    epoch: EncoderEpoch
    log: shadow.OnLog | None
    labels: shadow.OnLabels | None


def train_candidate(material: Material, present: Selector, out: Path) -> Retrained:
    """Train a selector on labels and rewards, compare it with the present one, and keep all of it below `out`.

    The selector whole or not at all, under a name by what it is made from; what is there is read.
    Raises LabelError: too few labels, see `train_selector`.
    """
    target = out / f"retrain-{material.digest[:12]}"
    if not target.exists():
        selector = _trained(material, material.dataset, material.rewards)
        selector = replace(selector, override=shadow.override_on_log(selector, material))
        with new_directory(target) as partial:
            _write(partial, material, selector)
    selector, warm = read_selector(target / SELECTOR), read_warm_start(target / SELECTOR)
    assert warm is not None, "written with the selector"
    size = next(iter(warm.posteriors.values())).num_dimensions
    event = EncoderEpoch(1, size, cold_ridge(warm.noise), warm.posteriors, warm.noise, selector.version)
    if event.model_version == present.version:
        return Retrained(event.model_version, target, event, None, None)
    compared = target / f"comparison-{present.version}.json"
    if not compared.exists():
        on_log = shadow.compare_on_log(present, selector, material.held_out)
        write_json(compared, asdict(Comparison(on_log, shadow.compare_on_labels(material))))
    comparison = TypeAdapter(Comparison).validate_python(read_json(compared))
    return Retrained(event.model_version, target, event, comparison.log, comparison.labels)


def _trained(material: Material, dataset: SelectionDataset, rewards: Sequence[RewardedMerge]) -> Selector:
    selector = train_selector(dataset, material.config, merge_arms(material.labelled.arms), rewards)
    about = {"namespace": material.namespace, "num": len(rewards), "last_seq": material.last_seq}
    return replace(selector, provenance={**selector.provenance, "rewards": about})


def _write(target: Path, material: Material, selector: Selector) -> None:
    """Selector with its warm start, that of the shortlist on the features of `second_order`, the rewards as labels."""
    part = material.dataset.restricted(SecondOrder(material.loaded.tables[0]).columns)
    index = [material.dataset.columns.index(column) for column in part.columns]
    rewards = [replace(one, features=one.features[..., index]) for one in material.rewards]
    write_selectors(target / SELECTOR, selector, _trained(material, part, rewards), material.labelled)
    write_warm_start(target / SELECTOR, _warm_start(material, selector))
    digests: dict[str, str] = {}
    for table in material.loaded.tables:
        digests |= table.provenance["checkpoints"]
    LabelStore(target / LABELS).append(reward_labels(material.logged, material.namespace, digests))


def _warm_start(material: Material, selector: Selector) -> WarmStartFile:
    """Priors from the labels alone: the rewards come when the log is folded."""
    labelled, folds = material.labelled, material.folds
    if not folds:
        raise LabelError(
            f"no checkpoint can be left out and {MIN_CONTEXTS} contexts kept: the bandit cannot start from these labels"
        )
    posteriors, noise = start_from_labels(labelled, selector.fitted, folds, material.config, material.fold_models)
    return WarmStartFile(posteriors, noise, material.identical)
