"""mergekit files: read, compiled to numbers worked out by hand, written, and refused with every problem at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from simmerge_ray.base.errors import CheckpointError, InputError, PlanError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.graph import Apply, MergeGraph, Node, Read
from simmerge_ray.merging.mergekit import ModelName, compile_mergekit, read_mergekit, write_mergekit
from simmerge_ray.merging.mergekit.documents import parse_model_name
from simmerge_ray.merging.mergekit.methods import METHODS
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep, ResolvedPlan
from tests import tiny

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2))
DOWN0, DOWN1 = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2))
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
HERE = Path("/somewhere")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mergekit")
    tiny.make_catalogue(path)
    return path


def locate(name: ModelName) -> CheckpointRef:
    if not name.path.is_dir():
        raise CheckpointError(f"{name.path} is not a directory")
    return CheckpointRef(name.id, name.path)


def compiled(root: Path, text: str, **options) -> MergeGraph:
    return compile_mergekit(read_mergekit(text, root), locate, **options)


def node(graph: MergeGraph, name: str) -> Node:
    return next(output.node for output in graph.outputs if output.name == name)


def apply(graph: MergeGraph, name: str) -> Apply:
    found = node(graph, name)
    assert isinstance(found, Apply)
    return found


def copied(root: Path, target: Path, name: str = "m0", **config) -> Path:
    """A copy of a checkpoint to change; `config` replaces entries of config.json."""
    target.mkdir()
    for file in (root / name).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | config))
    return target


def rewrite(path: Path, change) -> None:
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"})


def read_error(text: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        read_mergekit(text, HERE)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def compile_error(root: Path, text: str) -> list[str]:
    documents = read_mergekit(text, root)
    with pytest.raises(PlanError) as caught:
        compile_mergekit(documents, locate)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


LINEAR = """
merge_method: linear
models:
  - {model: m0, parameters: {weight: 0.3}}
  - {model: m1, parameters: {weight: 0.9}}
