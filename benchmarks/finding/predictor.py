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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import Probe, ProbeSet
from simmerge_ray.research.predictor.candidates import NUM_PROBES
from simmerge_ray.research.predictor.regret import FAMILIES, compared, families_of, rule, without_family
from simmerge_ray.research.zoo.domains import probe_texts
from simmerge_ray.selector.data.dataset import pair_features
from simmerge_ray.selector.predictor.rows import CandidateRows, join_rows, read_candidates
from simmerge_ray.selector.predictor.train import member_folds, row_metrics, unseen_utilities
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.signature import SignatureStore

MODELS = ("ridge", "forest", "mlp")


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
