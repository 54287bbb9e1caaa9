"""Every propagator on tiny real checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from simmerge_ray.base.errors import ConfigError, OperatorError, PlanError
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine.seeds import Seeds
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm, parse_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep, fold_plan, resolve_plan, unmerged
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.features import feature_columns
from simmerge_ray.signals.propagation.evidence import read_evidence
from simmerge_ray.signals.propagation.exact import Exact
from simmerge_ray.signals.propagation.interface import plan_results, plan_sources
from simmerge_ray.signals.propagation.merged import merged_steps
from simmerge_ray.signals.propagation.table import PROPAGATORS
from simmerge_ray.signals.propagation.virtual import Virtual
from simmerge_ray.signals.signature import DENSITIES, SignatureSpec, SignatureStore, TensorSample, coordinates
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.signals.weights import WeightSums

TWO_WAY = [name for name, spec in OPERATOR_SPECS.items() if spec.max_sources != 1 and not spec.needs_grams]
ARMS = ["linear", "slerp", "nuslerp", "task_arithmetic(scale=0.5)", "ties(density=0.2)"]
COUNTED = ("sign_conflict", "trimmed_overlap")  # of an intermediate, over the sample
FROM_SIGNATURES = ("virtual", "curved")


def fold(text: str, *members: str, weighting: str = "equal") -> MergePlan:
    return fold_plan(members or ("m0", "m1", "m2"), [parse_arm(text)], weighting)


def dag(first: str, second: str, last: str) -> MergePlan:
    """An intermediate on either side and on both."""
    a, b, c = (parse_arm(text) for text in (first, second, last))
    return MergePlan(
        (
            MergeStep("m0", "m1", a, 0.3),
            MergeStep("m2", "#1", b, 0.4),
            MergeStep("#1", "#2", c),
            MergeStep("#3", "m0", a),
        )
    )


def weight_columns(columns):
    return [c for c in columns if c.startswith(("weight_", "task_vector_"))]


@pytest.mark.parametrize("name", TWO_WAY)
def test_delivers_the_declared_columns_for_every_operator(propagator, name, evidence):
    plan = fold("della(density=0.6)" if name == "della" else name)
    signals = propagator.steps(plan, "add")
    assert [(one.left, one.right, one.task) for one in signals] == [("m0", "m1", "add"), ("#1", "m2", "add")]
    for one in signals:
        assert tuple(one.features) == propagator.columns
        assert all(math.isfinite(value) for value in one.features.values())
    table = evidence.table.get("m0", "m1", "add").features
    assert signals[0].features == {column: table[column] for column in propagator.columns}


def test_columns_are_in_the_schema_s_order(propagators):
    every = feature_columns(True)
    for name, one in propagators.items():
        assert [column for column in every if column in one.columns] == list(one.columns)
        assert (one.columns == every) == (name in (*FROM_SIGNATURES, "exact"))
        assert one.name == name


def test_takes_any_dag(propagator):
    signals = propagator.steps(dag("linear", "slerp", "ties"), "copy")
    assert [(one.left, one.right) for one in signals] == [("m0", "m1"), ("m2", "#1"), ("#1", "#2"), ("#3", "m0")]


def close(found, expected, columns, rtol, atol):
    for column in columns:
        assert found[column] == pytest.approx(expected[column], rel=rtol, abs=atol), column


@pytest.mark.parametrize("text", ["linear", "slerp", "nuslerp", "task_arithmetic(scale=0.5)"])
def test_weights_of_blends_are_exact_at_every_step(propagators, text):
    """1e-5: the audit merges in float32. Signs of coordinates are counted on the sample."""
    plan = dag(text, "linear", text)
    columns = weight_columns(propagators["virtual"].columns)
    for found, expected in zip(
        propagators["virtual"].steps(plan, "add"), propagators["exact"].steps(plan, "add"), strict=True
    ):
        close(found.features, expected.features, columns, 1e-5, 1e-5)


@pytest.mark.parametrize("text", ["ties(density=0.2)", "breadcrumbs", "model_stock", "karcher", "sce", "dare_ties"])
def test_weights_of_other_operators_come_from_the_sample(propagators, text):
    """5 standard errors of a cosine from 1500 of up to 6144 coordinates of a tensor, less what the span explains."""
    found = propagators["virtual"].steps(fold(text), "add")[1].features
    expected = propagators["exact"].steps(fold(text), "add")[1].features
    columns = [f"{name}_global" for name in ("weight_cosine", "weight_l2", "task_vector_cosine", "sign_conflict")]
    close(found, expected, columns, 0.02, 0.02)


@pytest.mark.parametrize("weight, kept", [(0.0, "m0"), (1.0, "m1")])
@pytest.mark.parametrize("text", ["linear", "slerp", "nuslerp"])
@pytest.mark.parametrize("name", [name for name in PROPAGATORS if name != "bound"])
def test_a_merge_that_is_a_checkpoint_has_its_features(propagators, evidence, name, text, weight, kept):
    plan = MergePlan((MergeStep("m0", "m1", parse_arm(text), weight), MergeStep("#1", "m2", make_arm("linear"))))
    found = propagators[name].steps(plan, "copy")[1].features
    expected = evidence.table.get(kept, "m2", "copy").features
    counted = [c for c in propagators[name].columns if c.startswith(COUNTED)]
    # Where the audit adds to the base in float32 a rounding stays.
    close(found, expected, [c for c in propagators[name].columns if c not in counted], 2e-4, 2e-5)
    close(found, expected, counted, 0.0, 1e-3 if name == "exact" else 5 / math.sqrt(1500))


def test_bound_with_a_one_hot_weight_reproduces_the_table(propagators, evidence):
    plan = MergePlan((MergeStep("m0", "m1", make_arm("ties"), 1.0), MergeStep("#1", "m2", make_arm("linear"))))
    found = propagators["bound"].steps(plan, "add")[1].features
    close(found, evidence.table.get("m1", "m2", "add").features, propagators["bound"].columns, 1e-12, 0.0)


def test_a_merge_against_its_own_source_is_nearer_than_the_other_parent(propagator, evidence):
    plan = MergePlan((MergeStep("m0", "m1", make_arm("linear")), MergeStep("#1", "m0", make_arm("linear"))))
    found, table = propagator.steps(plan, "add")[1].features, evidence.table.get("m1", "m0", "add").features
    assert found["weight_l2_global"] == pytest.approx(0.5 * table["weight_l2_global"], rel=1e-5)
    assert found["kl_lr_mean"] < table["kl_lr_mean"]


@pytest.mark.parametrize("text", ["linear", "slerp", "nuslerp", "task_arithmetic", "ties"])
def test_order_of_equal_sources_changes_nothing(propagator, text):
    found = propagator.steps(fold(text, "m0", "m1", "m2", weighting="halving"), "add")[1].features
    swapped = MergePlan((MergeStep("m1", "m0", parse_arm(text)), MergeStep("#1", "m2", parse_arm(text))))
    assert propagator.steps(swapped, "add")[1].features == found


def test_sources_of_a_step_swap_like_the_table_s(propagator):
    first = MergeStep("m0", "m1", make_arm("linear"), 0.3)
    ahead, behind = (
        propagator.steps(MergePlan((first, step)), "add")[1]
        for step in (MergeStep("#1", "m2", make_arm("linear")), MergeStep("m2", "#1", make_arm("linear")))
    )
    if all(column in behind.features for column in feature_columns(True)):
        close(behind.swap().features, ahead.features, propagator.columns, 1e-6, 1e-9)
    assert (behind.left, behind.right) == ("m2", "#1")
    assert behind.features["kl_rl_mean"] == pytest.approx(ahead.features["kl_lr_mean"], rel=1e-6)


def test_bound_is_above_the_exact_distance_of_averages(propagators):
    found, exact = (propagators[name].steps(fold("linear"), "add")[1].features for name in ("bound", "exact"))
    for column in ("weight_l2_global", "weight_l2_mlp", "weight_l2_mean", "task_vector_norm_left"):
        assert found[column] >= exact[column]


def test_curves_are_nearer_to_the_truth_than_lines(propagators):
    """The tiny checkpoints are far from their base, where outputs bend."""
    errors = {
        name: [
            abs(propagators[name].steps(fold("linear"), task)[1].features["kl_lr_mean"] - exact.features["kl_lr_mean"])
            for task in ("add", "copy")
            for exact in propagators["exact"].steps(fold("linear"), task)[1:]
        ]
        for name in ("bound", "virtual", "curved")
    }
    assert sum(errors["curved"]) < sum(errors["virtual"]) < sum(errors["bound"])


def test_exact_merges_with_the_engine(catalogue):
    """The last intermediate of a longer plan is what the plan that ends there streams."""
    plan = fold("ties(density=0.2)", "m0", "m1", "m2")
    expected = dict(merged_tensors(resolve_plan(plan, catalogue)))
    *_, found = merged_steps(plan, catalogue)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].numpy(), expected[name].numpy()) for name in expected)


def test_rounding_to_the_output_dtype_moves_the_exact_signals_a_little(propagators, evidence):
    rounded = Exact(
        evidence.table, evidence.catalogue, evidence.tokens, evidence.outputs, evidence.weights, dtype="BF16"
    )
    found = rounded.steps(fold("linear"), "add")[1].features
    expected = propagators["exact"].steps(fold("linear"), "add")[1].features
    assert found["kl_lr_mean"] != expected["kl_lr_mean"]
    assert found["kl_lr_mean"] == pytest.approx(expected["kl_lr_mean"], rel=0.05)


def test_random_operators_draw_the_masks_of_the_merge(evidence, catalogue, propagators):
    """Where a tensor is kept whole the virtual checkpoint is the merge itself, intermediates' seeds included."""
    plan = replace(fold("dare_ties(density=0.5)"), seed=7)
    *_, merged = merged_steps(plan, catalogue)
    virtual = propagators["virtual"]
    name = "model.layers.0.input_layernorm.weight"
    space = virtual.merges[name].space
    found = space.sampled(space.with_base(virtual.merges[name].of(plan_results(plan)[1])))
    np.testing.assert_allclose(found, merged[name].numpy(), rtol=1e-5, atol=1e-6)
    seeds = Seeds(graph := compile_plan(resolve_plan(plan, catalogue)))
    node = next(output for output in graph.outputs if output.name == name).node
    last = plan_results(plan)[1]
    for part, source in zip((last.left, last.right), node.sources, strict=True):
        assert virtual.merges[name].seed(last, part) == seeds.of(source, 2, name)