"""


# --- scalars, weights, bases ---------------------------------------------------------------------------------------


def test_linear_has_the_weights_of_the_file_at_every_tensor(root):
    graph = compiled(root, LINEAR)
    for output in graph.outputs:
        assert isinstance(output.node, Apply)
        assert output.node.sources == (Read("m0", output.name), Read("m1", output.name))
        assert output.node.weights == (0.3, 0.9) and output.node.base is None
        assert (output.dtype, output.input_dtype) == ("F32", None)
    assert [output.name for output in graph.outputs] == sorted(load_file(root / "m0" / "model.safetensors"))
    assert graph.members == ("m0", "m1") and set(graph.checkpoints) == {"m0", "m1"}
    assert graph.tokenizer_from == "m0"


def test_the_base_among_the_models_is_the_first_of_slerp_and_weights_are_1_minus_t_and_t(root):
    graph = compiled(
        root, "{merge_method: slerp, base_model: m1, models: [{model: m0}, {model: m1}], parameters: {t: 0.2}}"
    )
    assert apply(graph, NORM).sources == (Read("m1", NORM), Read("m0", NORM))
    assert apply(graph, NORM).weights == (0.8, 0.2) and apply(graph, NORM).base is None
    assert graph.members == ("m0", "m1")


def test_slerp_takes_a_base_that_is_not_listed_as_one_of_the_two(root):
    graph = compiled(root, "{merge_method: slerp, base_model: base, models: [{model: m0}], parameters: {t: 0.25}}")
    assert apply(graph, Q0).sources == (Read("base", Q0), Read("m0", Q0))


@pytest.mark.parametrize("listed", ["", "{model: base},"])
def test_task_vector_methods_leave_the_base_out_of_the_sources(root, listed):
    text = f"""
    {{merge_method: ties, base_model: base, parameters: {{weight: 1, density: 0.4, lambda: 2, int8_mask: true}},
      models: [{listed} {{model: m0}}, {{model: m1, parameters: {{weight: 0.5}}}}]}}
    """
    found = apply(compiled(root, text), Q1)
    assert found.sources == (Read("m0", Q1), Read("m1", Q1)) and found.base == Read("base", Q1)
    assert found.weights == (1.0, 0.5)
    assert dict(found.params)["density"] == 0.4 and dict(found.params)["scale"] == 2.0


def test_parameters_that_differ_between_the_models_are_a_tuple_and_mergekits_defaults_are_written_out(root):
    text = """
    {merge_method: ties, base_model: base, parameters: {weight: 1},
     models: [{model: m0, parameters: {density: 0.3}}, {model: m1}]}
    """
    assert dict(apply(compiled(root, text), Q1).params)["density"] == (0.3, 1.0)


def test_linear_takes_an_unlisted_base_as_a_model_as_mergekit_does(root):
    graph = compiled(root, "{merge_method: linear, base_model: base, models: [{model: m0}], parameters: {weight: 1}}")
    assert apply(graph, Q0).sources == (Read("m0", Q0), Read("base", Q0))
    assert read_error("{merge_method: linear, base_model: b, models: [{model: a, parameters: {weight: 1}}]}") == [
        "parameters.weight: is missing for 'b': with linear mergekit adds the base_model to the models; "
        "leave base_model out, or list it with its own value"
    ]


def test_nuslerp_weights_are_normalised_as_mergekit_does(root):
    def weights(left: float, right: float) -> tuple[float, ...]:
        text = f"""
        {{merge_method: nuslerp, base_model: base, models: [{{model: m0, parameters: {{weight: {left}}}}},
          {{model: m1, parameters: {{weight: {right}}}}}]}}
        """
        found = apply(compiled(root, text), Q0)
        assert found.base == Read("base", Q0)
        return found.weights

    assert weights(1, 3) == (0.25, 0.75)
    assert weights(1, -1) == (0.5, 0.5)


def test_weights_that_add_up_to_zero_are_refused_where_they_normalise(root):
    text = LINEAR.replace("0.9", "-0.3")
    assert compile_error(root, text)[0].startswith(
        "weight: the weights add up to 0, and normalizing divides by their sum:"
    )


def test_passthrough_reads_or_scales(root):
    text = "{merge_method: passthrough, models: [{model: m0, parameters: {scale: [{filter: mlp, value: 0.5}]}}]}"
    graph = compiled(root, text)
    assert node(graph, Q0) == Read("m0", Q0)
    assert apply(graph, DOWN0).params == (("scale", 0.5),) and apply(graph, DOWN0).sources == (Read("m0", DOWN0),)


def test_numbers_as_text_are_numbers(root):
    text = "{merge_method: slerp, base_model: base, models: [{model: m0}], parameters: {t: 1e-1}}"
    assert yaml.safe_load(text)["parameters"]["t"] == "1e-1"
    assert apply(compiled(root, text), Q0).weights == (0.9, 0.1)


# --- gradients, filters, precedence --------------------------------------------------------------------------------


def five_layers(root: Path) -> Path:
    if not (root / "deep0").exists():
        for seed in range(2):
            tiny.save(tiny.make_model(seed, num_layers=5, hidden_size=16), root / f"deep{seed}")
    return root


def test_a_gradient_is_piecewise_linear_over_the_layers_and_its_first_value_holds_elsewhere(root):
    text = "{merge_method: slerp, base_model: deep0, models: [{model: deep1}], parameters: {t: [0, 0.5, 1.5]}}"
    graph = compiled(five_layers(root), text)
    found = [apply(graph, f"model.layers.{layer}.mlp.up_proj.weight").weights[1] for layer in range(5)]
    assert found == pytest.approx([0.0, 0.25, 0.5, 1.0, 1.5])
    assert apply(graph, EMBEDDING).weights == apply(graph, NORM).weights == (1.0, 0.0)


def test_the_only_layer_of_a_slice_takes_the_last_value_of_a_gradient_as_in_mergekit(root):
    text = """
    merge_method: linear
    slices:
      - sources: [{model: deep0, layer_range: [0, 3], parameters: {weight: [1, 3]}}]
      - sources: [{model: deep1, layer_range: [4, 5], parameters: {weight: [5, 7]}}]
    """
    graph = compiled(five_layers(root), text)
    found = [apply(graph, f"model.layers.{layer}.mlp.up_proj.weight").weights for layer in range(4)]
    assert found == [(1.0,), (2.0,), (3.0,), (7.0,)]
    assert apply(graph, EMBEDDING).weights == (1.0,) and apply(graph, NORM).weights == (5.0,)


def test_booleans_in_a_gradient_step(root):
    text = "{merge_method: linear, models: [{model: deep0}], parameters: {weight: 2, normalize: [true, false]}}"
    documents = read_mergekit(text, five_layers(root))
    assert documents[0].parameters["normalize"][0].values == (True, False)


def test_the_first_filter_that_matches_wins_and_an_entry_without_filter_is_the_default(root):
    text = """
    merge_method: slerp
    base_model: m0
    models: [{model: m1}]
    parameters:
      t:
        - {filter: self_attn, value: [0.0, 0.4]}
        - {filter: q_proj, value: 0.9}
        - {filter: mlp, value: 0.7}
        - value: 0.1
        - {filter: norm, value: 0.8}
    """
    graph = compiled(root, text)
    assert [apply(graph, name).weights[1] for name in (Q0, Q1, DOWN0, NORM)] == [0.0, 0.4, 0.7, 0.1]


def test_a_tensor_without_a_matching_filter_falls_to_the_next_level_or_is_an_error(root):
    source = "parameters: {weight: {filter: mlp, value: 0.3}}"
    text = f"merge_method: linear\nmodels: [{{model: m0, {source}}}, {{model: m1, parameters: {{weight: 1}}}}]\n"
    graph = compiled(root, text + "parameters: {weight: 0.6}")
    assert apply(graph, DOWN0).weights == (0.3, 1.0) and apply(graph, Q0).weights == (0.6, 1.0)
    (problem,) = compile_error(root, text)
    assert problem.startswith("weight: no value for some tensors") and EMBEDDING in problem


def test_source_goes_before_slice_goes_before_document(root):
    text = """
    merge_method: linear
    parameters: {weight: 1}
    slices:
      - sources:
          - {model: m0, layer_range: [0, 1], parameters: {weight: 3}}
          - {model: m1, layer_range: [0, 1]}
        parameters: {weight: 2}
      - sources:
          - {model: m0, layer_range: [1, 2], parameters: {weight: 4}}
          - {model: m1, layer_range: [1, 2]}
    """
    graph = compiled(root, text)
    assert apply(graph, Q0).weights == (3.0, 2.0)
    assert apply(graph, Q1).weights == (4.0, 1.0)


# --- slices --------------------------------------------------------------------------------------------------------

STACK = """
merge_method: passthrough
slices:
  - sources: [{model: m0, layer_range: [0, 2]}]
  - sources: [{model: m1, layer_range: [1, 2]}]
  - sources: [{model: m2, layer_range: [0, 1]}]
