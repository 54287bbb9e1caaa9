"""What the artifacts of selectors and of predictors have in common: a fitted model, novelty and intervals, as a
directory of one safetensors and one JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.storage import Place, new_directory, versions, write_json
from simmerge_ray.selector.models.novelty import Novelty
from simmerge_ray.selector.models.policy import Intervals
from simmerge_ray.selector.models.predictors import PREDICTORS, Predictor


@dataclass(frozen=True)
class ModelParts:
    """centre, scale: (F,) of the inputs."""

    centre: np.ndarray
    scale: np.ndarray
    predictor: Predictor
    novelty: Novelty
    intervals: Intervals | None

    def write(self, path: Place, kind: str, description: Mapping[str, Any]) -> None:
        """Write `kind`.safetensors and `kind`.json into a new directory, whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {"centre": self.centre, "scale": self.scale, "novelty": self.novelty.rows}
        tensors |= {f"model.{name}": value for name, value in self.predictor.tensors().items()}
        if self.intervals is not None:
            tensors["half_widths"] = self.intervals.half_widths
        common = {
            "model": self.predictor.kind,
            "novelty_limit": self.novelty.limit,
            "interval_levels": self.intervals.levels if self.intervals else [],
            "versions": versions(),
        }
        with new_directory(path) as target:
            arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
            save_file(arrays, str(target / f"{kind}.safetensors"))
            write_json(target / f"{kind}.json", {**description, **common})

    @staticmethod
    def of(description: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> ModelParts:
        """What `write` wrote. Raises KeyError, TypeError, ValueError: a part is missing or makes no model."""
        of_model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        levels = tuple(description["interval_levels"])
        return ModelParts(
            tensors["centre"],
            tensors["scale"],
            PREDICTORS[description["model"]].from_tensors(of_model),
            Novelty(tensors["novelty"], float(description["novelty_limit"])),
            Intervals(levels, tensors["half_widths"]) if levels else None,
        )