def heavy_tailed(generator, shape):
    return (generator.standard_t(4, shape) * 0.01).astype(np.float32)


@pytest.mark.parametrize("depth", [1, 2])
def test_ties_on_tensors_much_larger_than_the_sample(depth):
    """<= 1 % at 10^4 of 2 * 10^5 coordinates, exact thresholds and Gram matrix; truth by merging everything."""
    generator = np.random.default_rng(depth)
    size, name, ids = 200_000, "model.layers.0.mlp.up_proj.weight", ("base", "a", "b", "c", "d")
    base = generator.standard_normal(size).astype(np.float32)
    shared = heavy_tailed(generator, size)
    values = {"base": base} | {one: base + heavy_tailed(generator, size) + 0.5 * shared for one in ids[1:]}
    vectors = {one: values[one] - base for one in ids}
    index = coordinates(name, size, 10_000)

    def sample(one):
        magnitudes = np.sort(np.abs(vectors[one]))
        lows = [magnitudes[size - int(density * size)] for density in DENSITIES]
        return {name: TensorSample(size, values[one][index], np.zeros(3), np.array(lows, np.float32))}

    basis = np.stack([base, *(vectors[one] for one in ids)]).astype(np.float64)
    nothing = np.zeros((5, 5))
    sums = {name: WeightSums(basis @ basis.T, nothing, nothing, nothing)}
    table = SignalTable(feature_columns(True), {}, {"base": "base"})
    weights = {one: sample(one) for one in ids}
    virtual = Virtual(table, ids, lambda *_: pytest.fail("no outputs are needed"), weights, sums)
    arm = parse_arm("ties(density=0.2)")
    plan = fold_plan(("a", "b", "c", "d")[: depth + 2], [arm])
    merged = vectors["a"].astype(np.float64)
    for step in plan.steps[:depth]:
        merged = ties_of(merged, vectors[step.right].astype(np.float64), step.weight, 0.2)
    left, right = plan_sources(plan)[depth]
    space = virtual.merges[name].space
    found, other = (virtual.merges[name].of(source) for source in (left, right))
    truth = vectors[right].astype(np.float64)
    (square, dot), (_, other_square) = space.products([found, other])
    assert math.sqrt(square) == pytest.approx(np.linalg.norm(merged), rel=0.01)
    cosine = merged @ truth / np.linalg.norm(merged) / np.linalg.norm(truth)
    assert dot / math.sqrt(square * other_square) == pytest.approx(cosine, abs=0.01)
    assert math.sqrt(square - 2 * dot + other_square) == pytest.approx(np.linalg.norm(merged - truth), rel=0.01)