"""


def test_slices_stack_layers(root):
    graph = compiled(root, STACK)
    suffix = "self_attn.q_proj.weight"
    assert {o.name: o.node for o in graph.outputs if o.name.endswith(suffix)} == {
        Q0: Read("m0", Q0),
        Q1: Read("m0", Q1),
        f"model.layers.2.{suffix}": Read("m1", Q1),
        f"model.layers.3.{suffix}": Read("m2", Q0),
    }
    assert node(graph, EMBEDDING) == Read("m0", EMBEDDING)
    assert node(graph, NORM) == Read("m2", NORM)
    assert graph.config["num_hidden_layers"] == 4
    assert graph.members == ("m0", "m1", "m2")


def test_models_of_different_depth_may_be_stacked(root, tmp_path):
    for index, depth in enumerate((3, 1)):
        tiny.save(tiny.make_model(index, num_layers=depth, hidden_size=16), tmp_path / f"m{index}")
    text = """
    merge_method: passthrough
    slices: [{sources: [{model: m0, layer_range: [1, 3]}]}, {sources: [{model: m1, layer_range: [0, 1]}]}]
    """
    assert compiled(tmp_path, text).config["num_hidden_layers"] == 3
    whole = "{merge_method: linear, parameters: {weight: 1}, models: [{model: m0}, {model: m1}]}"
    assert compile_error(tmp_path, whole) == ["models: all models must give the same number of layers; 'm0' 3, 'm1' 1"]


def test_a_slice_reads_the_base_at_the_layers_given_for_it(root):
    text = """
    merge_method: task_arithmetic
    base_model: base
    parameters: {weight: 1}
    slices:
      - sources: [{model: base, layer_range: [0, 1]}, {model: m0, layer_range: [1, 2]}]
    """
    found = apply(compiled(root, text), Q0)
    assert found.base == Read("base", Q0) and found.sources == (Read("m0", Q1),)


# --- names, documents, dtypes, tokenizers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a/b", ("a/b", None, None, None)),
        ("a@main", ("a", "main", None, None)),
        ("a+lora", ("a", None, "lora", None)),
        ("a@r1+l@r2", ("a", "r1", "l", "r2")),
    ],
)
def test_model_names(text, parts):
    name = parse_model_name(text, HERE)
    assert (name.model, name.revision, name.adapter, name.adapter_revision) == parts
    assert name.id == text and name.path == HERE / parts[0]
    assert name.adapter_path == (HERE / parts[2] if parts[2] else None)


def test_an_absolute_path_stays_and_the_long_form_takes_signs():
    (document,) = read_mergekit(
        "{merge_method: passthrough, models: [{model: {model: {path: /x/a+b, revision: r}, lora: l}}]}", HERE
    )
    assert document.models[0].model == ModelName("/x/a+b", "r", "l")
    assert document.models[0].model.path == Path("/x/a+b")


CHAIN = """
name: inner
merge_method: linear
dtype: bfloat16
models: [{model: m0, parameters: {weight: 1}}, {model: m1, parameters: {weight: 2}}]
---
merge_method: slerp
base_model: inner
models: [{model: m2}]
parameters: {t: 0.4}
dtype: bfloat16
"""


@pytest.mark.parametrize("reverse", [False, True])
def test_a_document_that_is_named_is_inlined(root, reverse):
    text = "---\n".join(reversed(CHAIN.split("---\n"))) if reverse else CHAIN
    graph = compiled(root, text)
    found = apply(graph, Q0)
    inner = found.sources[0]
    assert isinstance(inner, Apply) and (found.operator, inner.operator) == ("slerp", "linear")
    assert found.weights == (0.6, 0.4) and inner.weights == (1.0, 2.0) and inner.round_to is None
    assert (inner.step, found.step) == (1, 2)
    assert {(o.dtype, o.input_dtype) for o in graph.outputs} == {("BF16", "BF16")}
    assert graph.members == ("m0", "m1", "m2")
    rounded = apply(compiled(root, text, round_intermediates=True), Q0)
    assert rounded.round_to is None and isinstance(rounded.sources[0], Apply)
    assert rounded.sources[0].round_to == "BF16"


def test_out_chooses_another_document(root):
    assert apply(compiled(root, CHAIN, out="inner"), Q0).operator == "linear"
    with pytest.raises(PlanError, match="unknown document 'iner' .did you mean 'inner'"):
        compiled(root, CHAIN, out="iner")


def test_documents_that_cast_differently_cannot_be_one_merge_unless_the_casts_are_exact(root):
    problems = compile_error(root, CHAIN.replace("dtype: bfloat16", "dtype: float16", 1))
    assert problems == [
        "dtype: the documents cast their inputs to different dtypes, which one merge cannot; use one dtype"
    ]
    graph = compiled(root, CHAIN.replace("dtype: bfloat16", "dtype: float32"))
    assert {(o.dtype, o.input_dtype) for o in graph.outputs} == {("F32", None)}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", ("F32", None)),
        ("dtype: bfloat16", ("BF16", "BF16")),
        ("out_dtype: float16", ("F16", None)),
        ("dtype: float32", ("F32", None)),
        ("{dtype: float64, out_dtype: float16}", ("F16", "F64")),
        ("{dtype: bfloat16, out_dtype: float64}", ("F64", "BF16")),
    ],
)
def test_dtypes(root, extra, expected):
    value = yaml.safe_load(LINEAR) | (yaml.safe_load(extra) or {})
    graph = compiled(root, yaml.safe_dump(value))
    assert {(o.dtype, o.input_dtype) for o in graph.outputs} == {expected}
    name = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}[expected[0]]
    assert {graph.config.get("dtype", name), graph.config.get("torch_dtype", name)} == {name}


def test_without_dtypes_the_inputs_are_promoted_per_tensor(root, tmp_path):
    for index, dtype in enumerate((torch.float16, torch.bfloat16)):
        path = copied(root, tmp_path / f"m{index}")
        rewrite(path, lambda ts, dtype=dtype: {k: t.to(dtype) if k != NORM else t.half() for k, t in ts.items()})
    graph = compiled(tmp_path, LINEAR)
    assert {o.name: o.dtype for o in graph.outputs if o.name in (NORM, Q0)} == {NORM: "F16", Q0: "F32"}


def test_tokenizer_source(root):
    text = "{merge_method: slerp, base_model: base, models: [{model: m0}], parameters: {t: 0.5}, tokenizer_source: X}"
    assert compiled(root, text.replace("X", "base")).tokenizer_from == "base"
    graph = compiled(root, text.replace("X", "m2"))
    assert graph.tokenizer_from == "m2" and "m2" in graph.checkpoints and "m2" not in graph.members
    assert read_error(text.replace("X", "union"))[0].startswith("tokenizer_source: union is not supported")


def test_tied_embeddings_give_no_head_unless_every_model_has_one(root, tmp_path):
    assert HEAD not in [o.name for o in compiled(root, LINEAR).outputs]
    for name in ("m0", "m1"):
        rewrite(copied(root, tmp_path / name, name), lambda ts: ts | {HEAD: ts[EMBEDDING].clone()})
    assert HEAD in [o.name for o in compiled(tmp_path, LINEAR).outputs]
    rewrite(tmp_path / "m1", lambda ts: {k: t for k, t in ts.items() if k != HEAD})
    assert HEAD not in [o.name for o in compiled(tmp_path, LINEAR).outputs]


def test_the_text_kept_with_the_graph_has_absolute_paths_and_compiles_to_the_same(root, tmp_path):
    graph = compiled(root, STACK)
    assert graph.mergekit is not None and str(root / "m1") in graph.mergekit
    again = compile_mergekit(
        read_mergekit(graph.mergekit, tmp_path), lambda name: CheckpointRef(name.path.name, name.path)
    )
    assert [o.node for o in again.outputs] == [o.node for o in graph.outputs]


# --- problems ------------------------------------------------------------------------------------------------------


def test_every_problem_of_a_file_is_reported_at_its_place():
    problems = read_error("""
    merge_metod: linear
    merge_method: tise
    dtype: bfloat
    models: [{model: a, parameters: {weigth: 1}}, {modle: b}, {model: a+b+c}, {model: d@}]
    slices: [{sources: [{model: a, layer_range: [3, 1]}]}]
    tokenizer_source: union
    """)
    assert [problem.split(": ")[0] for problem in problems] == [
        "merge_metod", "merge_method", "exactly one of models and slices is needed, both given",
        "models[0].parameters.weigth", "models[1].modle", "models[1].model", "models[2].model", "models[3].model",
        "slices[0].sources[0].layer_range", "dtype", "tokenizer_source",
    ]  # fmt: skip
    assert "unknown key; did you mean 'merge_method'?" in problems[0]
    assert "did you mean 'ties'?" in problems[1]
    assert "unknown key; did you mean 'weight'?" in problems[3]
    assert "[3, 1] is empty" in problems[8]


def test_parameters_are_checked_for_the_method():
    problems = read_error("""
    merge_method: ties
    base_model: base
    models:
      - {model: a, parameters: {weight: high, normalize: true}}
      - {model: b, parameters: {density: [0.5, 1.5]}}
      - {model: b, parameters: {weight: .nan, gamma: 0.1}}
    parameters: {rescale: maybe, lambda: [{filter: 3, value: 1}, {filter: x}]}
    """)
    assert problems == [
        "models[0].parameters.weight: a finite number is needed, got 'high'",
        "models[0].parameters.normalize: is one value for all models; "
        "it stands under the parameters of the slice or file",
        "models[1].parameters.density: 1.5 is outside (0, 1]",
        "models[2].parameters.gamma: unknown key; "
        "known: density, int8_mask, lambda, normalize, rescale, trim_scope, weight",
        "models[2].parameters.weight: a finite number is needed, got nan",
        "models[2].model: 'b' is given twice",
        "parameters.rescale: true or false is needed, got 'maybe'",
        "parameters.lambda[0].filter: part of a tensor's name is needed, got 3",
        "parameters.lambda[1]: 'value' is missing",
        "models[1].parameters.weight: is missing; ties needs it",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "{merge_method: ties, models: [{model: a}], parameters: {weight: 1}}",
            "base_model: is missing; ties needs it",
        ),
        ("{merge_method: slerp, base_model: a, models: [{model: b}]}", "parameters.t: is missing; slerp needs it"),
        (
            "{merge_method: slerp, base_model: a, models: [{model: b}, {model: c}], parameters: {t: 1}}",
            "models: slerp takes at most 2 models, got 3",
        ),
        (
            "{merge_method: model_stock, base_model: a, models: [{model: a}, {model: b}]}",
            "models: model_stock needs at least 2 models besides the base, got 1",
        ),
        (
            "{merge_method: passthrough, base_model: a, models: [{model: b}]}",
            "models: passthrough takes at most 1 models, got 2 (a base_model that is not listed is added)",
        ),
        (
            "{merge_method: ties, base_model: a, parameters: {weight: 1}, "
            "slices: [{sources: [{model: b, layer_range: [0, 1]}]}]}",
            "slices[0]: base_model 'a' must be among the sources of the slice, with its layers",
        ),
        (
            "{merge_method: passthrough, tokenizer: {source: base, tokens: {}}, models: [{model: b}]}",
            "tokenizer: only 'source' is supported, got tokens",
        ),
        (
            "{merge_method: passthrough, tokenizer_source: base, models: [{model: b}]}",
            "tokenizer_source: 'base' needs base_model",
        ),
        ("{merge_method: passthrough, models: [], modules: {}}", "modules: 'modules' is not supported;"),
        (
            "{merge_method: sce, base_model: a, models: [{model: b}]}",
            "models: sce needs at least 2 models besides the base, got 1",
        ),
        ("3", "a mapping is needed, got 3"),
    ],
)
def test_single_problems(text, problem):
    assert any(line.startswith(problem) for line in read_error(text)), read_error(text)


@pytest.mark.parametrize("text", ["", "---\n---\n", "a: [", "a: 2001-13-45", "&a [*a]", "? [1]\n: 2", "a: 1\na: 2"])
def test_what_is_no_document_is_a_plan_error(text):
    with pytest.raises(PlanError):
        read_mergekit(text, HERE)


def test_problems_between_documents():
    one = "merge_method: passthrough\nmodels: [{model: %s}]\n"
    assert read_error("---\n".join([one % "a", one % "b"])) == [
        "documents[0], documents[1]: only one document may be without 'name', the final merge"
    ]
    named = "name: %s\n" + one
    assert read_error("---\n".join([named % ("x", "a"), named % ("x", "b")])) == [
        "documents[1].name: 'x' is taken by another document"
    ]
    assert read_error("---\n".join([named % ("x", "y"), named % ("y", "x")])) == [
        "documents refer to each other in a circle: y -> x -> y"
    ]
    assert read_error("---\n".join([named % ("x", "a"), one % "b"])) == [
        "documents[0]: 'x' is not used by the final merge; write it to a file of its own"
    ]
    assert read_error("---\n".join([named % ("x", "a"), one % "x+lora"])) == [
        "'x+lora': the result of a document takes no revision and no adapter"
    ]


def test_everything_headers_show_is_reported_at_once(root, tmp_path):
    copied(root, tmp_path / "m0")
    rewrite(copied(root, tmp_path / "m1", "m1", vocab_size=99), lambda ts: {
        k: (t[:10].clone() if k == EMBEDDING else t) for k, t in ts.items() if k not in (Q0, Q1)
    })  # fmt: skip
    rewrite(copied(root, tmp_path / "m2", "m2", hidden_size=65), lambda ts: ts | {NORM: ts[NORM].to(torch.int8)})
    tiny.write_tokenizer(tmp_path / "m2", "xyz")
    problems = compile_error(tmp_path, """
    merge_method: linear
    parameters: {weight: 1}
    models: [{model: m0}, {model: m1}, {model: m2}, {model: absent}]
    """)  # fmt: skip
    text = "\n".join(problems)
    assert "model 'absent': " in text
    assert "checkpoint 'm2' is quantised (tensors of dtype I8); dequantise it first" in text
    assert "vocab_size: 'm1' has 99, 'm0' has 52; resize or choose models with the same vocabulary" in text
    assert "hidden_size: 'm2' has 65, 'm0' has 64" in text
    assert "tokenizer: 'm2' and 'm0' have different vocabularies" in text
    problems = compile_error(
        tmp_path, "{merge_method: linear, parameters: {weight: 1}, models: [{model: m0}, {model: m1}]}"
    )
    assert f"tensors: 'm1' lacks some that other models have: {Q0}, {Q1}" in problems
    assert f"shape: [10, 64] in 'm1', [52, 64] in 'm0': {EMBEDDING}" in problems


def test_layers_that_a_model_does_not_have_are_reported(root):
    problems = compile_error(root, STACK.replace("[1, 2]", "[1, 3]").replace("[0, 1]", "[5, 7]"))
    assert problems == [
        "slices[1].sources[0].layer_range: [1, 3] goes beyond the 2 layers of 'm1'",
        "slices[2].sources[0].layer_range: [5, 7] goes beyond the 2 layers of 'm2'",
    ]


def test_layer_counts_of_one_slice_must_agree(root):
    text = """
    {merge_method: linear, parameters: {weight: 1},
     slices: [{sources: [{model: m0, layer_range: [0, 1]}, {model: m1, layer_range: [0, 2]}]}]}
    """
    assert compile_error(root, text) == ["slices[0]: all models must give the same number of layers; 'm0' 1, 'm1' 2"]


def test_integer_tensors_keep_their_dtype_and_must_be_alike(root, tmp_path):
    for name in ("m0", "m1"):
        rewrite(copied(root, tmp_path / name, name), lambda ts: ts | {"model.ids": torch.arange(3)})
    output = next(o for o in compiled(tmp_path, LINEAR + "dtype: bfloat16").outputs if o.name == "model.ids")
    assert (output.dtype, output.shape) == ("I64", (3,))
    rewrite(tmp_path / "m1", lambda ts: ts | {"model.ids": torch.arange(3).float()})
    assert compile_error(tmp_path, LINEAR) == [
        "dtype: integer tensors must be alike; F32 in 'm1', I64 in 'm0': model.ids"
    ]


def test_what_our_operator_lacks_is_refused_where_it_would_matter(root, monkeypatch):
    spec = OPERATOR_SPECS["multislerp"]
    kept = {name: one for name, one in spec.parameters.items() if name != "normalize"}
    monkeypatch.setitem(OPERATOR_SPECS, "multislerp", replace(spec, parameters=kept))
    text = (
        "{merge_method: multislerp, models: [{model: m0}, {model: m1}], parameters: {weight: 1, normalize_weights: X}}"
    )
    assert apply(compiled(root, text.replace("X", "true")), Q0).params == (("eps", 1e-8),)
    (problem,) = compile_error(root, text.replace("X", "false"))
    assert problem.startswith("normalize_weights: False is not supported by 'multislerp' here")


def test_della_needs_room_for_epsilon(root):
    text = """
    {merge_method: della_linear, base_model: base, models: [{model: m0}],
     parameters: {weight: 1, density: 0.9, epsilon: 0.2}}
    """
    assert compile_error(root, text)[0].startswith("epsilon: density 0.9 +- epsilon 0.2 leaves (0, 1)")


# --- fuzz ----------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from([
    "name", "merge_method", "base_model", "models", "slices", "sources", "model", "layer_range", "parameters", "weight",
    "t", "density", "normalize", "filter", "value", "dtype", "tokenizer", "tokenizer_source", "source", "lora", "path",
    "linear", "slerp", "ties", "passthrough", "m0", "m1", "a@b", "a+b", "bfloat16", "union", "base", "x", "",
])  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | WORDS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.integers(), inner, max_size=4),
    max_leaves=12,
)
NUMBERS = st.floats(-1, 2) | st.lists(st.floats(0, 1), max_size=3) | VALUES
SETTINGS = NUMBERS | st.lists(st.fixed_dictionaries({"value": NUMBERS}, optional={"filter": WORDS}), max_size=2)
PARAMETERS = st.dictionaries(
    st.sampled_from(["weight", "t", "density", "lambda", "normalize", "scale"]), SETTINGS, max_size=3
)
MODELS = st.sampled_from(["m0", "m1", "m2", "base", "absent", "other"])
RANGE = st.tuples(st.integers(0, 1), st.integers(1, 3)).map(list)
SOURCES = st.lists(
    st.fixed_dictionaries({"model": MODELS}, optional={"parameters": PARAMETERS, "layer_range": RANGE}), max_size=3
)
DOCUMENTS = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(list(METHODS))},
    optional={
        "models": SOURCES,
        "slices": st.lists(
            st.fixed_dictionaries({"sources": SOURCES}, optional={"parameters": PARAMETERS}), max_size=2
        ),
        "base_model": MODELS,
        "parameters": PARAMETERS,
        "name": st.sampled_from(["other", "m0"]),
        "dtype": st.sampled_from(["bfloat16", "float32", "half"]),
    },
)


@given(st.lists(VALUES | DOCUMENTS, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@example([{"merge_method": "linear", "models": [{"model": "m0", "parameters": {"weight": []}}]}])
def test_whatever_yaml_holds_only_documented_errors_are_raised(root, values):
    try:
        documents = read_mergekit(yaml.safe_dump_all(values), root)
    except PlanError:
        return
    try:
        compile_mergekit(documents, locate, round_intermediates=True)
    except PlanError:
        return


@given(DOCUMENTS)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_document_that_can_be_read_is_written_as_it_was(values):
    from simmerge_ray.merging.mergekit import documents_text

    try:
        documents = read_mergekit(yaml.safe_dump(values), HERE)
    except PlanError:
        return
    assert read_mergekit(documents_text(documents), HERE) == documents


# --- round trip ----------------------------------------------------------------------------------------------------


def resolved(root: Path, *steps: MergeStep, **options) -> ResolvedPlan:
    plan = MergePlan(steps, **options)
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


def test_an_error_is_an_input_error():
    with pytest.raises(InputError):
        read_mergekit("", HERE)
