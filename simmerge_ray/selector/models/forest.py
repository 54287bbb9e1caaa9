"""Random forests as plain arrays, evaluated with numpy exactly as scikit-learn evaluates them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


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
        theirs = {"left": "children_left", "right": "children_right", "feature": "feature", "threshold": "threshold"}
        nodes = {name: np.concatenate([getattr(tree, their) for tree in trees]) for name, their in theirs.items()}
        value = np.concatenate([tree.value[:, :, 0] for tree in trees])
        return cls(starts=np.cumsum([0, *(tree.node_count for tree in trees)]), value=value, **nodes)

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

    def __post_init__(self) -> None:
        """Raises ValueError where following the children would leave the tree or never end."""
        count = len(self.left)
        if self.starts[0] != 0 or self.starts[-1] != count or (np.diff(self.starts) < 1).any():
            raise ValueError("the trees do not begin where they should")
        if any(len(values) != count for values in (self.right, self.feature, self.threshold, self.value)):
            raise ValueError("the nodes have fields of different lengths")
        sizes = np.repeat(np.diff(self.starts), np.diff(self.starts))
        own = np.arange(count) - np.repeat(self.starts[:-1], np.diff(self.starts))
        inner = self.left >= 0
        for child in (self.left[inner], self.right[inner]):
            # scikit-learn numbers the nodes so that a child comes after its parent, which rules out circles.
            if (child <= own[inner]).any() or (child >= sizes[inner]).any():
                raise ValueError("a node has a child outside its tree")