def ties_of(left, right, weight, density):
    """TIES of two task vectors, vectorised: `tests.reference` takes one entry at a time."""
    shares = (1.0 - weight, weight)
    kept = []
    for vector in (left, right):
        low = np.partition(np.abs(vector), len(vector) - int(density * len(vector)))[
            len(vector) - int(density * len(vector))
        ]
        kept.append(np.where(np.abs(vector) >= low, vector, 0.0))
    sign = np.where(shares[0] * kept[0] + shares[1] * kept[1] >= 0, 1.0, -1.0)
    agree = [np.where(vector * sign > 0, share, 0.0) for vector, share in zip(kept, shares, strict=True)]
    total = agree[0] * kept[0] + agree[1] * kept[1]
    divisor = agree[0] + agree[1]
    return np.divide(total, divisor, out=np.zeros_like(total), where=divisor > 0)


def test_what_no_checkpoint_moved_stays_where_it_is(evidence):
    """Else TIES counts the rounding of a blend as a vote."""
    name, ids = "model.norm.weight", ("base", "a", "b", "c")
    base = np.linspace(0.5, 1.5, 64).astype(np.float32)
    values = {"base": base, "a": base.copy(), "b": base.copy(), "c": base + np.float32(0.25)}
    low = np.zeros(len(DENSITIES), np.float32)
    weights = {one: {name: TensorSample(64, values[one], np.zeros(3), low)} for one in ids}
    basis = np.stack([base, *(values[one] - base for one in ids)]).astype(np.float64)
    nothing = np.zeros((4, 4))
    sums = {name: WeightSums(basis @ basis.T, nothing, nothing, nothing)}
    virtual = Virtual(SignalTable(feature_columns(True), {}, {"base": "base"}), ids, evidence.outputs, weights, sums)
    arms = [parse_arm("linear"), parse_arm("ties(density=1)")]
    source = plan_results(fold_plan(("a", "b", "c"), arms))[-1]
    merged = virtual.merges[name].space.sampled(virtual.merges[name].of(source))
    np.testing.assert_allclose(merged, 0.25, rtol=1e-6)


