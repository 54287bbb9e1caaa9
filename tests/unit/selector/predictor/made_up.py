"""Rows of made-up candidates whose utility follows from what they keep, and from nothing else."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe
from simmerge_ray.selector.predictor.rows import CandidateRows
from simmerge_ray.selector.predictor.signals import SingleValues, candidate_features

ARMS = ("task_arithmetic", "ties")


def singles_of(num_owners: int, generator: np.random.Generator) -> SingleValues:
    return SingleValues(
        generator.uniform(0.2, 0.6, num_owners), generator.uniform(0.5, 2, num_owners),
        generator.uniform(0.01, 0.2, num_owners),
    )  # fmt: skip


def rows_of_bases(num_bases: int = 2, num_members: int = 5, num_candidates: int = 6, seed: int = 0) -> CandidateRows:
    """Every pair of every base on the tasks `s` and `t`; utility = 0.1 + 0.8 retention and a little noise."""
    generator = np.random.default_rng(seed)
    features, utility, members, bases, tasks, plans = [], [], [], [], [], []
    for base in range(num_bases):
        for pair in combinations([f"m{i}" for i in range(num_members)], 2):
            retention = generator.uniform(0, 1, (num_candidates, 2))
            nll = 2.0 * (1 - retention) + 0.1 * generator.random((num_candidates, 2))
            names, found = candidate_features(["s", "t"], retention, nll, singles_of(2, generator))
            for n in range(num_candidates):
                weights = (round(0.1 + n / 10, 2), 0.5)
                plan = MergePlan(recipe=Recipe(make_arm(ARMS[n % 2]), pair, weights))
                for t, task in enumerate(names):
                    features.append(found[n, t])
                    utility.append(0.1 + 0.8 * retention[n, t] + 0.01 * generator.normal())
                    members.append(pair)
                    bases.append(f"b{base}")
                    tasks.append(task)
                    plans.append(plan)
    columns = (tuple(members), tuple(bases), tuple(tasks), tuple(plans))
    return CandidateRows(np.array(features), np.clip(utility, 0, 1), *columns)
