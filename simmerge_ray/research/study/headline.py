"""The primary test of the study: the selector beside the best fixed arm, on checkpoints and bases it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.gains import MergeScoring, gain_over_best_fixed, percentile_interval
from simmerge_ray.search.headroom import headroom
from simmerge_ray.selector.assessment.folds import CrossValidation
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import GAP_CLOSED, Scoring
from simmerge_ray.selector.data.splits import base_folds, pairs_of

CLAIMED_GAIN = 0.04
MARGIN = 0.03  # of non-inferiority in a domain
LEVEL = 0.05


def primary_test(dataset: SelectionDataset, base_of: Mapping[str, str], config: TrainConfig) -> dict[str, Any]:
    """Gain of the selector over the best fixed arm, one arm for a merge, every base left out in turn.

    Returns:
        gain, interval (95 %, bases and then checkpoints resampled), claimed; by_base: the gain on the merges of each
        base alone, its mean and 95 % interval by Student's t over bases; domains: gain of each task with its interval,
        p of `gain <= -MARGIN` by the resampling, whether it is rejected after Holm; oracle: gain of the split-half
        oracle over the best fixed arm, and the share of it that the selector has (None where there is none).

    Raises:
        LabelError: fewer than two bases, or GapClosed is nowhere defined.
    """
    pairs = pairs_of(dataset.contexts)
    crossval = CrossValidation.of(dataset, config, base_folds(pairs, base_of))
    merges = MergeScoring.of(dataset, base_of, config.seed)
    scoring = merges.scoring
    if scoring.unit != GAP_CLOSED:
        raise LabelError("the checkpoints differ on no task by enough to measure GapClosed")
    gained = gain_over_best_fixed(crossval, merges)
    gain, interval = merges.gap_closed(gained), merges.interval(gained)
    bases = np.array([base_of[pairs[row][0]] for row in scoring.rows])
    room = headroom(dataset.contexts).per_merge.gain
    return {
        "gain": gain,
        "interval": interval,
        "claimed": gain >= CLAIMED_GAIN and interval[0] > 0,
        "best_fixed": sorted(set(crossval.best_fixed())),
        "by_base": _by_base(scoring, gained, bases),
        "domains": _domains(scoring, gained, merges.samples),
        "oracle": {"gain": room, "share": gain / room if room > 0 else None},
        "num_merges": len(merges.units),
        "num_defined": len(scoring.rows),
    }


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which hypotheses are rejected by Holm's step-down procedure (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    rejected = [False] * len(p_values)
    for step, place in enumerate(order):
        if p_values[place] > level / (len(p_values) - step):
            break
        rejected[place] = True
    return rejected


def _by_base(scoring: Scoring, gained: np.ndarray, bases: np.ndarray) -> dict[str, Any]:
    gains = {
        str(base): float(scoring.among(scoring.rows[bases == base].tolist()).headline(gained[bases == base]))
        for base in sorted(set(bases.tolist()))
    }
    values = np.array(list(gains.values()))
    interval = student.interval(0.95, len(values) - 1, values.mean(), values.std(ddof=1) / np.sqrt(len(values)))
    return {"gains": gains, "mean": float(values.mean()), "interval": [float(end) for end in interval]}


def _domains(scoring: Scoring, gained: np.ndarray, samples: np.ndarray) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for task in np.unique(scoring.tasks).tolist():
        kept = scoring.tasks == task
        part = scoring.among(scoring.rows[kept].tolist())
        drawn = part.headline(gained[kept], samples[:, kept])
        drawn = drawn[~np.isnan(drawn)]
        # One more than there are: a p of 0 cannot be shown by counting.
        p = (1 + int((drawn <= -MARGIN).sum())) / (1 + len(drawn))
        gain, interval = float(part.headline(gained[kept])), percentile_interval(drawn)
        found[task] = {"gain": gain, "interval": interval, "p": p, "num_defined": int(kept.sum())}
    for domain, rejected in zip(found.values(), holm([domain["p"] for domain in found.values()]), strict=True):
        domain["non_inferior"] = rejected
    return found