@pytest.fixture(scope="module")
def twins(catalogue_path, tmp_path_factory):
    """Evidence of m0 under two names, and m2."""
    root = catalogue_path.parent
    path = tmp_path_factory.mktemp("twins") / "catalogue.yaml"
    entries = "".join(
        f"- {{id: {name}, path: {root}/{of}}}\n" for name, of in (("m0", "m0"), ("m1", "m0"), ("m2", "m2"))
    )
    path.write_text(f"base: {{id: base, path: {root}/base}}\ncheckpoints:\n{entries}")
    probe_sets = {"add": load_probe_sets(root / "probes")["add"]}
    found, store = load_catalogue(path), SignatureStore(path.parent / "signatures")
    spec = SignatureSpec(batch_size=8, num_positions=30, num_attention_positions=8, num_coordinates=1500)
    return read_evidence(compute_signals(found, probe_sets, spec, store=store), found, probe_sets, store)


@pytest.mark.parametrize("text", ["linear", "slerp", "nuslerp", "model_stock", "sce"])
@pytest.mark.parametrize("name", PROPAGATORS)
def test_identical_checkpoints_merge_to_themselves(twins, name, text):
    one = PROPAGATORS[name](twins)
    found = one.steps(fold(text), "add")[1].features
    expected = twins.table.get("m0", "m2", "add").features
    close(found, expected, [c for c in one.columns if not c.startswith(COUNTED)], 2e-4, 2e-5)


@pytest.fixture(scope="module")
def baseless(catalogue_path, tmp_path_factory):
    """Evidence of the same checkpoints without their base, from sampled weights."""
    lines = catalogue_path.read_text().replace("path: ", f"path: {catalogue_path.parent}/").splitlines()
    start = lines.index("checkpoints:")
    path = tmp_path_factory.mktemp("baseless") / "catalogue.yaml"
    path.write_text("\n".join(line for line in lines[start:] if line.startswith(("checkpoints", "-", "  "))) + "\n")
    path.write_text("\n".join(path.read_text().split("\nbase:")[0].splitlines()) + "\n")
    found = load_catalogue(path)
    probe_sets = {"add": load_probe_sets(catalogue_path.parent / "probes")["add"]}
    store = SignatureStore(path.parent / "signatures")
    spec = SignatureSpec(batch_size=8, num_positions=30, num_attention_positions=8, num_coordinates=20_000)
    table = compute_signals(found, probe_sets, spec, weights="sampled", store=store)
    return read_evidence(table, found, probe_sets, store)


