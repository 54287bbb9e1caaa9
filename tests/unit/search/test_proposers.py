"""Proposals: the grid in order, and Optuna seeded from labels, without repeats and within its budget."""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured, Stopped
from simmerge_ray.search.proposers import SAMPLERS, OptunaProposer, Proposer
from simmerge_ray.search.runner import TrialProgress
from simmerge_ray.search.setup import PreparedSearch, Trial, grid_trials, prepare_search


@pytest.fixture
def tasks(catalogue_path):
    return load_tasks(catalogue_path.parent / "tasks")


def prepared(catalogue, tasks, path, **changes) -> PreparedSearch:
    values = {"arms": ("linear", "ties"), "budget": 12, "evaluator": "transformers", "seed": 3} | changes
    return prepare_search(catalogue, tasks, SearchConfig(**values), str(path))


def value_of(plan) -> float:
    """A smooth function with its maximum at a weight of 0.8."""
    return 1.0 - abs(float(plan.steps[0].weight) - 0.8)


def run(search: PreparedSearch, proposer: OptunaProposer, limit: int = 1000) -> list[Trial]:
    """Measure what is proposed, one after the other, with `value_of`."""
    store, seen = LabelStore(search.labels_uri), []
    while len(seen) < limit and (trial := proposer.propose(str(len(seen)))) is not None:
        seen.append(trial)
        items = {task: np.full(3, value_of(trial.plan)) for task in trial.tasks}
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
    arms = ("ties",) if sampler == "cmaes" else ("linear", "ties")
    search = prepared(catalogue, tasks, tmp_path, sampler=sampler, arms=arms)
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


def test_cmaes_learns_where_every_merge_has_the_same_numbers(catalogue, tasks, tmp_path):
    search = prepared(catalogue, tasks, tmp_path, budget=60, arms=("ties",), members=("m0", "m1"), sampler="cmaes")
    values = [value_of(trial.plan) for trial in run(search, OptunaProposer(search, []))]
    assert np.mean(values[-20:]) > np.mean(values[:10]) and max(values) > 0.95


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
