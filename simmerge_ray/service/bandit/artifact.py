"""What the arms of a service start from, in the directory of a selector: posteriors from its labels, and the noise.

`warm_start.safetensors` holds precision and moment of every arm, `warm_start.json` the counts, and which arms make the
same merge of a pair (labels say so with `same_as`): such arms are one class, of which any reward is a reward of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import BanditError, InputError, SelectorError
from simmerge_ray.base.storage import Place, read_bytes, read_json, write_json
from simmerge_ray.search.labels import LabeledPlan
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.splits import checkpoint_folds, pairs_of
from simmerge_ray.selector.models.model import Selector
from simmerge_ray.selector.models.predictors import MlpPredictor
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.bandit.posterior import COUNTS, GaussianPosterior
from simmerge_ray.service.bandit.warm_start import start_from_labels

_TENSORS, _TEXT = "warm_start.safetensors", "warm_start.json"
_FORMAT = 1

Classes = Mapping[tuple[str, str], tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class WarmStartFile:
    """posteriors: by arm. identical: by sorted pair, classes of arms that make the same merge of it."""

    posteriors: Mapping[str, GaussianPosterior]
    noise: Noise
    identical: Classes


def identical_arms(labels: Iterable[LabeledPlan]) -> dict[tuple[str, str], tuple[tuple[str, ...], ...]]:
    """Classes of arms that the search found to make the same merge, by sorted pair."""
    found: dict[tuple[str, str], list[set[str]]] = {}
    for label in labels:
        if label.same_as is None or len(label.plan.steps) != 1:
            continue
        arm, other = label.plan.steps[0].arm.label, label.same_as.split(": ", 1)[0]
        left, right = sorted(label.plan.members)
        classes = found.setdefault((left, right), [])
        joined = {arm, other}.union(*(one for one in classes if one & {arm, other}))
        found[left, right] = [one for one in classes if not one & joined] + [joined]
    return {pair: tuple(tuple(sorted(one)) for one in classes) for pair, classes in found.items()}


def warm_start_of(
    selector: Selector, dataset: SelectionDataset, labels: Iterable[LabeledPlan], config: TrainConfig
) -> WarmStartFile | None:
    """Posteriors from the labels that a selector was trained on, its level taken out of fold (`warm_start`).

    None for a selector without an encoder, a task encoding that needs more than features, or too few labels to leave
    checkpoints out: such a service starts cold.
    """
    if not isinstance(selector.fitted.predictor, MlpPredictor) or selector.fitted.encoding.kind == "probe_stats":
        return None
    known = [row for row in range(len(dataset.contexts)) if not np.isnan(dataset.utilities[row]).any()]
    try:
        part = dataset.subset(known)
        folds = checkpoint_folds(pairs_of(part.contexts), config.num_folds, config.seed)
        tested = [fold for fold in folds if fold.tested]
        posteriors, noise = start_from_labels(part, selector.fitted, tested, config)
    except InputError:
        return None
    return WarmStartFile(posteriors, noise, identical_arms(labels))


def write_warm_start(path: Path, warm: WarmStartFile) -> None:
    """Add it to the directory of a selector."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for number, one in enumerate(warm.posteriors.values()):
        tensors |= {f"{number}.precision": one.precision, f"{number}.moment": one.moment}
    arms = [{"arm": arm} | {name: getattr(one, name) for name in COUNTS} for arm, one in warm.posteriors.items()]
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, str(path / _TENSORS))
    content: dict[str, Any] = {
        "format": _FORMAT,
        "arms": arms,
        "noise": {"variance": warm.noise.variance, "shape": None},  # shape: of the format alone
        "identical": [[*pair, [list(one) for one in classes]] for pair, classes in sorted(warm.identical.items())],
    }
    write_json(path / _TEXT, content)


def read_warm_start(path: Place) -> WarmStartFile | None:
    """What `write_warm_start` wrote; None where there is nothing. Raises SelectorError: it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not (path / _TEXT).exists():
        return None
    try:
        content, tensors = read_json(path / _TEXT), load(read_bytes(path / _TENSORS))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
        posteriors = {
            one["arm"]: GaussianPosterior(
                tensors[f"{number}.precision"], tensors[f"{number}.moment"], *(one[name] for name in COUNTS)
            )
            for number, one in enumerate(content["arms"])
        }
        identical = {(left, right): tuple(map(tuple, classes)) for left, right, classes in content["identical"]}
        return WarmStartFile(posteriors, Noise(content["noise"]["variance"]), identical)
    except (OSError, KeyError, TypeError, ValueError, BanditError, SafetensorError) as error:
        raise SelectorError(f"the warm start in {path} is damaged: {error}; train the selector again") from None
