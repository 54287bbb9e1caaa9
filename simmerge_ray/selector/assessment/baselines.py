"""What a selector has to beat: choices that use no model of the signals, or a part of them.

Each row of `BASELINES` gives scores (num tested, A) for the merge operators and both parents from the training rows
alone; none but `better_parent` keeps one. What needs a model on other features is a data set of its own, below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from simmerge_ray.base.errors import LabelError
from simmerge_ray.plans.keeping import merge_arms
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import Scoring, keeping_no_parent, option_utilities, units_of
from simmerge_ray.signals.features import column_signal

Rows = Sequence[int]
Policy = Callable[[SelectionDataset, Scoring, Rows, Rows], np.ndarray]
SCALE_MATCHED = "scale_matched_linear"
_STUMP_QUANTILES = np.linspace(0.1, 0.9, 9)


def _always(index: int, dataset: SelectionDataset, num_rows: int) -> np.ndarray:
    return keeping_no_parent(np.tile(np.eye(_num_merges(dataset))[index], (num_rows, 1)))


def _num_merges(dataset: SelectionDataset) -> int:
    return len(merge_arms(dataset.arms))


def uniform(dataset: SelectionDataset, scoring: Scoring, training: Rows, tested: Rows) -> np.ndarray:
    """An operator drawn at random: all tied."""
    return keeping_no_parent(np.zeros((len(tested), _num_merges(dataset))))


def best_fixed(dataset: SelectionDataset, scoring: Scoring, training: Rows, tested: Rows) -> np.ndarray:
    """The arm that closes most of the gap on the training rows."""
    return _always(scoring.among(training).best_fixed(), dataset, len(tested))


def best_fixed_per_task(dataset: SelectionDataset, scoring: Scoring, training: Rows, tested: Rows) -> np.ndarray:
    """Mean training utility of each arm on the task; over all tasks for one that was not trained on."""
    utilities = dataset.utilities[:, : _num_merges(dataset)]
    means = {"": utilities[list(training)].mean(0)}
    for task in {dataset.contexts[row].task for row in training}:
        means[task] = utilities[[row for row in training if dataset.contexts[row].task == task]].mean(0)
    return keeping_no_parent(np.array([means.get(dataset.contexts[row].task, means[""]) for row in tested]))


def better_parent(dataset: SelectionDataset, scoring: Scoring, training: Rows, tested: Rows) -> np.ndarray:
    """No merge: the parent with the higher measured utility. Chosen on the items it is scored on: an advantage."""
    parents = option_utilities([dataset.contexts[row] for row in tested], dataset.arms)[:, -2:]
    return np.hstack([np.full((len(tested), _num_merges(dataset)), -np.inf), parents])


def signal_stump(dataset: SelectionDataset, scoring: Scoring, training: Rows, tested: Rows) -> np.ndarray:
    """The one signal and threshold whose two arms, one for each side, have the highest mean training utility.

    A signal of a pair is the mean, or the larger, of its values in both orders.
    """
    values = np.concatenate([dataset.features.mean(1), dataset.features.max(1)], axis=1)
    known, answers = values[list(training)], dataset.utilities[list(training), : _num_merges(dataset)]
    thresholds = np.quantile(known, _STUMP_QUANTILES, axis=0)
    above = (known[None] > thresholds[:, None]).reshape(len(thresholds), len(known), -1)
    high = np.einsum("tnf,nk->tfk", above.astype(np.float64), answers)
    low = answers.sum(0) - high
    total = high.max(-1) + low.max(-1)
    where = np.unravel_index(int(total.argmax()), total.shape)
    side = values[list(tested), where[1]] > thresholds[where]
    arms = np.where(side, high[where].argmax(), low[where].argmax())
    return keeping_no_parent(np.eye(_num_merges(dataset))[arms])


def _fixed(label: str, what: str) -> Policy:
    def policy(dataset: SelectionDataset, scoring: Scoring, training: Rows, tested: Rows) -> np.ndarray:
        if label not in dataset.arms:
            raise LabelError(f"{what}: the arm {label!r} was not measured; known: {', '.join(dataset.arms)}")
        return _always(dataset.arms.index(label), dataset, len(tested))

    return policy


BASELINES: Mapping[str, Policy] = {
    "uniform": uniform,
    "best fixed": best_fixed,
    "best fixed per task": best_fixed_per_task,
    "better parent": better_parent,
    "single-signal stump": signal_stump,
    "equal-weight linear": _fixed("linear", "the equal-weight average"),
    "scale-matched linear": _fixed(SCALE_MATCHED, "the average of task vectors brought to one norm"),
}


def single_checkpoint_features(dataset: SelectionDataset) -> SelectionDataset:
    """Only what is known of each checkpoint alone (norm of its task vector, entropy, loss), nothing of the pair. Raises
    LabelError: there is no such feature."""
    kept = [i for i, column in enumerate(dataset.columns) if column_signal(column).family == "single"]
    if not kept:
        raise LabelError("the signals have no feature of a single checkpoint")
    return replace(dataset, columns=tuple(dataset.columns[i] for i in kept), features=dataset.features[:, :, kept])


def parents_utilities(dataset: SelectionDataset) -> SelectionDataset:
    """Only the measured utilities of both parents on the task: what evaluating the parents alone would tell."""
    parents = option_utilities(dataset.contexts, dataset.arms)[:, -2:]
    features = np.stack([parents, parents[:, ::-1]], axis=1)
    return replace(dataset, columns=("utility_left", "utility_right"), features=features)


def permuted_signals(dataset: SelectionDataset, training: Rows, seed: int) -> SelectionDataset:
    """Negative control: in the training rows each pair gets the signals of another one, drawn at random."""
    num_units = len(units_of([dataset.contexts[row] for row in training], per_merge=True))
    generator = np.random.default_rng([seed, num_units])
    return permuted_columns(dataset, training, range(len(dataset.columns)), generator)


def permuted_columns(
    dataset: SelectionDataset, rows: Rows, columns: Sequence[int], generator: np.random.Generator
) -> SelectionDataset:
    """Each pair among the rows gets these columns of a pair drawn at random, the same one on all its tasks."""
    units = units_of([dataset.contexts[row] for row in rows], per_merge=True)
    features, kept = dataset.features.copy(), list(columns)
    for unit, other in zip(units, generator.permutation(len(units)), strict=True):
        for place, row in enumerate(unit):
            source = units[other][place % len(units[other])]
            features[rows[row]][:, kept] = dataset.features[rows[source]][:, kept]
    return replace(dataset, features=features)
