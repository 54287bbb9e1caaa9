"""Many steps at once are the steps one by one, and chosen pairs are what all pairs would be."""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.errors import PlanError
from simmerge_ray.plans.operators.specs import make_arm, parse_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep, fold_plan
from simmerge_ray.signals.compute import matrix_entry
from simmerge_ray.signals.pairs import output_matrices
from simmerge_ray.signals.propagation import tensor_merges, virtual
from simmerge_ray.signals.propagation.interface import PlanStep, fold_path, plan_sources
from simmerge_ray.signals.propagation.outputs import OutputPairs, prepared_outputs
from simmerge_ray.signals.propagation.tensor_space import TensorSpace, VirtualTensor
from simmerge_ray.signals.propagation.virtual import Virtual
from simmerge_ray.signals.signature import TaskOutputs, TensorSample

# Each number is made by the same operations on the same values. What differs is the size of the matrix products, and
# so the order of their sums: 1e-15 of the terms, 1e-12 of a distance between near points.
RTOL, ATOL = 1e-9, 1e-11
TEXTS = (
    "linear",
    "nuslerp",
    "ties(density=0.1)",
    "ties(density=0.35)",
    "dare_ties",
    "sce",
    "task_arithmetic(scale=0.4)",
)


def plans() -> list[MergePlan]:
    """Folds that share prefixes, members in other orders, pairs of checkpoints, an intermediate on the right."""
    ids, found = ("m0", "m1", "m2"), [fold_plan(("m0", "m1"), [parse_arm("linear")])]
    for index, text in enumerate(TEXTS):
        other = parse_arm(TEXTS[index - 1])
        for shift in (0, 1):
            members = ids[shift:] + ids[:shift]
            found.append(fold_plan(members, [parse_arm(text), other], ("equal", "halving")[shift]))
    a, b = make_arm("linear"), parse_arm("ties(density=0.2)")
    found.append(MergePlan((MergeStep("m0", "m1", b, 0.3), MergeStep("m2", "#1", a, 0.4), MergeStep("#1", "#2", a))))
    return found


def all_steps(tasks: tuple[str, ...]) -> list[PlanStep]:
    return [PlanStep(plan, number, task) for plan in plans() for number in range(len(plan.steps)) for task in tasks]


def test_many_steps_are_the_steps_one_by_one(propagator):
    few = propagator.name == "exact"  # which merges and runs
    steps = all_steps(("add", "copy"))[:: 9 if few else 1]
    columns = propagator.columns[::-3]
    found = propagator.batch(steps, columns, 2)
    assert found.shape == (len(columns), len(steps))
    for place, step in enumerate(steps):
        expected = propagator.steps(step.plan, step.task)[step.number].features
        np.testing.assert_allclose(
            found[:, place], [expected[column] for column in columns], rtol=RTOL, atol=ATOL, err_msg=step.plan.label
        )


@pytest.mark.parametrize("name", ["virtual", "curved"])
def test_neither_threads_nor_room_for_outputs_matter(propagators, name, monkeypatch):
    steps, one = all_steps(("add",)), propagators[name]
    expected = one.batch(steps, one.columns, 1)
    np.testing.assert_array_equal(one.batch(steps, one.columns, 3), expected)
    monkeypatch.setattr(virtual, "_ROOM", 1)  # one right side and one checkpoint's outputs at a time
    np.testing.assert_array_equal(one.batch(steps, one.columns, 2), expected)
    monkeypatch.setattr(tensor_merges, "_ROOM", 1)  # one pair at a time
    np.testing.assert_allclose(one.batch(steps, one.columns, 2), expected, rtol=RTOL, atol=ATOL)


def test_columns_of_weights_need_no_outputs(propagators, evidence, monkeypatch):
    one = propagators["virtual"]
    monkeypatch.setattr(one, "_outputs", lambda *_: pytest.fail("no outputs are needed"))
    columns = [column for column in one.columns if column.startswith(("weight_", "task_vector_"))]
    assert np.isfinite(one.batch(all_steps(("add",)), columns, 1)).all()


def test_nothing_of_nothing(propagator):
    assert propagator.batch([], propagator.columns, 2).shape == (len(propagator.columns), 0)


def test_a_plan_that_cannot_be_known_is_refused(propagator):
    steps = [PlanStep(fold_plan(members, [make_arm("linear")]), 1, "add") for members in (("m0", "m1", "m2"),) * 2]
    with pytest.raises(PlanError, match="unknown checkpoint 'm9'"):
        propagator.batch([*steps, PlanStep(fold_plan(("m0", "m9", "m1"), [make_arm("linear")]), 1, "add")], (), 1)


def test_what_begins_alike_stands_together():
    arms = [parse_arm(text) for text in TEXTS[:3]]
    lefts = [
        plan_sources(fold_plan(("a", "b", last, "z"), [first, second, arms[0]]))[-1][0]
        for second in arms
        for last in "cd"
        for first in arms
    ]
    inner = [source.left for source in sorted(lefts, key=fold_path)]
    assert sum(one != other for one, other in zip(inner, inner[1:], strict=False)) == len(set(inner)) - 1


