"""Contexts (a pair of checkpoints on a task) with made-up utilities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st

from simmerge_ray.search.headroom import Context


def split_items(even: float, odd: float, num: int = 40) -> np.ndarray:
    """Constant utilities on each half, so standard errors are 0 and every figure can be computed by hand."""
    return np.where(np.arange(num) % 2 == 0, even, odd).astype(float)


def made_context(
    arms: Mapping[str, tuple[float, float]],
    left: tuple[float, float] = (0.8, 0.8),
    right: tuple[float, float] = (0.2, 0.2),
    task: str = "math",
    names: tuple[str, str] = ("a", "b"),
) -> Context:
    items = {arm: split_items(*halves) for arm, halves in arms.items()}
    return Context(names[0], names[1], task, items, split_items(*left), split_items(*right))


@st.composite
def zoos(draw: st.DrawFn) -> list[Context]:
    """Random zero-one utilities of a few pairs on two tasks, three arms."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_items = draw(st.integers(8, 60))
    contexts = []
    for left, right in (("a", "b"), ("a", "c"), ("b", "c"), ("c", "d")):
        for task in ("math", "code"):
            rates = generator.random(5)
            utilities = (generator.random((5, num_items)) < rates[:, None]).astype(float)
            arms = {arm: utilities[2 + k] for k, arm in enumerate("xyz")}
            contexts.append(Context(left, right, task, arms, utilities[0], utilities[1]))
    contexts.append(made_context({arm: (0.5, 0.5) for arm in "xyz"}))  # at least one context is defined
    return contexts
