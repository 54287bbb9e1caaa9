"""Proposals: the grid in order, and Optuna seeded from labels, without repeats and within its budget."""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, fold_plan
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured, Stopped
from simmerge_ray.search.proposers import SAMPLERS, OptunaProposer, Proposer, make_proposer
from simmerge_ray.search.runner import TrialProgress
from simmerge_ray.search.setup import PreparedSearch, Trial, grid_trials, prepare_search


@pytest.fixture
def tasks(catalogue_path):
    return load_tasks(catalogue_path.parent / "tasks")


def prepared(catalogue, tasks, path, **changes) -> PreparedSearch:
    values = {"arms": ("linear", "ties"), "budget": 12, "evaluator": "transformers", "seed": 3} | changes
    return prepare_search(catalogue, tasks, SearchConfig(**values), str(path))


def value_of(plan) -> float:
    """A smooth function with its maximum where the last member has 0.8 of the weights."""
    weights = plan.recipe.weights
    return 1.0 - abs(float(weights[-1]) / float(sum(weights)) - 0.8)


def run(search: PreparedSearch, proposer: Proposer, limit: int = 1000, value=value_of) -> list[Trial]:
    """Measure what is proposed, one after the other, with `value`."""
    store, seen = LabelStore(search.labels_uri), []
    while len(seen) < limit and (trial := proposer.propose(str(len(seen)))) is not None:
        seen.append(trial)
        items = {task: np.full(3, value(trial.plan)) for task in trial.tasks}
        store.append([search.label(trial.plan, task, Measured(one), 0.0) for task, one in items.items()])
        proposer.finish(str(len(seen) - 1), TrialProgress(items, True))
    return seen


def test_the_grid_is_proposed_in_order(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, budget=None)
    trials = grid_trials(search)
    proposer = Proposer(trials)
    assert [proposer.propose(str(number)) for number in range(proposer.total + 1)] == [*trials, None]
    assert [Trial.from_text(trial.to_text()) for trial in trials] == trials


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_goes_on_from_labels_without_repeating_itself(catalogue, tasks, tmp_path, sampler):
    alone = {"arms": ("ties",), "ways": (3, 3)} if sampler == "cmaes" else {}
    search = prepared(catalogue, tasks, tmp_path, sampler=sampler, **alone)
    first = run(search, OptunaProposer(search, []), limit=5)
    again = OptunaProposer(search, [])
    assert again.total == 12 - 5
    rest = run(search, again)
    assert len(rest) == 7 and len({trial.plan.id for trial in [*first, *rest]}) == 12
    assert OptunaProposer(search, []).total == 0


@pytest.mark.slow
def test_the_sampler_learns(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, budget=60, arms=("linear",), members=("m0", "m1"))
    values = [value_of(trial.plan) for trial in run(search, OptunaProposer(search, []))]
    assert np.mean(values[-20:]) > np.mean(values[:10]) and max(values) > 0.95


CMAES = {"arms": ("task_arithmetic",), "ways": (3, 3), "sampler": "cmaes"}
BEST = {"m0": 0.3, "m1": 1.1, "m2": 0.7}


def nearness(plan) -> float:
    """One less the distance to the recipe `BEST`."""
    weights = dict.fromkeys(BEST, 0.0) | dict(zip(plan.members, plan.recipe.weights, strict=True))
    return 1.0 - float(np.linalg.norm([weights[name] - BEST[name] for name in BEST]))


def test_cmaes_learns_the_weights_of_all_members(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, budget=60, **CMAES)
    values = [nearness(trial.plan) for trial in run(search, OptunaProposer(search, []), value=nearness)]
    assert np.mean(values[-20:]) > np.mean(values[:10]) and max(values) > 0.85


def recipe(operator: str = "task_arithmetic", seed: int = 0, **weights) -> MergePlan:
    return MergePlan(recipe=recipe_of(make_arm(operator), weights, seed))


def test_cmaes_starts_around_the_first_given_plan_of_the_space(catalogue, tasks, tmp_path):
    start = [recipe("linear", m0=1.0, m1=1.0), recipe(m0=0.35, m1=1.0, m2=0.704), recipe(m0=0.5, m1=0.5)]
    given = prepared(catalogue, tasks, tmp_path / "given", budget=12, **CMAES)
    free = prepared(catalogue, tasks, tmp_path / "free", budget=12, **CMAES)
    trials = run(given, make_proposer(given, start=start), value=scored)
    merges = [trial.plan for trial in trials if trial.plan.is_merge]
    assert merges[:3] == start and len(merges) == 12
    others = [trial.plan for trial in run(free, make_proposer(free), value=scored) if trial.plan.is_merge]
    # Sigma is 0.15 a weight: 0.5 away in norm of the three is more than three of it.
    assert min(map(nearness, merges[4:])) > 0.5 > min(map(nearness, others[1:]))


