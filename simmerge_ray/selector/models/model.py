"""The selector: signals of a pair in, utilities of the arms and a choice out. numpy; stored as safetensors and JSON.

A row of `predictors.PREDICTORS` predicts. Around it: the scaling of the features, the encoding of the task, when to
leave the best fixed arm, which pairs are too far from the training data to be answered, and intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from simmerge_ray.base.arrays import load_arrays
from simmerge_ray.base.errors import SelectorError, shown_value
from simmerge_ray.base.json_text import JsonError
from simmerge_ray.base.storage import Place, digest_json, local_directory, read_json
from simmerge_ray.plans.keeping import KEEP_ARMS, keeps, merge_arms, named_arms
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.encoding import TaskEncoding
from simmerge_ray.selector.models.artifact import ModelParts
from simmerge_ray.selector.models.novelty import Novelty
from simmerge_ray.selector.models.policy import Choice, Intervals, SafeOverride, safe_choice
from simmerge_ray.selector.models.predictors import PREDICTORS, Predictor
from simmerge_ray.signals.features import FEATURE_SCHEMA
from simmerge_ray.signals.table import SignalTable

SELECTOR_SCHEMA = 2
_WEIGHTS = "selector.safetensors"
_DESCRIPTION = "selector.json"


@dataclass(frozen=True)
class InputScaling:
    """From features to a predictor's inputs. centre, scale: (F,), of the features over both orders."""

    centre: np.ndarray
    scale: np.ndarray
    encoding: TaskEncoding

    @staticmethod
    def fit(dataset: SelectionDataset, encoding: str) -> InputScaling:
        """Of training contexts; encoding: a kind, see `TaskEncoding`."""
        flat = dataset.features.reshape(-1, len(dataset.columns))
        scale = np.where(flat.std(0) > 1e-9, flat.std(0), 1.0)
        return InputScaling(flat.mean(0), scale, TaskEncoding.fit(encoding, dataset.tasks, dataset.statistics))

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """(N, 2, F) -> (N, 2, F). Raises SelectorError: features of another number, or one that is not finite."""
        if features.ndim != 3 or features.shape[1:] != (2, len(self.centre)):
            raise SelectorError(
                f"features have the shape {features.shape}; the selector takes (N, 2, {len(self.centre)}): "
                "both orders of each pair"
            )
        if not np.isfinite(features.sum()):  # without a second array of that size
            raise SelectorError("a feature is missing or not a finite number; compute the signals again")
        return (features - self.centre) / self.scale

    def inputs(
        self, features: np.ndarray, tasks: Sequence[str] | None = None, statistics: np.ndarray | None = None
    ) -> np.ndarray:
        """(N, 2, F) features and the tasks -> (N, 2, D): standardised, the task's code appended to both orders."""
        codes = self.encoding.codes(len(features), tasks, statistics)
        inputs = self.standardised(features)
        return np.concatenate([inputs, np.repeat(codes[:, None], 2, axis=1)], axis=2) if codes.shape[1] else inputs


