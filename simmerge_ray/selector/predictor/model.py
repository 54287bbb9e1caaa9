"""The predictor: candidate signals in, utilities with intervals out. numpy; stored as safetensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.arrays import load_arrays
from simmerge_ray.base.errors import SelectorError
from simmerge_ray.base.storage import Place, local_directory, read_json
from simmerge_ray.selector.models.artifact import ModelParts
from simmerge_ray.selector.models.novelty import Novelty
from simmerge_ray.selector.models.policy import Intervals
from simmerge_ray.selector.models.predictors import Predictor
from simmerge_ray.selector.predictor.signals import COLUMNS, SingleValues, candidate_features

PREDICTOR_SCHEMA = 1
_WEIGHTS, _DESCRIPTION = "predictor.safetensors", "predictor.json"


@dataclass(frozen=True)
class PredictedUtilities:
    """Of N candidates on T tasks.

    utility: (N, T) in [0, 1]; plus and minus `half_width` it covers the measured one with probability `level`, for
    checkpoints like those that were left out of the training. known: (N, T), whether such candidates were in it; what
    is not known is not to be relied on. half_width is None where too few checkpoints could be left out.
    """

    tasks: tuple[str, ...]
    utility: np.ndarray
    half_width: float | None
    level: float
    known: np.ndarray


def standardised(features: np.ndarray, centre: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(N, F) -> (N, 1, F): there is one order. Raises SelectorError: another number of inputs, or one that is not
    finite."""
    if features.ndim != 2 or features.shape[1] != len(centre):
        raise SelectorError(f"inputs have the shape {features.shape}; the predictor takes (N, {len(centre)})")
    if not np.isfinite(features).all():
        raise SelectorError("a candidate signal is missing or not a finite number")
    return np.asarray(((features - centre) / scale)[:, None])


@dataclass(frozen=True)
class FittedRows:
    """A family's predictor with the scaling of its inputs. centre, scale: (F,)."""

    centre: np.ndarray
    scale: np.ndarray
    predictor: Predictor

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """See `standardised`."""
        return standardised(features, self.centre, self.scale)

    def utility(self, features: np.ndarray) -> np.ndarray:
        """(N, F) -> (N,) in [0, 1]."""
        if not len(features):
            return np.zeros(0)
        return np.clip(self.predictor.predict(self.standardised(features))[0][:, 0], 0.0, 1.0)


@dataclass(frozen=True)
class UtilityPredictor:
    """Utility of (candidate, task) from `columns`.

    intervals: from errors on checkpoints that were left out; None if there were too few. provenance: digest of the
    training data, bases, config, metrics.
    """

    columns: tuple[str, ...]
    fitted: FittedRows
    novelty: Novelty
    intervals: Intervals | None
    provenance: Mapping[str, Any]

    def predict(
        self,
        tasks: Sequence[str],
        retention: np.ndarray,
        nll: np.ndarray,
        singles: SingleValues,
        level: float = 0.9,
    ) -> PredictedUtilities:
        """Of N candidates on the tasks of O owners, sorted.

        Args:
            tasks: (O,) of each owner. retention, nll: (N, O), probed or virtual. level: of the intervals.

        Raises:
            SelectorError: arrays that do not fit each other, missing signals, no interval of this level.
        """
        shape = (len(retention), len(tasks))
        sizes = {len(one) for one in (singles.base_retention, singles.base_nll, singles.own_nll)}
        if retention.shape != shape or nll.shape != shape or sizes != {len(tasks)} or not len(tasks):
            raise SelectorError(
                f"signals of the shapes {retention.shape} and {nll.shape} and single values of {sorted(sizes)} owners "
                f"do not fit {len(tasks)} owners"
            )
        names, features = candidate_features(tasks, retention, nll, singles)
        flat = features.reshape(-1, features.shape[-1])
        utility = self.fitted.utility(flat).reshape(features.shape[:2])
        half_width = None
        if self.intervals is not None:
            if level not in self.intervals.levels:
                known = ", ".join(map(str, self.intervals.levels))
                raise SelectorError(f"no interval of level {level}; known: {known}")
            half_width = float(self.intervals.half_widths[self.intervals.levels.index(level), 0])
        return PredictedUtilities(names, utility, half_width, level, self.is_known(flat).reshape(utility.shape))

    def is_known(self, features: np.ndarray) -> np.ndarray:
        """(N, F) -> (N,) bool: whether the training had candidates like these."""
        if not len(features):
            return np.zeros(0, dtype=bool)
        return np.asarray(self.novelty.distances(self.fitted.standardised(features)) <= self.novelty.limit)

    def write(self, path: Place) -> None:
        """Write the artifact directory, whole or not at all."""
        fitted = self.fitted
        description = {"schema": PREDICTOR_SCHEMA, "columns": self.columns, "provenance": self.provenance}
        parts = ModelParts(fitted.centre, fitted.scale, fitted.predictor, self.novelty, self.intervals)
        parts.write(path, "predictor", description)


def read_predictor(path: Place) -> UtilityPredictor:
    """Load an artifact. Raises SelectorError: missing, damaged, or of another schema, saying what differs."""
    try:
        with local_directory(path) as directory:
            try:
                description = read_json(directory / _DESCRIPTION)
                if (schema := description["schema"]) != PREDICTOR_SCHEMA:
                    raise SelectorError(
                        f"predictor {path}: schema is {schema}, this version reads {PREDICTOR_SCHEMA}; train it again"
                    )
                return _from_tensors(description, load_arrays(directory / _WEIGHTS))
            except (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise SelectorError(f"predictor {path} is damaged: {error}; train it again") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise SelectorError(f"no predictor at {path}; `simmerge predictor train` makes one") from None


def _from_tensors(description: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> UtilityPredictor:
    """Raises ValueError where the parts do not fit each other."""
    columns, parts = tuple(description["columns"]), ModelParts.of(description, tensors)
    if columns != COLUMNS:
        raise ValueError(f"its inputs are {', '.join(columns)}, this version has {', '.join(COLUMNS)}")
    fitted = FittedRows(parts.centre, parts.scale, parts.predictor)
    if {one.shape for one in (fitted.centre, fitted.scale, parts.novelty.rows[0])} != {(len(columns),)}:
        raise ValueError("its scaling or its training rows are of other inputs")
    if parts.predictor.predict(np.zeros((1, 1, len(columns))))[0].shape != (1, 1):
        raise ValueError("the model predicts more than one number")
    intervals = parts.intervals
    if intervals is not None and intervals.half_widths.shape != (len(intervals.levels), 1):
        raise ValueError("its intervals are not of its levels")
    return UtilityPredictor(columns, fitted, parts.novelty, intervals, description["provenance"])
