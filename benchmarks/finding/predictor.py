"""The predictor of utilities from candidate signals: how well it tells and what it chooses, on what was left out.

    python -m benchmarks.finding.predictor LABELS... [--catalogue CATALOGUE ...] [--out predictor.json]

LABELS: label stores with candidate signals (`python -m simmerge_ray.research.predictor.make` writes some, and so does
`simmerge labels make --probes`). Every figure is of models that were fitted without the checkpoints (the base, the
family of operators) that they are tested on. Regret of a set of members: the largest mean utility over their tasks of
any candidate, minus that of the one that is chosen; by the rule without labels (`aim.worth`) beside it. With the
catalogue of every store the pair's similarity signals are inputs as well, in rows of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import Probe, ProbeSet
from simmerge_ray.research.predictor.candidates import NUM_PROBES
from simmerge_ray.research.zoo.domains import probe_texts
from simmerge_ray.selector.data.dataset import pair_features
from simmerge_ray.selector.data.splits import Fold, resampled_weights
from simmerge_ray.selector.predictor.rows import CandidateRows, join_rows, read_candidates
from simmerge_ray.selector.predictor.signals import COLUMNS
from simmerge_ray.selector.predictor.train import member_folds, row_metrics, unseen_utilities
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.signature import SignatureStore

MODELS = ("ridge", "forest", "mlp")
FAMILIES = {"ties": "ties", "norm-matched": "scale_matched_linear"}
_NUM_RESAMPLES = 2000


def families_of(rows: CandidateRows) -> np.ndarray:
    """(N,) operator of each row's recipe; empty for a checkpoint as it is."""
    return np.array([plan.arms[0].operator if plan.is_merge else "" for plan in rows.plans])


def rule(rows: CandidateRows) -> np.ndarray:
    """(N,): `aim.worth` of the task's owners, which is `(retention + likelihood) / 2` for one owner a task."""
    return np.asarray(rows.features[:, [COLUMNS.index("retention"), COLUMNS.index("likelihood")]].mean(1))


def regrets(
    rows: CandidateRows, scores: np.ndarray, among: np.ndarray | None = None
) -> dict[tuple[str, tuple[str, ...]], float]:
    """By (base, members): what the candidate with the best mean score loses to the one with the best mean utility.

    among: (N,) bool, the rows of candidates that are chosen among; None for all.
    """
    found = {}
    for choice, plans in rows.choices().items():
        kept = [some for some in plans.values() if among is None or among[some].all()]
        most = max((len(some) for some in kept), default=0)
        kept = [some for some in kept if len(some) == most]
        if len(kept) > 1 and not any(np.isnan(scores[some]).any() for some in kept):
            utility = np.array([rows.utility[some].mean() for some in kept])
            found[choice] = float(utility.max() - utility[int(np.argmax([scores[some].mean() for some in kept]))])
    return found


def with_interval(found: Mapping[tuple[str, tuple[str, ...]], float], seed: int = 0) -> dict[str, Any]:
    """Mean and 95 % interval over bases and checkpoints drawn with replacement."""
    pairs = [(f"{base}/{members[0]}", f"{base}/{members[-1]}") for base, members in found]
    base_of = {name: name.partition("/")[0] for pair in pairs for name in pair}
    values = np.array(list(found.values()))
    weights = resampled_weights(pairs, base_of, _NUM_RESAMPLES, seed)
    weights = weights[weights.sum(1) > 0]
    drawn = weights @ values / weights.sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4),
            "num": len(values)}  # fmt: skip


def compared(rows: CandidateRows, predicted: np.ndarray, among: np.ndarray | None = None) -> dict[str, Any]:
    """Regret by the predictor and by the rule on the same sets of members."""
    ours, theirs = regrets(rows, predicted, among), regrets(rows, rule(rows), among)
    theirs = {choice: value for choice, value in theirs.items() if choice in ours}
    difference = {choice: value - theirs[choice] for choice, value in ours.items()}
    return {name: with_interval(one) for name, one in
            (("predicted", ours), ("rule", theirs), ("predicted minus rule", difference)) if one}  # fmt: skip


def without_family(rows: CandidateRows, family: np.ndarray, config: TrainConfig) -> dict[str, Any]:
    """Checkpoints left out, and besides one family of operators: how the rest tells of it, chooses within it, and
    chooses among all candidates.

    family: (N,) bool, whose rows are in it.
    """
    folds = [
        Fold(fold.name, tuple(row for row in fold.training if not family[row]), fold.tested)
        for fold in member_folds(rows, config)
    ]
    predicted = unseen_utilities(rows, folds, config)
    return row_metrics(rows, np.where(family, predicted, np.nan)) | {
        "regret within": compared(rows, predicted, family),
        "regret among all": compared(rows, predicted),
    }


def assess(rows: CandidateRows, families: np.ndarray, model: str, seed: int = 0) -> dict[str, Any]:
    """All figures of one kind of model."""
    config = TrainConfig(model=model, seed=seed)
    predicted = unseen_utilities(rows, member_folds(rows, config), config)
    found: dict[str, Any] = {
        "checkpoints left out": row_metrics(rows, predicted) | {"regret": compared(rows, predicted)},
        "the rule": row_metrics(rows, rule(rows)),
    }
    for name, operator in FAMILIES.items():
        if (families == operator).any():
            found[f"{name} left out"] = without_family(rows, families == operator, config)
    if len(set(rows.bases)) > 1:
        predicted = unseen_utilities(rows, rows.base_folds(), config)
        found["bases left out"] = row_metrics(rows, predicted) | {"regret": compared(rows, predicted)}
        for base in sorted(set(rows.bases)):
            some = rows.subset([row for row, one in enumerate(rows.bases) if one == base])
            of_base = predicted[[row for row, one in enumerate(rows.bases) if one == base]]
            found[f"base {base} left out"] = row_metrics(some, of_base) | {"regret": compared(some, of_base)}
    return found


def with_pair_signals(rows: CandidateRows, catalogue: Catalogue, signatures: str) -> CandidateRows:
    """The rows of pairs, with all signals of the pair on the row's task as further inputs: means of both orders."""
    tasks = sorted(set(rows.tasks))
    probe_sets = {task: ProbeSet(task, tuple(map(Probe, probe_texts(task, NUM_PROBES)))) for task in tasks}
    table = compute_signals(catalogue, probe_sets, store=SignatureStore(signatures))
    of_pairs = rows.subset([row for row, members in enumerate(rows.members) if len(members) == 2])
    signals = {
        (pair, task): pair_features(table, *pair, task).mean(0) for pair in set(of_pairs.members) for task in tasks
    }
    further = np.stack([signals[one] for one in zip(of_pairs.members, of_pairs.tasks, strict=True)])
    return replace(of_pairs, features=np.hstack([of_pairs.features, further]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="+", type=Path)
    parser.add_argument("--catalogue", action="append", default=[], help="of each label store, in their order")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    rows = read_candidates(given.labels)
    found = {model: assess(rows, families_of(rows), model) for model in MODELS}
    if given.catalogue:
        stores = zip(given.labels, given.catalogue, strict=True)
        parts = [
            with_pair_signals(read_candidates([store]), load_catalogue(Path(path)), str(store / "_signatures"))
            for store, path in stores
        ]
        wider = join_rows(parts)
        found |= {f"{model}, pair signals too": assess(wider, families_of(wider), model) for model in MODELS}
    text = json.dumps({"num_rows": len(rows.utility), "bases": sorted(set(rows.bases)), **found}, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
