"""mergekit files that are refused, with every problem at once; whatever a file holds, only documented errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import InputError, PlanError
from simmerge_ray.merging.mergekit import compile_mergekit, read_mergekit
from simmerge_ray.merging.mergekit.methods import METHODS
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS
from tests import tiny
from tests.unit.merging.mergekit_files import (
    EMBEDDING,
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
    locate,
    read_error,
    rewrite,
)


def test_every_problem_of_a_file_is_reported_at_its_place():
    problems = read_error("""
    merge_metod: linear
    merge_method: tise
    dtype: bfloat
    models: [{model: a, parameters: {weigth: 1}}, {modle: b}, {model: a+b+c}, {model: d@}]
    slices: [{sources: [{model: a, layer_range: [3, 1]}]}]
    tokenizer_source: 3
    """)
    assert [problem.split(": ")[0] for problem in problems] == [
        "merge_method", "exactly one of models, slices and modules is needed, models and slices given",
        "models[1].model", "models[2].model", "models[3].model",
        "slices[0].sources[0].layer_range", "dtype", "tokenizer_source",
        "merge_metod", "models[0].parameters.weigth", "models[1].modle",
    ]  # fmt: skip
    assert "unknown key, ignored; did you mean 'merge_method'?" in problems[8]
    assert "did you mean 'ties'?" in problems[0]
    assert "unknown key, ignored; did you mean 'weight'?" in problems[9]
    assert "[3, 1] is empty" in problems[5]


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
        "models[1].parameters.density: 1.5 is outside (0, 1]",
        "models[2].parameters.weight: a finite number is needed, got nan",
        "models[2].model: 'b' is given twice",
        "parameters.rescale: true or false is needed, got 'maybe'",
        "parameters.lambda[0].filter: part of a tensor's name is needed, got 3",
        "parameters.lambda[1]: 'value' is missing",
        "models[1].parameters.weight: is missing; ties needs it",
        "models[0].parameters.normalize: is one value for all models, ignored here; "
        "it stands under the parameters of the slice or file",
        "models[2].parameters.gamma: unknown key, ignored; "
        "known: density, int8_mask, lambda, normalize, rescale, trim_scope, weight",
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
            "{merge_method: passthrough, tokenizer_source: base, models: [{model: b}]}",
            "tokenizer_source: 'base' needs base_model",
        ),
        ("{merge_method: passthrough, modules: [a]}", "modules: a mapping is needed, got ['a']"),
        ("{merge_method: passthrough, modules: {encoder: {}}}", "modules.encoder: either models or slices are needed"),
        (
            "{merge_method: linear, modules: {encoder: {models: [{model: a}]}}}",
            "modules.encoder.models[0].parameters.weight: is missing; linear needs it",
        ),
        (
            "{merge_method: nearswap, base_model: a, models: [{model: b}, {model: c}], parameters: {t: 1}}",
            "models: nearswap takes at most 1 models besides the base, got 2",
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
    assert "checkpoint 'm2' is quantised (tensors of dtype I8); merge the checkpoint that it was made of" in text
    assert "vocab_size: 'm1' has 99, 'm0' has 52; for different vocabularies give tokenizer_source: union" in text
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


def test_an_error_is_an_input_error():
    with pytest.raises(InputError):
        read_mergekit("", HERE)


# --- fuzz ---------------------------------------------------------------------------------------------------

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
        "modules": st.dictionaries(
            st.sampled_from(["encoder", "default"]),
            st.fixed_dictionaries({"models": SOURCES}, optional={"parameters": PARAMETERS}),
            max_size=2,
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
