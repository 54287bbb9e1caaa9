"""The plan scorer against a loop over all plans, one at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from simmerge_ray.base.config import RankingConfig
from simmerge_ray.base.errors import ConfigError, OperatorError, PlanError, SelectorError
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.plans.operators.specs import make_arm, parse_arms
from simmerge_ray.plans.plan import MergePlan, MergeStep, fold_plan, pair_plan, read_plan
from simmerge_ray.selector.planning.files import write_plans
from simmerge_ray.selector.planning.scorer import PlanScorer, with_arm
from simmerge_ray.selector.planning.space import PlanSpace, plan_space, scorable_arms
from simmerge_ray.selector.planning.tasks import task_pool
from simmerge_ray.signals.features import both_orders
from simmerge_ray.signals.propagation.bound import Bound
from simmerge_ray.signals.propagation.second_order import SecondOrder
from simmerge_ray.signals.table import SignalTable
from tests.plan_space import enumerate_plans
from tests.tables import synthetic_table

TABLE = synthetic_table(4, tasks=("r", "s", "t"))
ARMS = ("linear", "nuslerp", "dare_linear")  # the last one is not symmetric: both orders of its first two are plans


@dataclass(frozen=True)
class FakeSelector:
    """A smooth function of the features, another one for each arm and each member of the ensemble."""

    columns: tuple[str, ...]
    arms: tuple[str, ...] = ARMS
    best_fixed: str = "linear"
    label_error: float = 0.0

    def predict(self, features):
        generator = np.random.default_rng(len(self.columns))
        slopes = generator.normal(size=(3, len(self.columns), len(self.arms))) / len(self.columns) ** 0.5
        members = np.stack([np.tanh(features @ slope).mean(1) for slope in slopes])
        return 0.5 + 0.4 * members.mean(0), members.std(0)


class Plain(PlanScorer):
    """Ranked by the prediction alone."""

    def rank(self, space, pool, top=10, **options):
        return super().rank(space, pool, top, RankingConfig(**{"caution": 0.0} | options))


def scorer_of(table: SignalTable = TABLE, num_threads: int = 2) -> Plain:
    propagator = SecondOrder(table)
    model = FakeSelector(propagator.columns)
    return Plain(table, propagator, model, model, num_threads)


def pool_of(objective: str = "mean", tasks=(), table: SignalTable = TABLE):
    return task_pool(objective, tasks, table.tasks, table.checkpoint_ids, table.provenance["own_task"])


def space_of(ways=(2, 3), arms=ARMS, table: SignalTable = TABLE, **constraints) -> PlanSpace:
    return plan_space(table.checkpoint_ids, parse_arms(arms), ways, **constraints)


def plan_by_plan(space: PlanSpace, objective: str = "mean", tasks=(), aggregate: str = "last") -> dict[str, float]:
    """Score by id, with the propagator and the model asked for one plan at a time."""
    propagator, own_task, scores = SecondOrder(TABLE), TABLE.provenance["own_task"], {}
    selector = FakeSelector(propagator.columns)
    for plan in enumerate_plans(space.ids, space.arms, range(space.ways[0], space.ways[1] + 1), space.weighting):
        if not space.required <= set(plan.members):
            continue
        own = tasks or sorted({own_task[member] for member in plan.members})
        by_task = {}
        for task in TABLE.tasks if objective not in ("mean", "worst") else own:
            steps = []
            for step, signals in zip(plan.steps, propagator.steps(plan, task), strict=True):
                values = np.array([[signals.features[column]] for column in selector.columns])
                utility, _ = selector.predict(both_orders(values, selector.columns))
                steps.append(utility[0, selector.arms.index(step.arm.label)])
            by_task[task] = {"last": steps[-1], "mean": np.mean(steps), "sum": np.sum(steps)}[aggregate]
        parsed = pool_of(objective).objective
        scores[plan.id] = parsed.value(by_task)
    return scores


def assert_ranking_is(ranking, expected: dict[str, float], places: int) -> None:
    best = sorted(expected.values(), reverse=True)[:places]
    np.testing.assert_allclose([one.utility for one in ranking.plans], best, rtol=1e-9)
    for one in ranking.plans:
        assert one.utility == pytest.approx(expected[one.plan.id], rel=1e-9)
    assert len({one.plan.id for one in ranking.plans}) == len(ranking.plans)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["equal", "halving"])
@pytest.mark.parametrize("objective", ["mean", "worst", "s", "r=2,t=1"])
def test_exhaustive_ranking_is_the_loop_over_all_plans(weighting, objective):
    space = space_of(weighting=weighting)
    ranking = scorer_of().rank(space, pool_of(objective), top=25)
    expected = plan_by_plan(space, objective)
    assert ranking.num_scored == len(expected) == space.num_plans() and ranking.width is None
    assert_ranking_is(ranking, expected, 25)


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_the_mean_and_the_sum_over_steps(aggregate):
    space = space_of((2, 4), ARMS[:2])
    ranking = scorer_of().rank(space, pool_of(), top=9, aggregate=aggregate)
    assert_ranking_is(ranking, plan_by_plan(space, aggregate=aggregate), 9)


def test_caution_ranks_by_the_prediction_less_its_spread():
    space, pool = space_of(), pool_of("s")
    every = scorer_of().rank(space, pool, top=10_000)
    cautious = scorer_of().rank(space, pool, top=7, caution=2.0)
    expected = sorted((one.utility - 2.0 * one.sd for one in every.plans), reverse=True)[:7]
    np.testing.assert_allclose([one.score for one in cautious.plans], expected, rtol=1e-9)


def test_a_prediction_beyond_what_a_utility_can_be_counts_as_the_bound():
    class Wild(FakeSelector):
        def predict(self, features):
            utility, sd = super().predict(features)
            return 40.0 * utility, sd

    model = Wild(SecondOrder(TABLE).columns)
    ranking = PlanScorer(TABLE, SecondOrder(TABLE), model, model).rank(space_of(), pool_of())
    assert all(one.utility == 1.0 for one in ranking.plans)
    assert ranking.plans[0].sd == min(one.sd for one in ranking.plans)


def test_tasks_that_are_named_count_for_every_plan():
    space = space_of()
    ranking = scorer_of().rank(space, pool_of("worst", ("r", "t")), top=5)
    assert_ranking_is(ranking, plan_by_plan(space, "worst", ("r", "t")), 5)
    assert set(ranking.plans[0].by_task) == {"r", "t"}


def test_every_plan_is_in_the_shortlist_once():
    space = space_of((2, 3))
    everything = scorer_of().rank(space, pool_of(), top=10_000)
    ids = [one.plan.id for one in everything.plans]
    assert sorted(ids) == sorted(plan_by_plan(space))


def test_a_wide_beam_is_exhaustive_and_a_narrow_one_scores_about_its_budget():
    space = space_of((4, 4))
    full = scorer_of().rank(space, pool_of(), top=5)
    assert full.width is None and full.num_scored == space.num_plans()
    wide = scorer_of().rank(space, pool_of(), top=5, budget=space.num_plans() - 1)
    assert wide.width is not None and wide.num_scored < full.num_scored
    assert wide.plans[0].utility <= full.plans[0].utility + 1e-12
    narrow = scorer_of().rank(space, pool_of(), top=5, budget=200)
    assert narrow.num_scored <= 200 and narrow.plans[0].plan.members


def test_a_beam_that_keeps_all_prefixes_finds_what_the_exhaustive_search_finds():
    from simmerge_ray.selector.planning.search import PlanSearch
    from simmerge_ray.signals.propagation.batch import SecondOrderBatch

    batch = SecondOrderBatch(TABLE)
    search = PlanSearch(batch, FakeSelector(batch.columns), space_of((3, 4)), pool_of())
    every, beam = search.run(None, 50), search.run(10**6, 50)
    assert every.plans == beam.plans and every.num_scored == beam.num_scored
    np.testing.assert_array_equal(every.scores, beam.scores)


def test_only_what_can_be_among_the_best_is_kept_of_each_block(monkeypatch):
    from simmerge_ray.selector.planning import search as searching
    from simmerge_ray.signals.propagation.batch import SecondOrderBatch

    batch = SecondOrderBatch(TABLE)
    for space in (space_of((2, 3)), space_of((2, 4), must_contain=("c00", "c03"))):
        search = searching.PlanSearch(batch, FakeSelector(batch.columns), space, pool_of())
        monkeypatch.setattr(searching, "_BLOCK_ROWS", 4096)
        whole = [search.run(width, 10_000) for width in (None, 7)]
        monkeypatch.setattr(searching, "_BLOCK_ROWS", 1)  # a prefix in each
        for width, expected in zip((None, 7), whole, strict=True):
            few = search.run(width, 3)
            assert few.plans == expected.plans[:3] and few.num_scored == expected.num_scored


def test_where_the_pairs_take_the_budget_a_beam_still_has_some_prefixes():
    space = plan_space([f"c{number}" for number in range(100)], parse_arms(ARMS), (2, 3))
    assert space.beam_width(1000) == 32 and space.beam_width(10**6) > 32


def test_constraints_hold_and_cost_nothing_else():
    space = space_of((2, 3), must_contain=("c03",), exclude=("c01",))
    ranking = scorer_of().rank(space, pool_of(), top=10_000)
    expected = plan_by_plan(space)
    assert len(ranking.plans) == len(expected) == space.num_plans()
    for one in ranking.plans:
        assert "c03" in one.plan.members and "c01" not in one.plan.members
    both = space_of((2, 4), ARMS[:1], must_contain=("c00", "c03"))
    assert scorer_of().rank(both, pool_of(), top=9).num_scored == both.num_plans()
    assert_ranking_is(scorer_of().rank(both, pool_of(), top=9), plan_by_plan(both), 9)


def test_neither_the_order_of_the_catalogue_nor_the_number_of_threads_matters():
    rows = dict(reversed(list(TABLE.rows.items())))
    own = dict(reversed(list(TABLE.provenance["own_task"].items())))
    other = replace(TABLE, rows=rows, provenance={**TABLE.provenance, "own_task": own})
    space = plan_space(reversed(TABLE.checkpoint_ids), parse_arms(ARMS), (2, 3))
    first = scorer_of().rank(space_of(), pool_of())
    second = scorer_of(other, num_threads=1).rank(space, pool_of(table=other))
    assert first == second


def test_the_best_fixed_arm_stands_beside_the_first_plan():
    ranking = scorer_of().rank(space_of((3, 3), ("nuslerp",)), pool_of())
    fixed = with_arm(ranking.plans[0].plan, "linear")
    assert ranking.best_fixed.plan == fixed and fixed.members == ranking.plans[0].plan.members
    assert ranking.best_fixed == scorer_of().score([fixed], pool_of(), RankingConfig(caution=0.0))[0]


def test_why_is_the_change_when_a_group_is_set_to_the_average():
    """With a model that hears one group only, that group alone moves the prediction, and by all of it."""

    class OneGroup(FakeSelector):
        def predict(self, features):
            heard = np.array([column.startswith("weight_") for column in self.columns])
            value = 0.5 + 0.01 * features[..., heard].sum(-1).mean(1)
            return np.repeat(value[:, None], 3, axis=1), np.zeros((len(features), 3))

    propagator = SecondOrder(TABLE)
    model = OneGroup(propagator.columns)
    pool = pool_of("s")
    ranking = PlanScorer(TABLE, propagator, model, model).rank(space_of((2, 2)), pool, top=100)
    mean = np.mean([one.utility for one in ranking.plans if one.plan.steps[0].arm.label == "linear"])
    ((group, change),) = ranking.plans[0].why
    assert group == "weights" and change == pytest.approx(ranking.plans[0].utility - mean, rel=0.05)


def test_what_is_approximate_is_said():
    scorer, pool = scorer_of(), pool_of()
    pair, fold = (
        pair_plan("c00", "c01", make_arm("linear")),
        fold_plan(("c00", "c01", "c02"), [make_arm("dare_linear")]),
    )
    assert scorer.score([pair], pool)[0].approximate == ()
    said = scorer.score([fold], pool)[0]
    assert said.propagator == "second_order" and "trained on weights of 1/2" in " ".join(said.approximate)
    assert any("counts as task_arithmetic" in line for line in said.approximate)
    low, high = said.interval
    assert 0.0 <= low <= high <= 1.0


def test_plan_files_can_be_read_and_say_what_was_predicted(tmp_path):
    ranking = scorer_of().rank(space_of(), pool_of(), top=3)
    refs = tuple(CheckpointRef(name, tmp_path / name, "base") for name in TABLE.checkpoint_ids)
    catalogue = Catalogue(refs, TABLE.provenance["own_task"], CheckpointRef("base", tmp_path / "base"))
    paths = write_plans(tmp_path / "plans", ranking, catalogue)
    assert [path.name for path in paths] == ["plan-1.json", "plan-2.json", "plan-3.json"]
    for path, one in zip(paths, ranking.plans, strict=True):
        resolved, predicted = read_plan(path)
        assert resolved.plan == one.plan and set(predicted) == set(one.by_task)
    content = json.loads((tmp_path / "plans" / "ranking.json").read_text())
    assert content["plans"][0]["propagator"] == "second_order" and content["num_scored"] == ranking.num_scored


def test_what_cannot_be_scored_is_refused_with_the_remedy():
    with pytest.raises(OperatorError, match="passthrough.*no plan with it can be scored"):
        scorable_arms(["passthrough"], ARMS, True)
    with pytest.raises(SelectorError, match="simmerge labels make ... --arm 'ties'"):
        scorable_arms(["ties"], ARMS, True)
    with pytest.raises(OperatorError, match="needs a base"):
        scorable_arms(["dare_linear"], ARMS, False)
    gradient = MergePlan((MergeStep("c00", "c01", make_arm("linear"), (0.2, 0.8)),))
    with pytest.raises(PlanError, match="changes with depth"):
        scorer_of().score([gradient], pool_of())
    with pytest.raises(PlanError, match="simmerge signals --probes"):
        pool_of("mean", ("q",))
    with pytest.raises(ConfigError, match="not the same tasks"):
        pool_of("s", ("s", "t"))
    with pytest.raises(PlanError, match="unknown checkpoint"):
        space_of(must_contain=("c99",))
    with pytest.raises(PlanError, match="demanded and excluded"):
        space_of(must_contain=("c01",), exclude=("c01",))
    with pytest.raises(PlanError, match="need as many"):
        space_of((6, 7))
    with pytest.raises(ConfigError, match="2 or more"):
        space_of((1, 2))


def test_a_selector_of_features_that_the_propagator_does_not_deliver_is_refused():
    with pytest.raises(SelectorError, match="'bound' does not deliver .* take propagator 'virtual'"):
        PlanScorer(TABLE, Bound(TABLE), FakeSelector(SecondOrder(TABLE).columns))
    with pytest.raises(SelectorError, match="'second_order' does not deliver"):
        PlanScorer(TABLE, SecondOrder(TABLE), FakeSelector(TABLE.columns))
    with pytest.raises(SelectorError, match="needs the selector of the shortlist"):
        PlanScorer(TABLE, SecondOrder(TABLE), FakeSelector(SecondOrder(TABLE).columns)).rank(space_of(), pool_of())
