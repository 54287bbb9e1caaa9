"""`second_order` for many plans at once is `second_order` plan by plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.plans.operators.specs import make_arm, parse_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep
from simmerge_ray.signals.features import both_orders, scaled_features
from simmerge_ray.signals.propagation.batch import SecondOrderBatch
from simmerge_ray.signals.propagation.interface import NAMES
from simmerge_ray.signals.propagation.second_order import SecondOrder
from simmerge_ray.signals.propagation.table import PROPAGATORS
from tests.tables import synthetic_table

ARMS = ("linear", "slerp(threshold=1)", "slerp", "nuslerp", "task_arithmetic(scale=0.4)", "ties", "dare_linear", "sce")
TABLES = {with_base: synthetic_table(6, with_base=with_base) for with_base in (True, False)}


@settings(max_examples=60)
@given(
    st.booleans(),
    st.permutations(range(6)),
    st.lists(st.tuples(st.sampled_from(ARMS), st.floats(0.0, 1.0)), min_size=1, max_size=4),
    st.sampled_from(("s", "t")),
)
def test_features_of_every_step_are_those_of_second_order(with_base, order, drawn, task):
    table = TABLES[with_base]
    steps = [(arm, weight) for arm, weight in drawn if with_base or not parse_arm(arm).spec.needs_base]
    single, batch = SecondOrder(table), SecondOrderBatch(table)
    left, made = batch.checkpoints()[[order[0]]], []
    for number, (text, weight) in enumerate(steps, 1):
        source = f"#{number - 1}" if made else batch.ids[order[0]]
        made.append(MergeStep(source, batch.ids[order[number]], parse_arm(text), weight))
        left = batch.merged(left, np.array([order[number]]), parse_arm(text), weight)
    last = MergeStep(f"#{len(made)}" if made else batch.ids[order[0]], batch.ids[order[-1]], make_arm("linear"))
    plan = MergePlan((*made, last))
    (expected,) = single.steps(plan, task, first=-1)
    columns = batch.columns
    found = batch.features(left, task, columns) if made else batch.pairs(np.array(order[:1]), task, columns)
    values = dict(zip(batch.columns, found[:, 0, order[-1]].tolist(), strict=True))
    assert tuple(expected.features) == batch.columns
    assert values == pytest.approx(dict(expected.features), rel=1e-12, abs=1e-12)
    few = single.among({*plan.members, batch.ids[0]}).among({*plan.members})  # knows no others, and says the same
    assert len(few.matrix("weight_cosine_global", task)) == len(plan.members) + with_base
    (of_few,) = few.steps(plan, task, first=-1)
    assert dict(of_few.features) == pytest.approx(dict(expected.features), rel=1e-12, abs=1e-12)


def test_steps_before_the_first_asked_for_are_left_out(propagator):
    arm = make_arm("linear")
    plan = MergePlan((MergeStep("m0", "m1", arm), MergeStep("#1", "m2", arm)))
    assert propagator.steps(plan, "add", first=-1) == propagator.steps(plan, "add")[-1:]


def test_both_orders_are_the_scaled_features_of_the_pair_and_its_swap():
    table = TABLES[True]
    row = table.get("c00", "c03", "s")
    expected = [scaled_features(side.features, table.columns) for side in (row, row.swap())]
    values = np.array([[row.features[column]] for column in table.columns])
    np.testing.assert_allclose(both_orders(values, table.columns)[0], expected, rtol=1e-14)


def test_names_are_those_of_the_table():
    assert tuple(PROPAGATORS) == NAMES