@pytest.mark.parametrize("text", ["linear", "slerp", "nuslerp", "karcher", "multislerp"])
def test_without_a_base(baseless, text):
    plan = fold(text, "m2", "m0", "m1")
    exact = PROPAGATORS["exact"](baseless).steps(plan, "add")[1].features
    assert tuple(exact) == feature_columns(False)
    for name in ("bound", "second_order", "virtual"):
        one = PROPAGATORS[name](baseless)
        found = one.steps(plan, "add")[1].features
        assert tuple(found) == one.columns
        close(found, exact, ["weight_cosine_global"], 0.02, 0.0)
    close(found, exact, weight_columns(one.columns), 1e-4, 1e-5)  # the sample holds every tensor whole


def test_what_needs_a_base_is_refused_without_one(baseless):
    with pytest.raises(OperatorError, match="operator ties needs a base checkpoint"):
        PROPAGATORS["virtual"](baseless).steps(fold("ties"), "add")
    with pytest.raises(ConfigError, match="'curved' needs a base checkpoint"):
        PROPAGATORS["curved"](baseless)


def test_errors_name_what_is_wrong(propagator):
    with pytest.raises(PlanError, match="unknown checkpoint 'm9'"):
        propagator.steps(fold("linear", "m0", "m9", "m1"), "add")
    with pytest.raises(PlanError, match="unknown checkpoint 'base'"):
        propagator.steps(fold("linear", "m0", "base", "m1"), "add")
    with pytest.raises(PlanError, match="unknown task 'adds'"):
        propagator.steps(fold("linear"), "adds")
    with pytest.raises(PlanError, match="operator 'passthrough' takes 1 source"):  # what stacks layers is no step
        propagator.steps(fold("passthrough"), "add")
    assert propagator.steps(MergePlan(source="m0"), "add") == []


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", [name for name in PROPAGATORS if name != "exact"])
def test_a_weight_that_changes_with_depth_is_refused_with_its_step(propagators, name, number):
    weights = [(0.25, 0.75) if number == step else 0.5 for step in (1, 2)]
    plan = MergePlan(
        (MergeStep("m0", "m1", make_arm("linear"), weights[0]), MergeStep("#1", "m2", make_arm("ties"), weights[1]))
    )
    with pytest.raises(PlanError, match=f"step {number}: a weight that changes with depth cannot be propagated; .*"):
        propagators[name].steps(plan, "add")


def test_the_source_of_a_refused_step_has_no_number():
    found = plan_results(MergePlan((MergeStep("m1", "m0", make_arm("linear"), (0.25, 0.75)),)))[0]
    assert (found.left, found.right) == ("m1", "m0")
    with pytest.raises(PlanError, match="changes with depth"):
        found.constant_weight  # noqa: B018


@pytest.mark.parametrize("text", ["linear", "slerp", "ties"])
def test_exact_takes_weights_that_change_with_depth(propagators, catalogue, evidence, text):
    plan = MergePlan(
        (MergeStep("m0", "m1", parse_arm(text), (0.0, 1.0)), MergeStep("#1", "m2", make_arm("linear"), (0.1, 0.2)))
    )
    signals = propagators["exact"].steps(plan, "add")
    assert [tuple(one.features) for one in signals] == [propagators["exact"].columns] * 2
    table = evidence.table.get("m0", "m1", "add").features
    assert signals[0].features == {column: table[column] for column in propagators["exact"].columns}
    if text == "linear":
        # The first layer and what stands outside are m0's, the last one is m1's.
        tensors = next(merged_steps(plan, catalogue))
        sides = [dict(merged_tensors(unmerged(catalogue.ref(name)))) for name in ("m0", "m1")]
        for name, tensor in tensors.items():
            assert torch.equal(tensor, sides["layers.1." in name][name].float())
        # What is m0's own is as far from m2 as m0 is.
        column = "weight_l2_embedding"
        assert signals[1].features[column] == evidence.table.get("m0", "m2", "add").features[column]
    numbers = propagators["exact"].steps(MergePlan((replace(plan.steps[0], weight=0.5), plan.steps[1])), "add")
    assert signals[1].features != numbers[1].features


def test_plans_share_intermediates(propagators):
    """Two plans that begin alike, and one that says the same in another order."""
    plans = [fold("ties", "m0", "m1", "m2"), fold("ties", "m1", "m0", "m2")]
    assert plan_results(plans[0]) == plan_results(plans[1])
    virtual = propagators["virtual"]
    virtual.steps(plans[0], "add")
    (merges, *_) = virtual.merges.values()
    before = merges.of.cache_info().misses
    virtual.steps(plans[1], "copy")
    assert merges.of.cache_info().misses == before
