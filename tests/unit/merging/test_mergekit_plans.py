"""Plans written as mergekit files, and read again: the same merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import PlanError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.graph import MergeGraph, Node, Read
from simmerge_ray.merging.mergekit import compile_mergekit, read_mergekit, write_mergekit
from simmerge_ray.merging.mergekit.methods import METHODS
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, Arm, make_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep, ResolvedPlan
from tests.unit.merging.mergekit_files import (
    HERE,
    Q0,
    copied,
    node,
    rewrite,
)


def resolved(root: Path, *steps: MergeStep, **options) -> ResolvedPlan:
    return resolved_plan(root, MergePlan(steps, **options))


def resolved_plan(root: Path, plan: MergePlan) -> ResolvedPlan:
    refs = tuple(CheckpointRef(member, root / member) for member in plan.members)
    return ResolvedPlan(plan, refs, CheckpointRef("base", root / "base"))


def canonical(found: Node) -> object:
    """A tree with weights up to a common factor where the operator normalises."""
    if isinstance(found, Read):
        return found
    factor = 1.0 if found.operator in ("task_arithmetic", "dare_linear") else sum(found.weights)
    return (
        found.operator,
        [canonical(source) for source in found.sources],
        [round(weight / factor, 12) for weight in found.weights],
        dict(found.params),
        found.base and canonical(found.base),
        found.step,
        found.round_to,
    )


def back(text: str, **options) -> MergeGraph:
    documents = read_mergekit(text, HERE)
    return compile_mergekit(documents, lambda name: CheckpointRef(name.path.name, name.path), **options)


TWO_WAY = sorted(name for name in OPERATOR_SPECS if name in METHODS and METHODS[name].max_sources != 1)


@pytest.mark.parametrize("operator", TWO_WAY)
def test_a_plan_written_and_read_is_the_same_merge(root, operator):
    weight = 0.3 if {"weight", "t"} & set(METHODS[operator].parameters) else 0.5
    plan = resolved(root, MergeStep("m0", "m1", make_arm(operator), weight))
    expected, found = compile_plan(plan), back(write_mergekit(plan))
    assert [o.name for o in found.outputs] == [o.name for o in expected.outputs]
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        assert canonical(one.node) == canonical(other.node)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)


@pytest.mark.parametrize("intermediate", ["float32", "out"])
def test_a_fold_is_several_documents(root, tmp_path, intermediate):
    for name in ("m0", "m1", "m2", "base"):
        rewrite(copied(root, tmp_path / name, name), lambda ts: {k: t.bfloat16() for k, t in ts.items()})
    steps = (
        MergeStep("m0", "m1", make_arm("ties", {"density": 0.2}), 0.5),
        MergeStep("#1", "m2", make_arm("slerp"), 0.25),
        MergeStep("m1", "#2", make_arm("task_arithmetic", {"scale": 0.7}), 0.4),
    )
    plan = resolved(tmp_path, *steps, intermediate_dtype=intermediate)
    text = write_mergekit(plan)
    documents = list(yaml.safe_load_all(text))
    assert [document.get("name") for document in documents] == ["step1", "step2", None]
    assert [document["out_dtype"] for document in documents] == [
        *["float32" if intermediate == "float32" else "bfloat16"] * 2, "bfloat16"
    ]  # fmt: skip
    assert {document["dtype"] for document in documents} == {"float32"}
    expected, found = compile_plan(plan), back(text, round_intermediates=True)
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        assert canonical(one.node) == canonical(other.node)
        assert one.dtype == other.dtype == "BF16"


def test_one_checkpoint_as_it_is(root):
    ref = CheckpointRef("m0", root / "m0")
    graph = back(write_mergekit(ResolvedPlan(MergePlan(source="m0"), (ref,), None)))
    assert {o.node for o in graph.outputs} == {Read("m0", o.name) for o in graph.outputs}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (MergeStep("m0", "m1", make_arm("slerp", {"threshold": 0.5})), "step 1: mergekit's slerp has no 'threshold'"),
        (MergeStep("m0", "base", make_arm("ties")), "step 1: the base is one of the two models"),
        (MergeStep("m0", "m1", make_arm("karcher"), 0.3), "step 1: mergekit's karcher has no weights; 0.3 cannot"),
    ],
)
def test_what_mergekit_cannot_express_is_refused(root, step, message):
    with pytest.raises(PlanError, match=message):
        write_mergekit(resolved(root, step))


def test_paths_with_signs_of_the_text_form(root, tmp_path):
    for name in ("m0+", "m1@", "m2"):
        copied(root, tmp_path / name, name[:2])
    step = MergeStep("m0+", "m1@", make_arm("linear"))
    assert node(back(write_mergekit(resolved(tmp_path, step))), Q0).sources == (Read("m0+", Q0), Read("m1@", Q0))
    with pytest.raises(PlanError, match="mergekit reads '.' and '@' in paths"):
        write_mergekit(resolved(tmp_path, step, MergeStep("#1", "m2", make_arm("linear"))))


# --- any plan ------------------------------------------------------------------------------------------------------


@st.composite
def arms(draw) -> Arm:
    """An operator that mergekit has, with any values of the parameters that mergekit knows."""
    operator = draw(st.sampled_from(TWO_WAY))
    known = {one.operator_name for one in METHODS[operator].parameters.values() if not one.is_ours}
    params = {}
    for name in sorted(known & OPERATOR_SPECS[operator].parameters.keys()):
        spec = OPERATOR_SPECS[operator].parameters[name]
        values = {
            "bool": st.booleans(),
            "int": st.integers(int(spec.low), int(spec.high)),
            "float": st.floats(spec.low, spec.high, exclude_min=spec.open_low),
        }[spec.kind]
        params[name] = draw(values)
    if {"epsilon", "density"} <= params.keys():  # density - epsilon and density + epsilon stay within (0, 1)
        params |= {"density": draw(st.floats(0.3, 0.7)), "epsilon": draw(st.floats(0.0, 0.25))}
    return make_arm(operator, params)


@st.composite
def plans(draw, intermediate: str) -> MergePlan:
    """Any binary tree over two to four checkpoints."""
    sources = draw(st.permutations(["m0", "m1", "m2", "m3"]))[: draw(st.integers(2, 4))]
    steps = []
    while len(sources) > 1:
        left, right, *rest = draw(st.permutations(sources))
        arm = draw(arms())
        weights = st.just(0.5)
        if {"weight", "t"} & METHODS[arm.operator].parameters.keys():
            weights = SHARE | st.lists(SHARE, min_size=2, max_size=5).map(tuple)
        steps.append(MergeStep(left, right, arm, draw(weights)))
        sources = [*rest, f"#{len(steps)}"]
    return MergePlan(tuple(steps), intermediate_dtype=intermediate)


SHARE = st.floats(0.0, 1.0) | st.sampled_from([0.0, 0.1, 0.5, 1 / 3, 1.0])


@pytest.fixture(scope="module")
def bfloat16_root(root, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bfloat16")
    for name in ("m0", "m1", "m2", "m3", "base"):
        rewrite(copied(root, path / name, name), lambda ts: {k: t.bfloat16() for k, t in ts.items()})
    return path


@pytest.mark.parametrize("intermediate", ["float32", "out"])
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_plan_that_is_written_as_a_mergekit_file_is_read_as_the_same_merge(bfloat16_root, intermediate, data):
    plan = resolved_plan(bfloat16_root, data.draw(plans(intermediate)))
    expected = compile_plan(plan)
    found = back(write_mergekit(plan), round_intermediates=intermediate == "out")
    assert set(found.members) == set(expected.members)
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        assert (one.name, one.shape, one.dtype) == (other.name, other.shape, other.dtype)
        assert canonical(one.node) == canonical(other.node)
