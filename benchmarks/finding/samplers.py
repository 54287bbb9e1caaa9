"""What labels buy: random search, TPE and CMA-ES over the space of recipes, with 1 to 40 evaluations.

A sampler sees the items of one half and is reported on those of the other, and the other way round; the two are
averaged. TPE and random search draw operator, weights, density and scale; CMA-ES needs numbers that every candidate
has, so it moves the two weights of task arithmetic, from the plain average, which it measures first. A proposal that
was made before costs nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.finding.candidates import ARMS, BASE_ID, suggested
from benchmarks.finding.utilities import HALVES, Bench
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.proposers import make_sampler

BUDGETS = (1, 2, 4, 8, 16, 40)
SAMPLERS = ("random", "tpe", "cmaes")
STEP = 0.01
_SIGMA = 0.3  # of CMA-ES, a fifth of the range of a weight
_MAX_REPEATS = 200


def search_path(bench: Bench, pair: tuple[str, str], sampler: str, half: int, budget: int) -> list[MergePlan]:
    """Plans in the order measured, on one half of the items."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = 1000 * bench.pairs().index(pair)
    arms: Sequence[str] = ARMS[:1] if sampler == "cmaes" else ARMS
    study = optuna.create_study(direction="maximize", sampler=_sampler(optuna, sampler, seed))
    if sampler == "cmaes":
        study.enqueue_trial({"weight1": 0.5, "weight2": 0.5})
    known: dict[str, float] = {}
    path: list[MergePlan] = []
    repeats = 0
    while len(path) < budget and repeats < _MAX_REPEATS:
        trial = study.ask()
        arm = arms[0] if len(arms) == 1 else trial.suggest_categorical("arm", arms)

        def suggest(name: str, low: float, high: float, trial: Any = trial) -> float:
            return float(trial.suggest_float(name, low, high, step=STEP))

        plan = suggested(*pair, arm, suggest)
        if plan.id in known:
            repeats += 1
        else:
            repeats = 0
            known[plan.id] = bench.utilities.mean(plan, bench.tasks_of(pair), half)
            path.append(plan)
        study.tell(trial, known[plan.id])
    return path


def _sampler(optuna: Any, name: str, seed: int) -> Any:
    if name != "cmaes":
        return make_sampler(name, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # x0 goes away in Optuna 6
        return optuna.samplers.CmaEsSampler(
            x0={"weight1": 0.5, "weight2": 0.5}, sigma0=_SIGMA, seed=seed, warn_independent_sampling=False
        )


def incumbent(bench: Bench, plans: Sequence[MergePlan], tasks: Sequence[str], half: int) -> MergePlan:
    """The plan with the highest utility on one half, the first of equal ones."""
    return plans[int(np.argmax([bench.utilities.mean(plan, tasks, half) for plan in plans]))]


def curve_of_pair(bench: Bench, pair: tuple[str, str], sampler: str, budget: int) -> dict[str, list[float]]:
    """Utility on unseen items by number of evaluations: of the best found, and of the best of it and the three
    checkpoints as they are (`with_kept`, whose labels are not counted)."""
    tasks = bench.tasks_of(pair)
    budgets = [count for count in BUDGETS if count <= budget]
    found: dict[str, list[list[float]]] = {"best": [], "with_kept": []}
    singles = [MergePlan(source=name) for name in (*pair, BASE_ID)]
    for half in HALVES:
        path = search_path(bench, pair, sampler, half, budget)
        for name, others in (("best", []), ("with_kept", singles)):
            chosen = [incumbent(bench, [*others, *path[:count]], tasks, half) for count in budgets]
            found[name].append([bench.utilities.mean(plan, tasks, 1 - half) for plan in chosen])
    return {"budgets": list(map(float, budgets))} | {
        name: [float(value) for value in np.mean(curves, axis=0)] for name, curves in found.items()
    }


def sampler_curves(bench: Bench, budget: int = BUDGETS[-1]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Curves by sampler and pair (`a+b`), of the pairs that time is left for; everything is kept, so a second call only
    reads."""
    kept = bench.kept("curves")

    def curves(pair: tuple[str, str]) -> dict[str, dict[str, list[float]]]:
        return {
            name: kept.of(f"{'+'.join(pair)} {name} {budget}", partial(curve_of_pair, bench, pair, name, budget))
            for name in SAMPLERS
        }

    found = bench.each(f"samplers to {budget} evaluations", bench.spread_pairs(), curves)
    return {name: {joined: of_pair[name] for joined, of_pair in found.items()} for name in SAMPLERS}