def made_up_outputs(num: int) -> list[TaskOutputs]:
    generator = np.random.default_rng(3)
    greedy, token = np.arange(20) >= 15, generator.integers(0, 11, 20)
    shared = (greedy, np.where(greedy | (token == 0), -1, token), np.arange(20) % 4, np.arange(5))

    def one() -> TaskOutputs:
        logits, hidden = generator.normal(size=(20, 11)), generator.normal(size=(3, 20, 6))
        attention = generator.dirichlet(np.ones(7), (2, 2, 5))
        hidden[1, 4] = 0.0
        return TaskOutputs(*(array.astype(np.float32) for array in (logits, hidden, attention)), *shared)

    return [one() for _ in range(num)]


@pytest.mark.parametrize("with_base", [True, False])
def test_chosen_pairs_of_outputs_are_those_of_all_pairs(with_base):
    outputs, pairs = made_up_outputs(4), [(0, 1), (2, 0), (2, 3), (3, 2)]
    matrices = output_matrices(outputs, with_base)
    prepared = [prepared_outputs(one) for one in outputs]
    room = OutputPairs(len(pairs), outputs[0], with_base)
    for place, (left, right) in enumerate(pairs):
        room.put(place, prepared[left], prepared[right])
    columns = room.columns()
    assert any("greedy" in column for column in columns) == with_base
    for column, values in columns.items():
        expected = [matrix_entry(matrices, column, left, right) for left, right in pairs]
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-14, err_msg=column)


def test_near_distributions_lose_no_digits():
    """KL of about 1e-9: sums of two large cross-entropies would leave seven digits."""
    outputs = made_up_outputs(1)
    near = TaskOutputs(**{**vars(outputs[0]), "logits": outputs[0].logits * np.float32(1.0 + 3e-5)})
    room = OutputPairs(1, near, True)
    room.put(0, prepared_outputs(outputs[0]), prepared_outputs(near))
    found = room.columns()
    p, q = (prepared_outputs(one).log_probs.astype(np.longdouble) for one in (outputs[0], near))
    expected = (np.exp(p) * (p - q)).sum(1)[:15].mean()
    assert expected < 1e-8
    assert found["kl_lr_mean"][0] == pytest.approx(float(expected), rel=1e-6)


def made_up_space(size: int, whole: bool) -> TensorSpace:
    generator = np.random.default_rng(size)
    centre = generator.normal(size=size).astype(np.float32)
    values = [centre + generator.normal(size=size).astype(np.float32) for _ in range(4)]
    values[2] = centre.copy()  # has not moved
    values.append(values[0].copy())  # a twin
    basis = np.stack([centre, *(one - centre for one in values)]).astype(np.float64)
    gram = basis @ basis.T * (1.0 if whole else 5.0)
    num_elements = size if whole else 5 * size
    samples = [TensorSample(num_elements, value, np.zeros(3), np.zeros(3)) for value in values]
    return TensorSpace(gram, centre, samples)


@pytest.mark.parametrize("size", [3, 7, 400])
def test_the_projection_is_that_of_least_squares(size):
    space, generator = made_up_space(size, True), np.random.default_rng(0)
    regressors = np.eye(6)[[0, 1, 2, 3, 5]]
    columns = np.stack([space.sampled(VirtualTensor(row)) for row in regressors], axis=1)
    for values in (generator.normal(size=size), columns @ generator.normal(size=5), columns[:, 1]):
        found = space.fitted(values, regressors)
        norms = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
        norms[2 + 1] = 1.0  # of what has not moved
        expected = np.linalg.lstsq(columns / norms, values, rcond=1e-12)[0] / norms
        np.testing.assert_allclose(found.coefficients, expected @ regressors, rtol=1e-9, atol=1e-12)
        in_span = np.linalg.norm(values - columns @ expected) < 1e-9 * np.linalg.norm(values)
        assert (found.values is None) == in_span


@pytest.mark.parametrize("whole", [True, False])
def test_products_of_groups_are_those_of_each_group(whole):
    space, generator = made_up_space(300, whole), np.random.default_rng(1)
    groups = []
    for members in ((1, 2), (1, 2), (2, 4), (1, 5)):
        coefficients = np.zeros((3, 6))
        coefficients[:, members] = generator.normal(size=(3, 2))
        beyond = space.sampled(VirtualTensor(coefficients[2])) + 0.1 * generator.normal(size=300)
        groups.append([*map(VirtualTensor, coefficients[:2]), VirtualTensor(coefficients[2], beyond)])
    together = space.products_of(groups)
    for found, group in zip(together, groups, strict=True):
        np.testing.assert_allclose(found, made_up_space(300, whole).products(group), rtol=1e-12)
        in_span = np.stack([tensor.coefficients for tensor in group[:2]])
        np.testing.assert_allclose(found[:2, :2], in_span @ space.gram @ in_span.T, rtol=1e-12)


def test_of_many_checkpoints_those_of_the_steps_are_enough(evidence, monkeypatch):
    steps = []
    for text in TEXTS:
        plan = MergePlan((MergeStep("m0", "m2", parse_arm(text), 0.3), MergeStep("#1", "m0", parse_arm("linear"))))
        steps.append(PlanStep(plan, 1, "add"))
    made_of = evidence.table, evidence.ids, evidence.outputs, evidence.weights
    every = Virtual(*made_of, digests=evidence.digests)
    expected = every.batch(steps, every.columns, 1)
    assert "merges" in vars(every)
    monkeypatch.setattr(virtual, "_MANY", 0)
    few = Virtual(*made_of, digests=evidence.digests)
    np.testing.assert_allclose(few.batch(steps, few.columns, 1), expected, rtol=RTOL, atol=ATOL)
    assert "merges" not in vars(few)