@dataclass(frozen=True)
class FittedModel(InputScaling):
    """A predictor with the scaling of its inputs. keep: whether its last head is that of keep (`data.orders`)."""

    predictor: Predictor
    keep: bool = False

    def predict(
        self, features: np.ndarray, tasks: Sequence[str] | None = None, statistics: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2, F) -> utility (N, K) and sd (N, K)."""
        if not len(features):
            # Of one made-up row, for the number of arms.
            utility, _ = self.predictor.predict(np.zeros((1, 2, len(self.centre) + self.encoding.width)), self.keep)
            return np.zeros((0, utility.shape[1])), np.zeros((0, utility.shape[1]))
        return self.predictor.predict(self.inputs(features, tasks, statistics), self.keep)

    def utilities(self, dataset: SelectionDataset) -> np.ndarray:
        """(N, K): predictions for contexts whose utilities are known or not."""
        return self.predict(dataset.features, dataset.tasks, dataset.statistics)[0]


@dataclass(frozen=True)
class Selector:
    """Predicts utilities of arms from the signals of a pair on a task, and chooses an arm.

    arms: merge operators; then, where it was trained with them, keep(left) and keep(right). reference: the arms over
    which contrasts sum to zero; any other arm is a contrast to their mean. intervals: None if there were too few
    checkpoints to leave some out. provenance: digest of the training data, config, metrics.
    """

    arms: tuple[str, ...]
    reference: tuple[str, ...]
    columns: tuple[str, ...]
    fitted: FittedModel
    override: SafeOverride
    novelty: Novelty
    intervals: Intervals | None
    provenance: Mapping[str, Any]

    @property
    def best_fixed(self) -> str:
        """The arm with the best headline in the training data."""
        return self.override.best_fixed

    @property
    def label_error(self) -> float:
        """Standard error of the labels that it was trained on; 0 where it does not say."""
        return float(self.provenance.get("label_error", 0.0))

    @property
    def version(self) -> str:
        """Identity of what it was trained from and how: data, config, arms and features; 12 hexadecimal digits."""
        trained = [self.provenance.get(name) for name in ("data_digest", "config")]
        return digest_json([*trained, self.arms, self.columns])[:12]

    def predict(
        self, features: np.ndarray, tasks: Sequence[str] | None = None, statistics: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2, F) scaled features, as in `SelectionDataset` -> utility (N, K) and sd (N, K): of merges averaged over
        both orders of each pair (all operators here are symmetric), of keep(left) and keep(right) by order.

        tasks: of each context, unknown to the encoding `onehot` when left out. statistics: (N, S), as there; needed by
        `probe_stats`. Raises SelectorError: other features, missing ones, or a task that cannot be encoded.
        """
        utility, sd = self.fitted.predict(features, tasks, statistics)
        if not np.isfinite(utility.sum() + sd.sum()):
            raise SelectorError("the selector predicts what is no finite number: it is damaged; train it again")
        return utility, sd

    def distances(self, features: np.ndarray) -> np.ndarray:
        """(N, 2, F) -> (N,): distance of each context to the training data; beyond `novelty.limit` it is not known."""
        return self.novelty.distances(self.fitted.standardised(features))

    def half_widths(self, level: float) -> np.ndarray:
        """(K,): utility plus and minus this covers the measured one with probability `level`, for unseen checkpoints;
        never narrower than a label's own error allows, however few errors it was taken from.
        Raises SelectorError: the artifact has no interval of this level."""
        if self.intervals is None:
            raise SelectorError("this selector has no intervals: there were too few checkpoints to leave some out")
        if level not in self.intervals.levels:
            raise SelectorError(f"no interval of level {level}; known: {', '.join(map(str, self.intervals.levels))}")
        least = NormalDist().inv_cdf((1 + level) / 2) * self.label_error
        return np.maximum(self.intervals.half_widths[self.intervals.levels.index(level)], least)

    def choose(
        self,
        features: np.ndarray,
        tasks: Sequence[str] | None = None,
        statistics: np.ndarray | None = None,
        pair: tuple[str, str] | None = None,
    ) -> Choice:
        """One arm for one pair on T tasks together: the default policy. features: (T, 2, F), the pair's features on
        each task. pair: left and right, by which a kept parent is called; None calls it so."""
        if not len(features):
            raise SelectorError("a choice needs the features of one task at least")
        utility, _ = self.predict(features, tasks, statistics)
        distance = float(self.distances(features).max())
        names = self.arms if pair is None else named_arms(self.arms, *pair)
        return safe_choice(self.override, names, utility.mean(0), distance, self.novelty.limit)

    def check_table(self, table: SignalTable) -> None:
        """Refuse a table of other features than this selector was trained with; and see `check_weights`. Raises
        SelectorError: saying what differs."""
        if self.columns != table.columns:
            differing = sorted(set(self.columns) ^ set(table.columns)) or ["their order"]
            raise SelectorError(
                f"the signal table and the selector have different features, e.g. {differing[0]!r}; "
                "compute the signals as for training (with or without a base)"
            )
        self.check_weights(table)

    def check_weights(self, table: SignalTable) -> None:
        """Refuse a table of weight signals of another kind than this selector was trained with. Raises SelectorError:
        saying which to compute."""
        trained, given = (one.provenance.get("weights", "exact") for one in (self, table))
        if trained != given:
            raise SelectorError(
                f"the selector was trained with {trained} weight signals, the table has {given} ones; "
                f"compute it with --weights {trained}"
            )

    def write(self, path: Place) -> None:
        """Write the artifact directory, whole or not at all."""
        fitted = self.fitted
        description = {
            "schema": SELECTOR_SCHEMA,
            "feature_schema": FEATURE_SCHEMA,
            **{name: getattr(self, name) for name in ("arms", "reference", "columns")},
            "encoding": asdict(fitted.encoding),
            "best_fixed": self.best_fixed,
            "override": asdict(self.override) | {"threshold": None if self.override.never else self.override.threshold},
            "provenance": self.provenance,
        }
        parts = ModelParts(fitted.centre, fitted.scale, fitted.predictor, self.novelty, self.intervals)
        parts.write(path, "selector", description)


