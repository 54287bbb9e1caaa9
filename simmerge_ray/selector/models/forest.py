"""Random forests as plain arrays, evaluated with numpy exactly as scikit-learn evaluates them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

_FIELDS = ("starts", "left", "right", "feature", "threshold", "value")


@dataclass(frozen=True)
class Trees:
    """T trees, their M nodes one after another.

    starts: (T + 1,), where the nodes of each tree begin. left, right: (M,) children, counted within the tree, -1 in a
    leaf. feature, threshold: (M,), a row goes left where its float32 value is at most the threshold.
    value: (M, O) outputs.
    """

    starts: np.ndarray
    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray

    @classmethod
    def of_sklearn(cls, forest: Any) -> Trees:
        """The trees of a fitted `RandomForestRegressor`."""
        trees = [estimator.tree_ for estimator in forest.estimators_]
        return cls(
            starts=np.cumsum([0, *(tree.node_count for tree in trees)]),
            left=np.concatenate([tree.children_left for tree in trees]),
            right=np.concatenate([tree.children_right for tree in trees]),
            feature=np.concatenate([tree.feature for tree in trees]),
            threshold=np.concatenate([tree.threshold for tree in trees]),
            value=np.concatenate([tree.value[:, :, 0] for tree in trees]),
        )

    def outputs(self, inputs: np.ndarray) -> np.ndarray:
        """(N, D) -> (T, N, O): the leaf that each row reaches in each tree."""
        rows = inputs.astype(np.float32)
        starts = self.starts[:-1, None]
        node = np.repeat(starts, len(rows), axis=1)
        index = np.arange(len(rows))[None]
        while (inner := self.left[node] >= 0).any():
            goes_left = rows[index, np.where(inner, self.feature[node], 0)] <= self.threshold[node]
            child = starts + np.where(goes_left, self.left[node], self.right[node])
            node = np.where(inner, child, node)
        return self.value[node]

    def check(self) -> None:
        """Raises ValueError where following the children would leave the tree or never end."""
        count = len(self.left)
        if self.starts[0] != 0 or self.starts[-1] != count or (np.diff(self.starts) < 1).any():
            raise ValueError("the trees do not begin where they should")
        if any(len(getattr(self, name)) != count for name in _FIELDS[2:]):
            raise ValueError("the nodes have fields of different lengths")
        sizes = np.repeat(np.diff(self.starts), np.diff(self.starts))
        own = np.arange(count) - np.repeat(self.starts[:-1], np.diff(self.starts))
        inner = self.left >= 0
        for child in (self.left[inner], self.right[inner]):
            # scikit-learn numbers the nodes so that a child comes after its parent, which rules out circles.
            if (child <= own[inner]).any() or (child >= sizes[inner]).any():
                raise ValueError("a node has a child outside its tree")


@dataclass(frozen=True)
class ForestPredictor:
    """A forest for the level, one for the contrasts of the reference arms, one for each later arm; sd over the trees.

    Apart, because the level varies much more than the contrasts and would take every split. order: (K,), the place of
    each arm among the outputs of the contrast forests.
    """

    kind: ClassVar[str] = "forest"
    level: Trees
    contrasts: tuple[Trees, ...]
    order: np.ndarray

    def predict(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flat, shape = inputs.reshape(-1, inputs.shape[-1]), (*inputs.shape[:2], -1)

        def of_both_orders(trees: Trees) -> np.ndarray:
            outputs = trees.outputs(flat)
            return outputs.reshape(len(outputs), *shape).mean(2)

        level = of_both_orders(self.level)
        contrast = np.concatenate([of_both_orders(trees) for trees in self.contrasts], axis=2)[:, :, self.order]
        utility = level.mean(0) + contrast.mean(0)
        return utility, np.hypot(level.std(0), contrast.std(0))

    def tensors(self) -> dict[str, np.ndarray]:
        found = {"order": self.order, "num_contrasts": np.array([len(self.contrasts)])}
        for index, trees in enumerate((self.level, *self.contrasts)):
            found |= {f"forest{index}.{name}": getattr(trees, name) for name in _FIELDS}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> ForestPredictor:
        forests = []
        for index in range(int(tensors["num_contrasts"][0]) + 1):
            trees = Trees(*(tensors[f"forest{index}.{name}"] for name in _FIELDS))
            trees.check()
            forests.append(trees)
        return cls(forests[0], tuple(forests[1:]), tensors["order"])
