"""From the signals of a pair to utilities: four families behind one interface, evaluated with numpy alone.

Every family predicts a level (what any merge of this pair reaches) and a contrast per arm, `U_o = level + contrast_o`,
with contrasts that sum to zero over the reference arms: the contrast chooses the arm within a merge, both together rank
merges. What is stored is centred already, so nothing here needs to know which arms are the reference. Where keeping a
parent is a choice, the last head is that of keep (`data.orders`). `sd` is how
far the answer itself is uncertain (spread of an ensemble, of neighbours, of a posterior), not the noise of a label.

Shapes: N contexts, 2 orders of the pair, D standardised inputs, K arms, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import numpy as np

from simmerge_ray.selector.data.orders import of_arms
from simmerge_ray.selector.models.forest import Trees

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Predictor(ABC):
    """Utilities from standardised inputs of both orders of each pair. Its fields are arrays, and all that is stored,
    unless a family says otherwise."""

    kind: ClassVar[str]

    @abstractmethod
    def predict(self, inputs: np.ndarray, keep: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2, D) -> utility (N, K) and sd (N, K). keep: whether the last head is that of keep."""

    def tensors(self) -> dict[str, np.ndarray]:
        """All that `from_tensors` needs, by name."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Self:
        """The inverse of `tensors`; a KeyError, IndexError or ValueError if they do not belong to this family."""
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Network:
    """Weights of one member of the ensemble.

    layers: encoder layers (weight (in, out), bias (out,)). level: (hidden, 1), (1,). contrast: (hidden, H), (H,),
    centred over the reference arms.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    level: tuple[np.ndarray, np.ndarray]
    contrast: tuple[np.ndarray, np.ndarray]

    def encode(self, inputs: np.ndarray) -> np.ndarray:
        """(..., D) standardised inputs -> (..., hidden)."""
        for weight, bias in self.layers:
            inputs = np.maximum(inputs @ weight + bias, 0.0)
        return inputs

    def utilities(self, inputs: np.ndarray) -> np.ndarray:
        """(..., D) standardised inputs -> (..., H)."""
        encoded = self.encode(inputs)
        return encoded @ self.level[0] + self.level[1] + encoded @ self.contrast[0] + self.contrast[1]