def scored(plan) -> float:
    return nearness(plan) if plan.is_merge else 0.5


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_given_plans_are_measured_first_count_and_are_not_measured_again(catalogue, tasks, tmp_path, sampler):
    search = prepared(catalogue, tasks, tmp_path, budget=6, arms=("linear", "task_arithmetic"), sampler=sampler)
    start = [
        recipe(m0=0.5, m1=1.2),
        recipe("linear", m0=(0.2, 0.8), m1=0.5),  # has layer groups: outside the space
        fold_plan(["m0", "m1", "m2"], [make_arm("linear")]),
        MergePlan(source="m1"),  # measured anyway
    ]
    proposer = make_proposer(search, start=start)
    assert proposer.total == 4 + 6
    first = run(search, proposer, limit=6, value=lambda plan: 0.5)
    assert [trial.plan.is_merge for trial in first] == [False] * 4 + [True] * 2
    assert [trial.plan for trial in first[4:]] == start[:2] and first[4].num_shards == 1
    again = make_proposer(search, start=start)  # goes on where it was stopped
    assert again.total == 4
    rest = run(search, again, value=lambda plan: 0.5)
    assert rest[0].plan == start[2] and len({trial.plan.id for trial in [*first, *rest]}) == 10
    assert make_proposer(search, start=start).total == 0


def test_optuna_is_told_of_given_plans_of_the_space_alone(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, budget=2, arms=("task_arithmetic",), sampler="random")
    proposer = make_proposer(search, start=[recipe(m0=0.5, m1=1.204), recipe("linear", m0=0.4, m1=0.5)])
    run(search, proposer, value=lambda plan: 0.25)
    (told,) = proposer._optuna.trials
    assert told.params == {"members": "m0 + m1", "weight:m0.0": 0.5, "weight:m1.0": 1.2} and told.value == 0.25


def test_more_given_plans_than_the_budget_allows_are_cut(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, budget=1, arms=("task_arithmetic",))
    start = [recipe(m0=0.5, m1=1.2), recipe(m0=0.5, m1=1.0)]
    trials = run(search, make_proposer(search, start=start), value=lambda plan: 0.25)
    assert [trial.plan for trial in trials if trial.plan.is_merge] == start[:1]


def test_a_proposal_that_is_a_checkpoint_as_it_is_costs_nothing(catalogue, tasks, tmp_path, monkeypatch):
    search = prepared(catalogue, tasks, tmp_path, budget=3, arms=("task_arithmetic",), members=("m0", "m1"))
    proposer = make_proposer(search)
    proposals = iter([MergePlan(source="base"), None, recipe(m0=0.5, m1=0.4), recipe(m1=0.4, m0=0.5)])
    monkeypatch.setattr(type(search.space), "plan", lambda space, suggest: next(proposals))
    trials = run(search, proposer, limit=4, value=lambda plan: 0.25)
    assert [trial.plan.is_merge for trial in trials] == [False] * 3 + [True]
    with pytest.raises(StopIteration):  # the same recipe is no new merge either
        proposer.propose("next")
    states = [trial.state.name for trial in proposer._optuna.trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "RUNNING"]


def test_labels_of_pairs_and_arms_are_told(catalogue, tasks, tmp_path):
    grid = prepared(catalogue, tasks, tmp_path, budget=None, arms=("linear", "task_arithmetic"))
    arms = run(grid, Proposer(grid_trials(grid)), value=lambda plan: 0.5)
    assert sum(trial.plan.is_merge for trial in arms) == 4
    search = prepared(catalogue, tasks, tmp_path, budget=7, arms=("linear", "task_arithmetic"))
    proposer = make_proposer(search)
    assert proposer.total == 7 - 4 and len(proposer._optuna.trials) == 4


def test_a_space_that_is_used_up_ends_the_search(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, arms=("model_stock",), members=("m0", "m1"), budget=50)
    proposer = OptunaProposer(search, [])
    assert len(run(search, proposer)) == 1 and proposer.total == 1


def test_stopped_and_infeasible_labels_count_and_are_not_tried_again(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, arms=("model_stock",), members=("m0", "m1", "m2"), budget=50)
    proposer, store = OptunaProposer(search, []), LabelStore(search.labels_uri)
    for number, outcome in enumerate((Stopped(np.full(2, 0.5)), Infeasible("out of memory"))):
        trial = proposer.propose(str(number))
        store.append([search.label(trial.plan, task, outcome, 0.0) for task in trial.tasks])
    assert len(run(search, OptunaProposer(search, []))) == 1  # three pairs in all


def test_a_trial_that_was_cut_off_is_proposed_again_in_the_next_run(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, arms=("model_stock",), members=("m0", "m1"), budget=50)
    proposer = OptunaProposer(search, [])
    assert proposer.propose("0") is not None
    proposer.finish("0", None)
    assert proposer.propose("1") is None
    assert OptunaProposer(search, []).propose("0") is not None


def test_several_objectives_are_all_told(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, objectives=("add", "copy"), budget=15)
    assert search.config.num_shards == 1 and len(run(search, OptunaProposer(search, []))) == 15
    assert OptunaProposer(search, []).total == 0


def test_checkpoints_come_first_and_cost_no_budget(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, budget=2)
    first = grid_trials(prepared(catalogue, tasks, tmp_path, budget=None))[:3]
    proposer = OptunaProposer(search, first)
    assert proposer.total == 5 and [proposer.propose(str(n)) for n in range(3)] == first
    assert proposer.propose("3").num_shards == 4
