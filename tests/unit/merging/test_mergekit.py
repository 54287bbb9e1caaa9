"""mergekit files compiled to numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.graph import Apply, Read
from simmerge_ray.merging.mergekit import ModelName, compile_mergekit, read_mergekit
from simmerge_ray.merging.mergekit.documents import parse_model_name
from tests import tiny
from tests.unit.merging.mergekit_files import (
    DOWN0,
    EMBEDDING,
    HEAD,
    HERE,
    LINEAR,
    NORM,
    Q0,
    Q1,
    STACK,
    apply,
    compile_error,
    compiled,
    copied,
    node,
    read_error,
    rewrite,
)

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
    graph = compiled(root, text.replace("X", "union"))  # of equal tokenizers: nothing is laid out
    assert graph.tokenizer_from == "base" and graph.tokenizer_files is None and not graph.layouts


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
