"""The selector: an ensemble of small networks, evaluated with numpy, stored as safetensors and JSON.

One network is an encoder z = relu(... relu(x W + b)) and two heads on it: a level (what any merge of this pair reaches)
and a contrast per arm. `U_o(x) = level(z) + contrast_o(z)` with contrasts that sum to zero over the arms: the contrast
chooses the arm within a merge, level plus contrast ranks merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.errors import SelectorError
from simmerge_ray.selector.dataset import pair_features
from simmerge_ray.signals.features import FEATURE_SCHEMA
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.storage import new_directory, versions, write_json

SELECTOR_SCHEMA = 1


@dataclass(frozen=True)
class Network:
    """Weights of one member of the ensemble.

    layers: encoder layers (weight (in, out), bias (out,)). level: (hidden, 1), (1,). contrast: (hidden, K), (K,).
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    level: tuple[np.ndarray, np.ndarray]
    contrast: tuple[np.ndarray, np.ndarray]

    def encode(self, inputs: np.ndarray) -> np.ndarray:
        """(..., F) standardised features -> (..., hidden)."""
        for weight, bias in self.layers:
            inputs = np.maximum(inputs @ weight + bias, 0.0)
        return inputs

    def utilities(self, inputs: np.ndarray) -> np.ndarray:
        """(..., F) standardised features -> (..., K)."""
        encoded = self.encode(inputs)
        contrast = encoded @ self.contrast[0] + self.contrast[1]
        return encoded @ self.level[0] + self.level[1] + contrast - contrast.mean(-1, keepdims=True)


@dataclass(frozen=True)
class Prediction:
    """Predicted utilities of the arms, in the selector's order. utility, sd: (K,); sd is the spread of the ensemble."""

    arms: tuple[str, ...]
    utility: np.ndarray
    sd: np.ndarray


@dataclass(frozen=True)
class Selector:
    """Predicts utilities of arms from the signals of a pair on a task.

    centre, scale: (F,) standardisation. best_fixed: the arm with the highest mean utility in the training data.
    provenance: digest of the training data, config, metrics.
    """

    arms: tuple[str, ...]
    columns: tuple[str, ...]
    centre: np.ndarray
    scale: np.ndarray
    members: tuple[Network, ...]
    best_fixed: str
    provenance: Mapping[str, Any]

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and spread of the ensemble, averaged over both orders of each pair (all arms here are symmetric).

        Args:
            features: (N, 2, F) scaled features, as in `SelectionDataset`.

        Returns:
            utility (N, K) and sd (N, K).
        """
        inputs = (features - self.centre) / self.scale
        outputs = np.stack([member.utilities(inputs).mean(1) for member in self.members])
        return outputs.mean(0), outputs.std(0)

    def predict_pair(self, table: SignalTable, left: str, right: str, tasks: Sequence[str]) -> dict[str, Prediction]:
        """Predictions for one pair, per task.

        Raises:
            SelectorError: the table does not have the features that this selector was trained with.
            PlanError: the pair or a task is not in the table.
        """
        if self.columns != table.columns:
            missing = sorted(set(self.columns) - set(table.columns)) or sorted(set(table.columns) - set(self.columns))
            raise SelectorError(
                f"the signal table and the selector have different features, e.g. {missing[0]!r}; "
                "compute the signals as for training (with or without a base)"
            )
        trained, given = self.provenance.get("weights", "exact"), table.provenance.get("weights", "exact")
        if trained != given:
            raise SelectorError(
                f"the selector was trained with {trained} weight signals, the table has {given} ones; "
                f"compute it with --weights {trained}"
            )
        utility, sd = self.predict(np.array([pair_features(table, left, right, task) for task in tasks]))
        return {task: Prediction(self.arms, utility[i], sd[i]) for i, task in enumerate(tasks)}

    def write(self, path: Path) -> None:
        """Write the artifact directory, whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {"centre": self.centre, "scale": self.scale}
        for index, member in enumerate(self.members):
            for number, pair in enumerate((*member.layers, member.level, member.contrast)):
                tensors[f"member{index}.layer{number}.weight"], tensors[f"member{index}.layer{number}.bias"] = pair
        with new_directory(path) as target:
            save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, str(target / _WEIGHTS))
            write_json(
                target / _DESCRIPTION,
                {
                    "schema": SELECTOR_SCHEMA,
                    "feature_schema": FEATURE_SCHEMA,
                    "arms": self.arms,
                    "columns": self.columns,
                    "num_members": len(self.members),
                    "num_layers": len(self.members[0].layers),
                    "best_fixed": self.best_fixed,
                    "provenance": self.provenance,
                    "versions": versions(),
                },
            )


_WEIGHTS = "selector.safetensors"
_DESCRIPTION = "selector.json"


def read_selector(path: Path) -> Selector:
    """Load an artifact.

    Raises:
        SelectorError: missing, damaged, or of another schema, saying what differs.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        description = json.loads((path / _DESCRIPTION).read_text())
    except OSError:
        raise SelectorError(f"no selector at {path}; `simmerge train` makes one") from None
    except ValueError:
        raise SelectorError(f"{path / _DESCRIPTION} is not JSON") from None
    for key, expected in (("schema", SELECTOR_SCHEMA), ("feature_schema", FEATURE_SCHEMA)):
        if description.get(key) != expected:
            raise SelectorError(
                f"selector {path}: {key} is {description.get(key)}, this version reads {expected}; train it again"
            )
    try:
        tensors = load_file(str(path / _WEIGHTS))
        members = []
        for index in range(description["num_members"]):
            pairs = [
                (tensors[f"member{index}.layer{n}.weight"], tensors[f"member{index}.layer{n}.bias"])
                for n in range(description["num_layers"] + 2)
            ]
            members.append(Network(tuple(pairs[:-2]), pairs[-2], pairs[-1]))
        return Selector(
            arms=tuple(description["arms"]),
            columns=tuple(description["columns"]),
            centre=tensors["centre"],
            scale=tensors["scale"],
            members=tuple(members),
            best_fixed=description["best_fixed"],
            provenance=description["provenance"],
        )
    except (OSError, KeyError, SafetensorError) as error:
        raise SelectorError(f"selector {path} is damaged: {error}") from None
