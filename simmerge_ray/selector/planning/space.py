"""Which plans are scored: left folds of two-way steps over ordered subsets, and how many there are. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from simmerge_ray.base.errors import ConfigError, OperatorError, PlanError, SelectorError, unknown_name
from simmerge_ray.plans.keeping import merge_arms
from simmerge_ray.plans.operators.specs import Arm, parse_arms
from simmerge_ray.plans.plan import WEIGHTINGS

_LEAST_WIDTH = 32  # of a beam; one prefix finds what one pair happens to have beside it


@dataclass(frozen=True)
class PlanSpace:
    """Every ordered subset of `ids` of a size in `ways` that holds `required`, with every sequence of arms.

    ids: sorted, so that nothing depends on the catalogue's order. ways: fewest and most checkpoints. weighting: see
    `plans.fold_plan`. The first two of a fold commute where the first arm is symmetric: such plans are one.
    """

    ids: tuple[str, ...]
    arms: tuple[Arm, ...]
    ways: tuple[int, int]
    weighting: str = "equal"
    required: frozenset[str] = frozenset()

    def step_weight(self, number: int) -> float:
        """Weight of right at step `number` (from 1)."""
        return 1.0 / (number + 1) if self.weighting == "equal" else 0.5

    def num_plans(self) -> int:
        """How many plans there are, each merge once."""
        total, num_required = 0, len(self.required)
        for size in range(max(self.ways[0], num_required), self.ways[1] + 1):
            ordered = math.comb(len(self.ids) - num_required, size - num_required) * math.factorial(size)
            total += ordered // 2 * self._num_firsts * len(self.arms) ** (size - 2)
        return total

    @property
    def _num_firsts(self) -> int:
        """First steps of an unordered pair."""
        return sum(1 if arm.spec.symmetric else 2 for arm in self.arms)

    def beam_width(self, budget: int) -> int | None:
        """Prefixes to keep at each depth so that about `budget` plans are scored; None where all plans fit it. All
        pairs are scored in any case; where they alone take the budget, so many are kept beyond it as cost little."""
        if self.num_plans() <= budget:
            return None
        if self._num_scored(1) > budget:
            return _LEAST_WIDTH
        low, high = 1, budget
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._num_scored(middle) <= budget else (low, middle - 1)
        return low

    def _num_scored(self, width: int) -> int:
        """The most plans that are scored with a beam; constraints may leave fewer."""
        prefixes, total = len(self.ids), 0
        for size in range(2, self.ways[1] + 1):
            made = prefixes * (len(self.ids) - size + 1) * len(self.arms)
            if size == 2:
                made = made * self._num_firsts // (2 * len(self.arms))
            total += made
            prefixes = min(made, width)
        return total


def plan_space(
    known: Iterable[str],
    arms: Sequence[Arm],
    ways: tuple[int, int],
    weighting: str = "equal",
    must_contain: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> PlanSpace:
    """Checked `PlanSpace` over the known checkpoints. Raises PlanError: an unknown checkpoint, or constraints that no
    plan meets. ConfigError: ways or weighting."""
    known = sorted(known)
    for name in (*must_contain, *exclude):
        if name not in known:
            raise PlanError(unknown_name("checkpoint", name, known))
    if both := sorted(set(must_contain) & set(exclude)):
        raise PlanError(f"checkpoint {both[0]!r} is both demanded and excluded")
    if weighting not in WEIGHTINGS:
        raise ConfigError(unknown_name("weighting", weighting, WEIGHTINGS))
    ids = tuple(name for name in known if name not in set(exclude))
    low, high = ways
    if not 2 <= low <= high:
        raise ConfigError(f"ways must be 2 or more checkpoints, fewest first, got {low}-{high}")
    if low > len(ids):
        raise PlanError(f"plans of {low} checkpoints need as many; {len(ids)} may be merged")
    if len(set(must_contain)) > high:
        raise PlanError(f"plans of at most {high} checkpoints cannot contain all of {', '.join(must_contain)}")
    return PlanSpace(ids, tuple(arms), (low, min(high, len(ids))), weighting, frozenset(must_contain))


def scorable_arms(texts: Sequence[str], trained: Sequence[str], with_base: bool) -> tuple[Arm, ...]:
    """Operators to choose from: those named, by default all that a selector knows. Raises OperatorError: an arm that no
    two-way step can have, or that needs a base and there is none. SelectorError: the selector does not know it."""
    arms = parse_arms(tuple(texts) or merge_arms(trained))
    for arm in arms:
        if arm.spec.max_sources == 1:
            raise OperatorError(
                f"arm {arm.label!r} takes one checkpoint and changes its depth, so no plan with it can be scored; "
                "leave it out, and write such a merge as mergekit's YAML"
            )
        if arm.label not in trained:
            raise SelectorError(
                f"{unknown_name('arm', arm.label, trained)}; the selector has no labels of it: measure it with "
                f"`simmerge labels make ... --arm '{arm.label}'` and train again"
            )
        if arm.spec.needs_base and not with_base:
            raise OperatorError(f"arm {arm.label!r} needs a base checkpoint, and the signal table was made without one")
    return arms
