"""Does a predictor carry over: from the small bases to the real one (H9), and to operators that it never saw (H10)?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.config import PredictorConfig, TrainConfig
from simmerge_ray.research.predictor.regret import (
    FAMILIES,
    Regrets,
    families_of,
    regret_interval,
    regrets,
    rule,
    without_family,
)
from simmerge_ray.research.second_study.results import PublishedResults, read_results
from simmerge_ray.selector.predictor.rows import CandidateRows, read_candidates
from simmerge_ray.selector.predictor.train import member_folds, train_predictor, unseen_utilities

CARRIED, OWN, RULE = "predictor of the small bases", "predictor of the zoo's other pairs", "retention's plain mean"


def transfer_section(published: PublishedResults) -> dict[str, Any]:
    """`transfer_figures` of the pairs that are whole in what is published."""
    return transfer_figures(*(_whole_pairs(published.root / kind) for kind in ("small", "real")))


def _whole_pairs(directory: Path) -> CandidateRows:
    whole = {frozenset(one.members) for one in read_results(directory).pairs}
    rows = read_candidates([directory / "labels"])
    return rows.subset([row for row, members in enumerate(rows.members) if frozenset(members) in whole])


def transfer_figures(small: CandidateRows, real: CandidateRows) -> dict[str, Any]:
    """H9 and H10.

    Returns:
        real: regret on the real zoo's pairs of each way, with intervals; of those where all ways say something. ratio:
        of the mean regrets of what is carried over and of what was fitted there. minus_rule: of what is carried over.
        families: by family and zoo, regret of choosing within it and among all, where the predictor was fitted without
        the family and without the tested checkpoints.
    """
    config = TrainConfig(model=PredictorConfig().model)
    fitted = train_predictor(small, config).fitted
    ways: dict[str, Regrets] = {
        CARRIED: regrets(real, fitted.utility(real.features)),
        OWN: regrets(real, unseen_utilities(real, member_folds(real, config), config)),
        RULE: regrets(real, rule(real)),
    }
    known = [choice for choice in ways[RULE] if all(choice in found for found in ways.values())]
    of_known = {way: {choice: found[choice] for choice in known} for way, found in ways.items()}
    means = {way: float(np.mean([*found.values()])) for way, found in of_known.items()}
    difference = {choice: of_known[CARRIED][choice] - of_known[RULE][choice] for choice in known}
    ratio = means[CARRIED] / means[OWN] if means[OWN] > 0 else None
    minus_rule = regret_interval(difference)
    families = _families({"small": small, "real": real}, config)
    return {
        "real": {way: regret_interval(found) for way, found in of_known.items()},
        "ratio": ratio,
        "minus_rule": minus_rule,
        "families": families,
        "hypotheses": {
            "H9": {"holds": ratio is not None and ratio <= 1.25 and minus_rule["mean"] < 0},
            "H10": {"holds": all(one["predicted"]["mean"] <= 0.02 for one in _compared(families))},
        },
    }


def _families(zoos: dict[str, CandidateRows], config: TrainConfig) -> list[dict[str, Any]]:
    """within: None of a family of one candidate, which leaves nothing to choose."""
    found = []
    for kind, rows in zoos.items():
        of_rows = families_of(rows)
        for name, operator in FAMILIES.items():
            if (family := of_rows == operator).any():
                figures = without_family(rows, family, config)
                within, among = figures["regret within"], figures["regret among all"]
                found.append({"zoo": kind, "family": name, "within": within or None, "among": among})
    return found


def _compared(families: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one[where] for one in families for where in ("within", "among") if one[where]]