def read_selector(path: Place) -> Selector:
    """Load an artifact. Raises SelectorError: missing, damaged, or of another schema, saying what differs."""
    try:
        with local_directory(path) as directory:
            description = _description(directory / _DESCRIPTION, path)
            try:
                return _checked(_from_artifact(description, load_arrays(directory / _WEIGHTS)))
            except (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise SelectorError(f"selector {path} is damaged: {error}; train it again") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise SelectorError(f"no selector at {path}; `simmerge train` makes one") from None


def _description(file: Path, path: Place) -> dict[str, Any]:
    """Of a selector that this version reads; path: what the user calls its directory."""
    try:
        description = read_json(file)
    except JsonError as error:
        raise SelectorError(f"{path / _DESCRIPTION} is {error}") from None
    if not isinstance(description, dict):
        raise SelectorError(f"{path / _DESCRIPTION} is not a JSON object")
    for key, expected in (("schema", SELECTOR_SCHEMA), ("feature_schema", FEATURE_SCHEMA)):
        if (found := description.get(key)) != expected:
            raise SelectorError(f"selector {path}: {key} is {found}, this version reads {expected}; train it again")
    if (model := description.get("model")) not in list(PREDICTORS):  # a list: a file may have what no key can be
        raise SelectorError(f"selector {path}: model is {shown_value(model)}; known: {', '.join(PREDICTORS)}")
    return description


def _from_artifact(description: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Selector:
    parts = ModelParts.of(description, tensors)
    encoding = TypeAdapter(TaskEncoding).validate_python(description["encoding"])
    threshold = description["override"]["threshold"]
    arms, reference, columns = (tuple(description[name]) for name in ("arms", "reference", "columns"))
    if not all(isinstance(name, str) for name in (*arms, *reference, *columns)):
        raise TypeError("an arm or a column is no text")
    provenance = description["provenance"]
    if not isinstance(provenance, dict) or not isinstance(provenance.get("checkpoints", []), list):
        raise TypeError("its provenance is no object, or its checkpoints are no list")
    return Selector(
        arms,
        reference,
        columns,
        fitted=FittedModel(parts.centre, parts.scale, encoding, parts.predictor, keeps(arms)),
        override=TypeAdapter(SafeOverride).validate_python(
            description["override"] | {"threshold": math.inf if threshold is None else threshold}
        ),
        novelty=parts.novelty,
        intervals=parts.intervals,
        provenance=provenance,
    )


def _checked(selector: Selector) -> Selector:
    """A selector whose parts fit each other; raises ValueError otherwise."""
    num_features, num_arms = len(selector.columns), len(selector.arms)
    fitted = selector.fitted
    if fitted.centre.shape != (num_features,) or fitted.scale.shape != (num_features,):
        raise ValueError(f"it scales {len(fitted.centre)} features, {num_features} are named")
    if selector.novelty.rows.shape[1:] != (num_features,):
        raise ValueError(f"its training rows are not of {num_features} features")
    if not (np.isfinite(fitted.centre).all() and np.isfinite(fitted.scale).all() and (fitted.scale > 0).all()):
        raise ValueError("its scaling is not of finite numbers, those it divides by above 0")
    merges = set(merge_arms(selector.arms))
    if selector.best_fixed not in merges or not set(selector.reference) <= merges:
        raise ValueError("the best fixed arm or a reference arm is not among the merge operators")
    if len(merges) not in (num_arms, num_arms - 2) or (len(merges) < num_arms and not fitted.keep):
        raise ValueError(f"of {' and '.join(KEEP_ARMS)} it has one alone, or they do not stand last")
    if selector.intervals and selector.intervals.half_widths.shape != (len(selector.intervals.levels), num_arms):
        raise ValueError("its intervals are not of its arms")
    width = num_features + fitted.encoding.width
    utility, _ = fitted.predictor.predict(np.zeros((1, 2, width)), fitted.keep)
    if utility.shape != (1, num_arms):
        raise ValueError(f"the model predicts {utility.shape[1]} arms, {num_arms} are named")
    if not np.isfinite(utility).all():
        raise ValueError("the model predicts what is no finite number")
    return selector
