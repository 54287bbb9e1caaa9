"""What the signals of one pair say, in numbers and in words. No torch.

A value of a signal means little by itself, so each is ranked on its task: a pair among the unordered pairs of the
table, a single checkpoint among the checkpoints, the base not among them. Words that compare follow from ranks only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.signals.features import SIGNALS, Signal
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.signals.weights import TRIM_DENSITY

_THIRDS = {"early": "early layers", "middle": "middle layers", "late": "late layers"}
_KINDS = {"attention": "attention", "mlp": "mlp", "embedding": "embeddings", "norm": "norms"}
_CLOSENESS = (("closer", "closest"), ("farther apart", "farthest apart"))
_HEIGHT = (("higher", "highest"), ("lower", "lowest"))
_NEVER = 100.0  # log of a ratio so large that one of the norms is zero

Features = Mapping[str, float]


@dataclass(frozen=True)
class Rank:
    """Of `num_others` others, `num_above` have a lower value and `num_below` a higher one."""

    num_above: int
    num_below: int
    num_others: int

    @staticmethod
    def of(value: float, others: Sequence[float] | np.ndarray) -> Rank:
        found = np.asarray(others, dtype=np.float64)
        return Rank(int((value > found).sum()), int((value < found).sum()), len(found))

    @property
    def share(self) -> float:
        """Share of the others, of which there are some, that have a lower value, equal ones counted half."""
        return (self.num_above + (self.num_others - self.num_above - self.num_below) / 2) / self.num_others

    @property
    def has_ties(self) -> bool:
        return self.num_above + self.num_below < self.num_others

    def words(self, things: str, high: tuple[str, str], low: tuple[str, str]) -> str:
        """`closer than 82 % of the other 65 pairs`, rounded down, or `the closest of all 66 pairs`.

        Args:
            high: comparative and superlative of a high value. low: of a low one.
        """
        count, (comparative, superlative) = max((self.num_above, high), (self.num_below, low), key=lambda one: one[0])
        if count == 0:
            return f"level with all {self.num_others + 1} {things}"
        if count == self.num_others:
            return f"the {superlative} of all {self.num_others + 1} {things}"
        return f"{comparative} than {100 * count // self.num_others} % of the other {self.num_others} {things}"


@dataclass(frozen=True)
class Explanation:
    """What one signal says about a pair.

    task: on whose probes; None for signals of the weights. values: by column of the table. closeness: rank of the pair,
    high is close; None for a single-checkpoint signal, and where there is no other pair. numbers and sentence: for a
    person.
    """

    signal: str
    title: str
    task: str | None
    values: Features
    closeness: Rank | None
    numbers: str
    sentence: str


@dataclass(frozen=True)
class _PairWords:
    """How a pair signal is read.

    sign: -1 where a low value is close. what: things of both checkpoints that are alike in a close pair. note: what a
    value is to be compared with. shown: format of a value. parts: other statistics worth a word, with their names.
    """

    title: str
    sign: int
    what: str
    note: str = ""
    shown: str = ".3f"
    parts: Mapping[str, str] | None = None


_PAIRS: Mapping[str, _PairWords] = {
    "kl_lr": _PairWords("KL of next tokens", -1, "their next tokens", shown=".3g"),
    "kl_greedy_lr": _PairWords(
        "KL on the base's own text", -1, "their continuations of the base's text", shown=".3g"
    ),
    "activation_cosine": _PairWords("cosine of hidden states", 1, "their hidden states", parts=_THIRDS),
    "attention_cosine": _PairWords(
        "cosine of attention rows", 1, "the tokens they look back at", parts=_THIRDS
    ),
    "weight_cosine": _PairWords(
        "cosine of weights", 1, "the directions of their weights",
        "fine-tunes of one base are all near 1", ".4f", _KINDS | _THIRDS,
    ),
    "weight_l2": _PairWords(
        "distance of weights", -1, "their weights", "1 is the norm of the base", ".3g",
        _KINDS | _THIRDS,
    ),
    "task_vector_cosine": _PairWords(
        "cosine of task vectors", 1, "the directions of their fine-tuning",
        "0 is unrelated, below 0 against each other", parts=_KINDS | _THIRDS,
    ),
    "task_vector_norm_ratio": _PairWords(
        "ratio of task vector norms", -1, "the lengths of their ways from the base", shown="+.3f",
    ),
    "sign_conflict": _PairWords(
        "sign conflict", -1, "the signs of their changes", "0.5 is chance", parts=_KINDS | _THIRDS
    ),
    "trimmed_overlap": _PairWords(
        "overlap of largest changes", 1, "the places of their largest changes",
        f"{TRIM_DENSITY} is chance", parts=_KINDS | _THIRDS,
    ),
}  # fmt: skip
# Title; what is true of the checkpoint with the higher value, and of the one with the lower.
_SINGLES: Mapping[str, tuple[str, str]] = {
    "task_vector_norm": ("distance from the base", "{high} moved farther from the base than {low}"),
    "entropy": ("entropy of next tokens", "{low} is surer of its next tokens than {high}"),
    "loss": ("loss on the probes", "{low} predicts these texts better than {high}"),
}


def explain(table: SignalTable, left: str, right: str, tasks: Sequence[str] | None = None) -> list[Explanation]:
    """What every signal says about a pair: first those of each task's probes, then those of the weights.

    KL is ranked by the mean of both directions; with one pair in the table nothing is ranked.

    Args:
        tasks: default: those the pair was fine-tuned for.

    Raises:
        PlanError: an unknown checkpoint or task, or twice the same checkpoint.
    """
    tasks = tuple(tasks or table.pair_tasks(left, right))
    own = {task: table.get(left, right, task).features for task in tasks}
    shown = [signal for signal in SIGNALS.values() if signal.columns[0] in table.columns]
    explanations = []
    for task in (*tasks, None):
        comparison = _Comparison(table, left, right, task or tasks[0], own[task or tasks[0]])
        for signal in shown:
            if signal.of_weights == (task is None) and (signal.name in _PAIRS or signal.name in _SINGLES):
                of = comparison.pair if signal.name in _PAIRS else comparison.single
                explanations.append(of(signal, task))
    return explanations


class _OtherPairs(dict[str, Any]):
    """(N,) values of a column for all unordered pairs but one, when they are asked for."""

    def __init__(self, table: SignalTable, task: str, left: str, right: str) -> None:
        super().__init__()
        ids = table.checkpoint_ids
        mask = np.triu(np.ones((len(ids), len(ids)), dtype=bool), 1)
        own = sorted((ids.index(left), ids.index(right)))
        mask[own[0], own[1]] = False
        self.count = int(mask.sum())
        self._table, self._task, self._mask = table, task, mask

    def __missing__(self, column: str) -> np.ndarray:
        matrix = self._table.matrix(column, self._task)
        self[column] = matrix[-len(self._mask) :, -len(self._mask) :][self._mask]
        return np.asarray(self[column])


class _Comparison:
    """A pair on one task, beside the other pairs of the table."""

    def __init__(self, table: SignalTable, left: str, right: str, task: str, own: Features) -> None:
        self._left, self._right, self._own = left, right, own
        self._table, self._task = table, task
        self._others = _OtherPairs(table, task, left, right)
        base = table.provenance.get("base")
        self._base = table.rows[base, left, task].features if base else None

    def pair(self, signal: Signal, task: str | None) -> Explanation:
        words, own = _PAIRS[signal.name], self._own
        main = _main_closeness(signal, words)
        rank = self._rank(main)
        if signal.swapped:
            numbers, columns, fact = self._directions(signal)
        elif signal.negated:
            numbers, columns = f"log {format(own[signal.columns[0]], words.shown)}", [signal.columns[0]]
            fact = self._who_moved_farther(own[signal.columns[0]])
        else:
            numbers, columns, fact = self._parts(signal, words)
        sentences = []
        if rank is not None:
            alike = "more alike than" if rank.share >= 2 / 3 else "about as alike as"
            degree = "less alike than" if rank.share <= 1 / 3 else alike
            sentences.append(f"{rank.words('pairs', *_CLOSENESS)}: {words.what} are {degree} in most pairs here")
        sentences += [sentence for sentence in (fact, words.note) if sentence]
        values = {column: own[column] for column in columns}
        return Explanation(signal.name, words.title, task, values, rank, numbers, "; ".join(sentences))

    def single(self, signal: Signal, task: str | None) -> Explanation:
        (title, comparison), columns = _SINGLES[signal.name], signal.columns
        singles = self._table.single(signal.name, self._task)
        others_alone = [value for one, value in singles.items() if one not in (self._left, self._right)]
        values = {column: self._own[column] for column in columns}
        low, high = sorted((self._left, self._right), key=lambda one: values[columns[one == self._right]])
        equal = values[columns[0]] == values[columns[1]]
        sentences = ["they are equal" if equal else comparison.format(low=low, high=high)]
        for name, column, other in ((self._left, *columns), (self._right, *columns[::-1])):
            others = [values[other], *others_alone]
            if len(others) > 1:
                sentences.append(f"{name} is {Rank.of(values[column], others).words('checkpoints', *_HEIGHT)}")
        numbers = f"left {values[columns[0]]:.3g}, right {values[columns[1]]:.3g}"
        if self._base is not None and not signal.needs_base:
            numbers += f"; base {self._base[columns[0]]:.3g}"
        return Explanation(signal.name, title, task, values, None, numbers, "; ".join(sentences))

    def _rank(self, closeness: Callable[[Mapping[str, Any]], Any]) -> Rank | None:
        if not self._others.count:
            return None
        return Rank.of(closeness(self._own), closeness(self._others))

    def _directions(self, signal: Signal) -> tuple[str, list[str], str]:
        """Both directions of KL, and for whom the other's tokens are the greater surprise."""
        own, statistics = self._own, ("mean", "median", "q90")
        names = [(f"{signal.name}_{one}", f"{signal.swapped}_{one}") for one in statistics]
        forward, back = (own[column] for column in names[0])
        numbers = f"left || right {forward:.3g}, right || left {back:.3g} nats"
        numbers += "".join(
            f"; {one} {own[lr]:.3g}, {own[rl]:.3g}" for one, (lr, rl) in zip(statistics[1:], names[1:], strict=True)
        )
        columns = [column for both in names for column in both]
        # KL(left || right) is how much more surprised right is than left at the tokens that left expects.
        if forward == back:
            return numbers, columns, "each is equally surprised by the other"
        small, large = sorted((forward, back))
        surprised, other = (self._right, self._left) if forward > back else (self._left, self._right)
        fact = f"{surprised} is the more surprised, by what {other} expects: {large:.3g} against {small:.3g} nats"
        return numbers, columns, fact

    def _who_moved_farther(self, log_ratio: float) -> str:
        if log_ratio == 0.0:
            return "both moved equally far"
        farther, other = (self._left, self._right) if log_ratio > 0 else (self._right, self._left)
        if abs(log_ratio) > _NEVER:
            return f"only {farther} moved at all"
        return f"{farther} moved {math.exp(abs(log_ratio)):.3g} times as far as {other}"

    def _parts(self, signal: Signal, words: _PairWords) -> tuple[str, list[str], str]:
        """The main statistic with the parts that are closest and farthest apart by their ranks, or with all parts.

        Parts that tie with another pair are not ranked: mostly, one of the checkpoints was never moved there.
        """
        own, main = self._own, signal.columns[0]
        parts = {f"{signal.name}_{statistic}": name for statistic, name in (words.parts or {}).items()}
        ranks = {column: self._rank(lambda one, column=column: words.sign * one[column]) for column in parts}  # type: ignore[misc]
        shares = {column: rank.share for column, rank in ranks.items() if rank and not rank.has_ties}
        columns, fact = list(parts), ""
        if shares and min(shares.values()) < max(shares.values()):
            near, far = max(shares, key=lambda one: shares[one]), min(shares, key=lambda one: shares[one])
            fact = f"beside the other pairs closest in {parts[near]}, farthest apart in {parts[far]}"
            columns = columns if len(columns) <= len(_THIRDS) else [near, far]
        shown = [format(own[main], words.shown), *(f"{parts[one]} {format(own[one], words.shown)}" for one in columns)]
        return "; ".join(shown), [main, *columns], fact


def _main_closeness(signal: Signal, words: _PairWords) -> Callable[[Mapping[str, Any]], Any]:
    """The main statistic of a pair, or of arrays of pairs, high for close ones and the same for both orders."""
    column = signal.columns[0]
    if signal.swapped:
        back = SIGNALS[signal.swapped].columns[0]
        return lambda features: -(features[column] + features[back]) / 2
    if signal.negated:
        return lambda features: -abs(features[column])
    return lambda features: words.sign * features[column]