@dataclass(frozen=True)
class MlpPredictor(Predictor):
    """An ensemble of small networks: an encoder z = relu(... relu(x W + b)) with two linear heads on it."""

    kind: ClassVar[str] = "mlp"
    members: tuple[Network, ...]

    def predict(self, inputs: np.ndarray, keep: bool = False) -> tuple[np.ndarray, np.ndarray]:
        outputs = np.stack([of_arms(member.utilities(inputs), keep) for member in self.members])
        return outputs.mean(0), outputs.std(0)

    def encode(self, inputs: np.ndarray) -> np.ndarray:
        """(N, 2, D) -> (N, 2, E, hidden), of each order; the heads are linear on it."""
        return np.stack([member.encode(inputs) for member in self.members], axis=2)

    def tensors(self) -> dict[str, np.ndarray]:
        found = {"shape": np.array([len(self.members), len(self.members[0].layers)])}
        for index, member in enumerate(self.members):
            for number, pair in enumerate((*member.layers, member.level, member.contrast)):
                found[f"member{index}.layer{number}.weight"], found[f"member{index}.layer{number}.bias"] = pair
        return found

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Self:
        num_members, num_layers = (int(number) for number in tensors["shape"])
        if not 0 <= num_layers <= len(tensors):  # before that many names are made
            raise ValueError(f"{len(tensors)} arrays are no {num_layers} layers")
        members = []
        for index in range(num_members):
            names = [f"member{index}.layer{number}" for number in range(num_layers + 2)]
            pairs = [(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names]
            *layers, level, contrast = pairs
            widths = [weight.shape[1] for weight, _ in layers]
            if [weight.shape[0] for weight, _ in (*layers[1:], level, contrast)] != [*widths, widths[-1]]:
                raise ValueError(f"the layers of member {index} do not fit each other")
            members.append(Network(tuple(layers), level, contrast))
        if not members:
            raise ValueError("an ensemble without members")
        return cls(tuple(members))


@dataclass(frozen=True)
class RidgePredictor(Predictor):
    """Linear level and contrasts, each with its own penalty; sd is that of the posterior of the coefficients.

    coefficients: (D + 1, H), the last row the intercept. level_root, contrast_root: (D + 1, D + 1), square roots of the
    posterior covariances at unit noise. noise: (H + 1,), residual sd of the level, then of the contrasts.
    """

    kind: ClassVar[str] = "ridge"
    coefficients: np.ndarray
    level_root: np.ndarray
    contrast_root: np.ndarray
    noise: np.ndarray

    def predict(self, inputs: np.ndarray, keep: bool = False) -> tuple[np.ndarray, np.ndarray]:
        utility, sd = self._of_heads(inputs.mean(1))  # linear, so the mean over both orders is that of the mean input
        if keep:
            by_order = [self._of_heads(inputs[:, order]) for order in (0, 1)]
            kept = [np.stack([one[part][:, -1] for one in by_order], axis=1) for part in (0, 1)]
            utility, sd = (np.hstack([all_heads[:, :-1], k]) for all_heads, k in zip((utility, sd), kept, strict=True))
        return utility, sd

    def _of_heads(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) -> utility and sd, (N, H)."""
        design = np.hstack([inputs, np.ones((len(inputs), 1))])
        level = np.linalg.norm(design @ self.level_root, axis=1, keepdims=True) * self.noise[0]
        contrast = np.linalg.norm(design @ self.contrast_root, axis=1, keepdims=True) * self.noise[1:]
        return design @ self.coefficients, np.hypot(level, contrast)

    def __post_init__(self) -> None:
        if self.noise.shape != (self.coefficients.shape[1] + 1,):
            raise ValueError("noise and coefficients are of different arms")


@dataclass(frozen=True)
class KnnPredictor(Predictor):
    """Mean of the k nearest training rows; sd is theirs.

    inputs: (M, D), both orders of every training pair. utilities: (M, H), NaN where a later arm was not measured.
    mean: (H,), for an arm that none of the neighbours has. num_neighbours: (1,), k.
    """

    kind: ClassVar[str] = "knn"
    inputs: np.ndarray
    utilities: np.ndarray
    mean: np.ndarray
    num_neighbours: np.ndarray

    def predict(self, inputs: np.ndarray, keep: bool = False) -> tuple[np.ndarray, np.ndarray]:
        count = min(int(self.num_neighbours[0]), len(self.inputs))
        flat = inputs.reshape(-1, inputs.shape[-1])
        nearest = np.argsort(squared_distances(flat, self.inputs), axis=1, kind="stable")[:, :count]
        found = self.utilities[nearest]
        known = ~np.isnan(found)
        number = np.maximum(known.sum(1), 1)
        mean = np.where(known.any(1), np.where(known, found, 0.0).sum(1) / number, self.mean)
        spread = np.where(known, (found - mean[:, None]) ** 2, 0.0).sum(1) / number
        shape = (*inputs.shape[:2], -1)
        return of_arms(mean.reshape(shape), keep), np.sqrt(of_arms(spread.reshape(shape), keep))

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.utilities) or not len(self.inputs):
            raise ValueError("inputs and utilities are of different rows")


@dataclass(frozen=True)
class ForestPredictor(Predictor):
    """A forest for the level, one for the contrasts of the reference arms, one for each later arm; sd over the trees.

    Apart, because the level varies much more than the contrasts and would take every split. order: (H,), the place of
    each head among the outputs of the contrast forests.
    """

    kind: ClassVar[str] = "forest"
    level: Trees
    contrasts: tuple[Trees, ...]
    order: np.ndarray

    def predict(self, inputs: np.ndarray, keep: bool = False) -> tuple[np.ndarray, np.ndarray]:
        flat, shape = inputs.reshape(-1, inputs.shape[-1]), (*inputs.shape[:2], -1)

        def of_each_order(trees: Trees) -> np.ndarray:
            outputs = trees.outputs(flat)
            return outputs.reshape(len(outputs), *shape)

        level = of_each_order(self.level).mean(2)
        contrasts = np.concatenate([of_each_order(trees) for trees in self.contrasts], axis=3)[..., self.order]
        contrast = of_arms(contrasts, keep)
        utility = level.mean(0) + contrast.mean(0)
        return utility, np.hypot(level.std(0), contrast.std(0))

    def tensors(self) -> dict[str, np.ndarray]:
        found = {"order": self.order, "num_contrasts": np.array([len(self.contrasts)])}
        for index, trees in enumerate((self.level, *self.contrasts)):
            found |= {f"forest{index}.{name}": value for name, value in vars(trees).items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Self:
        names = [field.name for field in fields(Trees)]
        count = int(tensors["num_contrasts"][0]) + 1
        level, *contrasts = [Trees(*(tensors[f"forest{index}.{name}"] for name in names)) for index in range(count)]
        return cls(level, tuple(contrasts), tensors["order"])


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N, D), (M, D) -> (N, M) squared Euclidean distances."""
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1)[None]
    return np.maximum(squares - 2.0 * left @ right.T, 0.0)


PREDICTORS: Mapping[str, type[Predictor]] = {
    row.kind: row for row in (MlpPredictor, RidgePredictor, KnnPredictor, ForestPredictor)
}
