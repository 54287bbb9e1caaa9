"""Merges as mergekit users write them, each with what is expected of it. Texts are our own.

`made`: without a word; `warned`: made, after what has no effect was named; `refused`: because of `says`, a
decision of docs/mergekit.md. `truth` gives a tensor of the output from those of the checkpoints in float64, by
`tests.reference`. Where there is none the case is compared with mergekit alone, by `benchmarks.merge.peer`.

Checkpoints of a family: `base` and `a`, `b`, `c` near it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from simmerge_ray.plans.operators.gradients import split_layer
from tests import reference


class Tensors(Protocol):
    """The tensor that is made, of a checkpoint: `t["a"]`; or another of it: `t.of("a", name)`. Float64."""

    def __getitem__(self, checkpoint: str) -> np.ndarray: ...

    def of(self, checkpoint: str, name: str) -> np.ndarray: ...


Truth = Callable[[str, Tensors], np.ndarray]


@dataclass(frozen=True)
class Case:
    """One file. peer: `equal`, or `other` where mergekit makes other numbers by intent, or `fails`, with `why`."""

    name: str
    text: str
    truth: Truth | None = None
    expect: Literal["made", "warned", "refused"] = "made"
    says: str = ""
    family: str = "llama"
    peer: Literal["equal", "other", "fails"] = "equal"
    why: str = ""


def op(operator: str, sources: Sequence[str], weights: Any = None, base: str | None = "base", **params: Any) -> Truth:
    """The reference of an operator on single-letter checkpoints; weights by source or by (name, layer)."""

    def truth(name: str, tensors: Tensors) -> np.ndarray:
        layer = (split_layer(name) or ("", 0))[1]
        values = [tensors[source] for source in sources]
        chosen = weights(name, layer) if callable(weights) else weights or [1.0] * len(values)
        found = {key: value(name, layer) if callable(value) else value for key, value in params.items()}
        origin = tensors[base] if base else None
        return np.asarray(reference.OPERATORS[operator](origin, values, chosen, **found))

    return truth


def weighted(**weights: object) -> str:
    """A `models` list with weights."""
    return "models:\n" + "".join(f"  - {{model: {k}, parameters: {{weight: {v}}}}}\n" for k, v in weights.items())


def each(text: str, *names: str) -> str:
    """A `models` list with the same parameters for every model."""
    return "models:\n" + "".join(f"  - {{model: {name}, parameters: {{{text}}}}}\n" for name in names)


PLAIN = "models: [{model: a}, {model: b}]\n"
W = [0.6, 0.4]
AB = weighted(a=0.6, b=0.4)
BASE = "base_model: base\n"


def linear_at(left: Callable[[str, int], float]) -> Truth:
    return op("linear", "ab", lambda name, layer: [left(name, layer), 1 - left(name, layer)])


def stacked(*layers: str) -> Truth:
    """Each layer is the mean of those in a word like `a0b1`; embeddings are of the first word, the rest of the last."""

    def truth(name: str, tensors: Tensors) -> np.ndarray:
        prefix, layer, suffix = split_layer(name) or (None, 0 if "embed" in name else len(layers) - 1, "")
        pairs = [(layers[layer][i], layers[layer][i + 1]) for i in range(0, len(layers[layer]), 2)]
        found = [tensors[one] if prefix is None else tensors.of(one, f"{prefix}{own}{suffix}") for one, own in pairs]
        return np.asarray(sum(found) / len(found))

    return truth


LINEAR = (
    Case("linear", f"merge_method: linear\n{AB}", op("linear", "ab", W)),
    Case(
        "linear, three models", "merge_method: linear\n" + weighted(a=0.5, b=1, c=2), op("linear", "abc", [0.5, 1, 2])
    ),
    Case("linear, one weight for all", f"merge_method: linear\n{PLAIN}parameters: {{weight: 1}}", op("linear", "ab")),
    Case(
        "linear, not normalized",
        f"merge_method: linear\n{AB}parameters: {{normalize: false}}",
        op("linear", "ab", W, normalize=False),
    ),
    Case(
        "linear, a negative weight", "merge_method: linear\n" + weighted(a=1.5, b=-0.5), op("linear", "ab", [1.5, -0.5])
    ),
    Case(
        "linear, weights as text",
        "merge_method: linear\n" + weighted(a="'3e-1'", b="'0.7'"),
        op("linear", "ab", [0.3, 0.7]),
    ),
    Case(
        "linear, base listed with a weight",
        "merge_method: linear\n" + weighted(base=0.2, a=0.8) + BASE,
        lambda name, t: 0.2 * t["base"] + 0.8 * t["a"],
    ),
    Case(
        "linear, gradient over the layers",
        "merge_method: linear\n" + weighted(a="[0, 1]", b="[1, 0]"),
        linear_at(lambda name, layer: float(layer)),
    ),
    Case(
        "linear, filters",
        "merge_method: linear\n"
        + each("weight: [{filter: self_attn, value: 0.9}, {filter: mlp, value: 0.2}, {value: 1}]", "a")
        + "  - {model: b, parameters: {weight: 1}}\n",
        op("linear", "ab", lambda name, _: [0.9 if "self_attn" in name else 0.2 if "mlp" in name else 1.0, 1.0]),
    ),
    Case(
        "linear, filter with a gradient",
        "merge_method: linear\n"
        + each("weight: [{filter: mlp, value: [0.1, 0.9]}, {value: 0.5}]", "a")
        + "  - {model: b, parameters: {weight: 0.5}}\n",
        op("linear", "ab", lambda name, layer: [0.1 + 0.8 * layer if "mlp" in name else 0.5, 0.5]),
    ),
    Case("linear, dtype float32", f"merge_method: linear\n{AB}dtype: float32", op("linear", "ab", W)),
    Case(
        "linear, out_dtype bfloat16",
        f"merge_method: linear\n{AB}dtype: float32\nout_dtype: bfloat16",
        op("linear", "ab", W),
    ),
    Case("linear, out_dtype float16", f"merge_method: linear\n{AB}out_dtype: float16", op("linear", "ab", W)),
    Case(
        "linear, a merge in a merge",
        f"name: inner\nmerge_method: linear\n{AB}---\nmerge_method: linear\n" + weighted(inner=0.5, c=0.5),
        lambda name, t: 0.5 * (0.6 * t["a"] + 0.4 * t["b"]) + 0.5 * t["c"],
    ),
)

SPHERES = (
    Case("slerp", f"merge_method: slerp\nbase_model: a\n{PLAIN}parameters: {{t: 0.3}}", op("slerp", "ab", [0.7, 0.3])),
    Case(
        "slerp, base not listed",
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.3}",
        op("slerp", "ab", [0.7, 0.3]),
    ),
    Case(
        "slerp, base listed second",
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: a}]\nparameters: {t: 0.3}",
        op("slerp", "ab", [0.7, 0.3]),
    ),
    Case(
        "slerp, gradient and filters",
        f"merge_method: slerp\nbase_model: a\n{PLAIN}parameters:\n  t:\n  - {{filter: self_attn, value: [0, 0.5]}}\n"
        "  - {filter: mlp, value: [1, 0.2]}\n  - value: 0.5",
        op(
            "slerp",
            "ab",
            lambda name, layer: (lambda t: [1 - t, t])(
                0.5 * layer if "self_attn" in name else 1 - 0.8 * layer if "mlp" in name else 0.5
            ),
        ),
    ),
    Case(
        "slerp, slices",
        "merge_method: slerp\nbase_model: a\nslices:\n- sources: [{model: a, layer_range: [0, 2]}, "
        "{model: b, layer_range: [0, 2]}]\nparameters: {t: [0.2, 0.8]}",
        op("slerp", "ab", lambda name, layer: [0.8 - 0.6 * layer, 0.2 + 0.6 * layer]),
    ),
    Case("nuslerp", f"merge_method: nuslerp\n{AB}", op("nuslerp", "ab", W, base=None)),
    Case("nuslerp, base", f"merge_method: nuslerp\n{BASE}{AB}", op("nuslerp", "ab", W)),
    Case(
        "nuslerp, slices of rows",
        f"merge_method: nuslerp\n{AB}parameters: {{nuslerp_flatten: false}}",
        op("nuslerp", "ab", W, base=None, flatten=False),
    ),
    Case(
        "nuslerp, slices of columns",
        f"merge_method: nuslerp\n{AB}parameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}",
        op("nuslerp", "ab", W, base=None, flatten=False, row_wise=True),
    ),
    Case(
        "nuslerp, weights that cancel", "merge_method: nuslerp\n" + weighted(a=1, b=-1), op("nuslerp", "ab", base=None)
    ),
    Case(
        "multislerp",
        "merge_method: multislerp\n" + weighted(a=0.5, b=0.3, c=0.2),
        op("multislerp", "abc", [0.5, 0.3, 0.2], base=None),
    ),
    Case("multislerp, base", f"merge_method: multislerp\n{BASE}" + weighted(a=1, b=3), op("multislerp", "ab", [1, 3])),
    Case(
        "multislerp, weights as they are",
        f"merge_method: multislerp\n{AB}parameters: {{normalize_weights: false}}",
        op("multislerp", "ab", W, base=None, normalize=False),
    ),
    Case("karcher", "merge_method: karcher\nmodels: [{model: a}, {model: b}, {model: c}]", op("karcher", "abc")),
    Case(
        "karcher, one step",
        f"merge_method: karcher\n{PLAIN}parameters: {{max_iter: 1, tol: 1e-9}}",
        op("karcher", "ab", max_iter=1, tol=1e-9),
    ),
)


def sparse(method: str, more: str = "", params: str = "", sources: tuple[str, ...] = ("a", "b")) -> str:
    each_ = "".join(
        f"  - {{model: {n}, parameters: {{weight: {w}{more}}}}}\n"
        for n, w in zip(sources, (0.6, 0.4, 0.5), strict=False)
    )
    return f"merge_method: {method}\n{BASE}models:\n{each_}parameters: {{{params}}}\n"


VECTORS = (
    Case("task_arithmetic", sparse("task_arithmetic"), op("task_arithmetic", "ab", W)),
    Case(
        "task_arithmetic, lambda",
        sparse("task_arithmetic", params="lambda: 0.7"),
        op("task_arithmetic", "ab", W, scale=0.7),
    ),
    Case(
        "task_arithmetic, normalized",
        sparse("task_arithmetic", params="normalize: true"),
        op("task_arithmetic", "ab", W, normalize=True),
    ),
    Case(
        "task_arithmetic, away from a model",
        f"merge_method: task_arithmetic\n{BASE}" + weighted(a=1, b=-0.5),
        op("task_arithmetic", "ab", [1, -0.5]),
    ),
    Case(
        "task_arithmetic, base listed",
        f"merge_method: task_arithmetic\n{BASE}models: [{{model: base}}, {{model: a, parameters: {{weight: 0.8}}}}]",
        op("task_arithmetic", "a", [0.8]),
    ),
    Case(
        "task_arithmetic, lambda over the layers",
        sparse("task_arithmetic", params="lambda: [0.5, 1.5]"),
        op("task_arithmetic", "ab", W, scale=lambda name, layer: 0.5 + layer),
    ),
    Case("ties", sparse("ties", ", density: 0.5"), op("ties", "ab", W)),
    Case(
        "ties, three models",
        sparse("ties", ", density: 0.3", sources=("a", "b", "c")),
        op("ties", "abc", [0.6, 0.4, 0.5], density=0.3),
    ),
    Case("ties, everything kept", sparse("ties"), op("ties", "ab", W, density=1.0)),
    Case(
        "ties, not normalized, lambda",
        sparse("ties", params="density: 0.5, normalize: false, lambda: 1.3"),
        op("ties", "ab", W, normalize=False, scale=1.3),
    ),
    Case("ties, int8_mask", sparse("ties", params="density: 0.5, int8_mask: true"), op("ties", "ab", W)),
    Case(
        "ties, density over the layers",
        sparse("ties", params="density: [0.2, 1.0]"),
        op("ties", "ab", W, density=lambda name, layer: 0.2 + 0.8 * layer),
    ),
    Case(
        "ties, rescale",
        sparse("ties", params="density: 0.4, rescale: true"),
        op("ties", "ab", W, density=0.4, rescale=True),
    ),
    Case(
        "ties, rescale where a model equals the base",
        "merge_method: ties\nbase_model: a\n"
        "models: [{model: b, parameters: {weight: 1}}, {model: a-again, parameters: {weight: 1}}]\n"
        "parameters: {density: 0.4, rescale: true}",
        lambda name, t: np.asarray(reference.ties(t["a"], [t["b"], t["a"]], [1, 1], density=0.4, rescale=True)),
    ),
    Case(
        "ties, density 0 of a model",
        sparse("ties", params="density: 0.5").replace("weight: 0.4", "weight: 0.4, density: 0"),
        op("ties", "a", [0.6]),
    ),
    Case("ties, density 0", sparse("ties", params="density: 0"), lambda name, t: t["base"]),
    Case(
        "breadcrumbs",
        sparse("breadcrumbs", ", density: 0.8", "gamma: 0.1"),
        op("breadcrumbs", "ab", W, density=0.8, gamma=0.1),
    ),
    Case(
        "breadcrumbs, density 0 of a model, normalized",
        sparse("breadcrumbs", params="density: 0.8, normalize: true").replace("weight: 0.4", "weight: 0.4, density: 0"),
        lambda name, t: t["base"] + 0.6 * (reference.breadcrumbs(t["base"], [t["a"]], [1.0], density=0.8) - t["base"]),
    ),
    Case(
        "breadcrumbs, rescale",
        sparse("breadcrumbs", ", density: 0.6", "gamma: 0.05, rescale: true"),
        op("breadcrumbs", "ab", W, density=0.6, gamma=0.05, rescale=True),
    ),
    Case(
        "breadcrumbs_ties",
        sparse("breadcrumbs_ties", ", density: 0.7, gamma: 0.02"),
        op("breadcrumbs_ties", "ab", W, density=0.7, gamma=0.02),
    ),
    Case(
        "model_stock",
        f"merge_method: model_stock\n{BASE}models: [{{model: a}}, {{model: b}}, {{model: c}}]",
        op("model_stock", "abc"),
    ),
    Case(
        "model_stock, by rows",
        f"merge_method: model_stock\n{BASE}{PLAIN}parameters: {{filter_wise: true}}",
        op("model_stock", "ab", filter_wise=True),
    ),
    Case("sce", f"merge_method: sce\n{BASE}{PLAIN}", op("sce", "ab")),
    Case(
        "sce, selected",
        f"merge_method: sce\n{BASE}{PLAIN}parameters: {{select_topk: 0.3}}",
        op("sce", "ab", select_topk=0.3),
    ),
    Case("sce, one model", f"merge_method: sce\n{BASE}models: [{{model: a}}]", op("sce", "a")),
    Case(
        "sce, nothing selected",
        f"merge_method: sce\n{BASE}{PLAIN}parameters: {{select_topk: 0}}",
        lambda name, t: t["base"],
    ),
    Case("dare_linear", sparse("dare_linear", ", density: 0.5"), peer="other", why="random masks of their own"),
    Case("dare_ties, everything kept", sparse("dare_ties"), op("dare_ties", "ab", W, density=1.0, seeds=(1, 2))),
    Case("dare_ties, density 0", sparse("dare_ties", params="density: 0"), lambda name, t: t["base"]),
    Case("della", sparse("della", ", density: 0.6, epsilon: 0.1"), peer="other", why="random masks of their own"),
    Case(
        "della_linear, everything kept",
        sparse("della_linear", params="lambda: 0.9"),
        op("della_linear", "ab", W, density=1.0, scale=0.9, seeds=(1, 2)),
    ),
    Case(
        "della_linear, density 0 of a model, normalized",
        sparse("della_linear", params="normalize: true").replace("weight: 0.4", "weight: 0.4, density: 0"),
        lambda name, t: 0.4 * t["base"] + 0.6 * t["a"],
    ),
)

NEWER = (
    Case("arcee_fusion", f"merge_method: arcee_fusion\n{BASE}models: [{{model: a}}]", op("arcee_fusion", "a")),
    Case(
        "arcee_fusion, base listed",
        f"merge_method: arcee_fusion\n{BASE}models: [{{model: base}}, {{model: a}}]",
        op("arcee_fusion", "a"),
    ),
    Case(
        "arcee_fusion, slices",
        f"merge_method: arcee_fusion\n{BASE}slices:\n- sources: "
        "[{model: base, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]",
        op("arcee_fusion", "a"),
    ),
    Case(
        "nearswap",
        f"merge_method: nearswap\n{BASE}models: [{{model: a}}]\nparameters: {{t: 0.02}}",
        op("nearswap", "a", t=0.02),
    ),
    Case(
        "nearswap, t over the layers",
        f"merge_method: nearswap\n{BASE}models: [{{model: a}}]\nparameters: {{t: [0, 0.05]}}",
        op("nearswap", "a", t=lambda name, layer: 0.05 * layer),
    ),
    Case(
        "nearswap, t by filter",
        f"merge_method: nearswap\n{BASE}models: [{{model: a}}]\n"
        "parameters: {t: [{filter: mlp, value: 0.1}, {value: 0.01}]}",
        op("nearswap", "a", t=lambda name, _: 0.1 if "mlp" in name else 0.01),
    ),
    Case("ram", f"merge_method: ram\n{BASE}models: [{{model: a}}, {{model: b}}, {{model: c}}]", op("ram", "abc")),
    Case(
        "ram, epsilon", f"merge_method: ram\n{BASE}{PLAIN}parameters: {{epsilon: 0.04}}", op("ram", "ab", epsilon=0.04)
    ),
    Case("ram, one model", f"merge_method: ram\n{BASE}models: [{{model: a}}]", op("ram", "a")),
    Case(
        "ramplus_tl",
        f"merge_method: ramplus_tl\n{BASE}{PLAIN}parameters: {{epsilon: 0.04}}",
        op("ramplus_tl", "ab", epsilon=0.04),
    ),
    Case(
        "ramplus_tl, r and alpha",
        f"merge_method: ramplus_tl\n{BASE}models: [{{model: a}}, {{model: b}}, {{model: c}}]\n"
        "parameters: {epsilon: 0.05, r: 0.4, alpha: 0.9}",
        op("ramplus_tl", "abc", epsilon=0.05, r=0.4, alpha=0.9),
    ),
)

STACKS = (
    Case("passthrough", "merge_method: passthrough\nmodels: [{model: a}]", op("passthrough", "a")),
    Case(
        "passthrough, scaled",
        "merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 0.5}}]",
        op("passthrough", "a", scale=0.5),
    ),
    Case(
        "passthrough, scaled by filter",
        "merge_method: passthrough\nmodels: [{model: a, parameters: "
        "{scale: [{filter: down_proj, value: 0}, {value: 1}]}}]",
        op("passthrough", "a", scale=lambda name, _: 0.0 if "down_proj" in name else 1.0),
    ),
    Case(
        "passthrough, a stack of layers",
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
        "- sources: [{model: b, layer_range: [1, 2]}]",
        stacked("a0", "a1", "b1"),
    ),
    Case(
        "passthrough, a layer left out",
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]",
        stacked("a0"),
    ),
    Case(
        "linear, slices of two models each",
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [1, 2]}]\n"
        "- sources: [{model: b, layer_range: [0, 2]}, {model: c, layer_range: [0, 2]}]",
        stacked("a0b1", "b0c0", "b1c1"),
    ),
)

IGNORED = (
    Case(
        "weight under slerp",
        "merge_method: slerp\nbase_model: a\n" + AB + "parameters: {t: 0.3}",
        op("slerp", "ab", [0.7, 0.3]),
        "warned",
        "models[0].parameters.weight: unknown key, ignored",
    ),
    Case(
        "weight under model_stock",
        f"merge_method: model_stock\n{BASE}{AB}",
        op("model_stock", "ab"),
        "warned",
        "models[0].parameters.weight",
    ),
    Case(
        "weight under karcher",
        f"merge_method: karcher\n{AB}",
        op("karcher", "ab"),
        "warned",
        "models[1].parameters.weight",
    ),
    Case(
        "weight under sce", f"merge_method: sce\n{BASE}{AB}", op("sce", "ab"), "warned", "models[0].parameters.weight"
    ),
    Case(
        "density under linear",
        "merge_method: linear\n" + each("weight: 1, density: 0.5", "a", "b"),
        op("linear", "ab"),
        "warned",
        "models[0].parameters.density",
    ),
    Case(
        "normalize under slerp",
        f"merge_method: slerp\nbase_model: a\n{PLAIN}parameters: {{t: 0.5, normalize: true}}",
        op("slerp", "ab"),
        "warned",
        "parameters.normalize",
    ),
    Case(
        "lambda of a model",
        sparse("task_arithmetic", ", lambda: 0.5"),
        op("task_arithmetic", "ab", W),
        "warned",
        "models[0].parameters.lambda: is one value for all models, ignored here",
    ),
    Case(
        "an unknown key at the top",
        f"merge_method: linear\n{AB}description: my merge",
        op("linear", "ab", W),
        "warned",
        "description: unknown key, ignored",
    ),
    Case(
        "a key of a newer release at the top",
        f"merge_method: linear\n{AB}adapter_type: x\nrandom_seed: 3",
        op("linear", "ab", W),
        "warned",
        "random_seed: unknown key",
    ),
    Case(
        "anchors under an extra key",
        "x-common: &common {weight: 0.5, density: 0.5}\nmerge_method: ties\nbase_model: base\n"
        "models: [{model: a, parameters: *common}, {model: b, parameters: {<<: *common, weight: 1}}]",
        op("ties", "ab", [0.5, 1]),
        "warned",
        "x-common: unknown key",
    ),
    Case(
        "an unknown parameter",
        f"merge_method: linear\n{AB}parameters: {{temperature: 1}}",
        op("linear", "ab", W),
        "warned",
        "parameters.temperature",
    ),
    Case(
        "layer_range under models",
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a, layer_range: [0, 1]}, {model: b}]",
        op("linear", "ab"),
        "warned",
        "models[0].layer_range",
    ),
    Case(
        "residual_weight",
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n- residual_weight: 0.5\n"
        "  sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]",
        op("linear", "ab"),
        "warned",
        "slices[0].residual_weight",
    ),
    Case(
        "a checkpoint without a tokenizer",
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: bare}, {model: b}]",
        op("linear", "ab"),
        "warned",
        "'bare' holds no tokenizer files",
    ),
    Case(
        "a misspelt key that is needed",
        "merge_method: linear\nmodels: [{model: a, parameters: {weigth: 1}}, {model: b}]",
        expect="refused",
        says="did you mean 'weight'?",
        peer="fails",
    ),
)

FAMILIES = (
    Case(
        "two towers, the same",
        "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  encoder: {models: [{model: a}, {model: b}]}\n"
        "  decoder: {models: [{model: a}, {model: b}]}\n  shared: {models: [{model: a}, {model: b}]}",
        op("linear", "ab"),
        family="t5",
    ),
    Case(
        "two towers, each its own",
        "merge_method: linear\nparameters: {weight: 9}\nmodules:\n"
        "  encoder: {models: [{model: a, parameters: {weight: [{filter: SelfAttention, value: 3}]}}, {model: b}], "
        "parameters: {weight: 1}}\n"
        "  decoder: {models: [{model: a, parameters: {weight: 27}}, {model: b}]}\n"
        "  shared: {models: [{model: a}, {model: b}]}",
        op("linear", "ab", lambda name, _: [3, 1] if name[0] == "d" or "SelfAttention" in name else [1, 1]),
        family="t5",
    ),
    Case(
        "a tower of fewer layers",
        "merge_method: passthrough\nmodules:\n"
        "  encoder: {slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}\n"
        "  decoder: {models: [{model: a}]}\n  shared: {models: [{model: a}]}",
        family="t5",
    ),
    Case(
        "a tower left out",
        "merge_method: passthrough\nmodules:\n  encoder: {models: [{model: a}]}",
        expect="refused",
        says="modules: decoder, shared are not merged",
        family="t5",
        peer="other",
        why="it writes half a model",
    ),
    Case(
        "towers of speech",
        "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  encoder: {models: [{model: a}, {model: b}]}\n"
        "  decoder: {models: [{model: a, parameters: {weight: 3}}, {model: b}]}",
        op("linear", "ab", lambda name, _: [3, 1] if "decoder" in name else [1, 1]),
        family="whisper",
        peer="fails",
        why="its prefix of the decoder lacks a dot",
    ),
    Case(
        "sight kept, text merged",
        "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  vision_tower: {models: [{model: a}]}\n"
        "  multi_modal_projector: {models: [{model: a}]}\n  text_decoder: {models: [{model: a}, {model: b}]}",
        lambda name, t: 0.5 * t["a"] + 0.5 * t["b"] if "language_model" in name or "lm_head" in name else t["a"],
        family="gemma3-vision",
        peer="fails",
        why="its names are those of older checkpoints",
    ),
    *(
        Case(f"linear, {family}", f"merge_method: linear\n{AB}", op("linear", "ab", W), family=family)
        for family in (
            "mixtral",
            "qwen2-moe",
            "qwen3-moe",
            "bert-classifier",
            "roberta",
            "gpt2",
            "llama-tied",
            "t5",
            "gemma2",
            "phi3",
            "olmo2",
        )
    ),
    *(
        Case(
            f"linear, {family}",
            f"merge_method: linear\n{AB}",
            op("linear", "ab", W),
            family=family,
            peer="fails",
            why=why,
        )
        for family, why in (
            ("deepseek-v3", "it leaves the experts out"),
            ("llava", "it leaves the text tower out"),
            ("bert", "it asks for a pooler, which a masked model has not"),
        )
    ),
    Case("task_arithmetic, mixtral", sparse("task_arithmetic"), op("task_arithmetic", "ab", W), family="mixtral"),
    Case(
        "slerp, mixtral",
        f"merge_method: slerp\nbase_model: a\n{PLAIN}parameters: {{t: 0.3}}",
        op("slerp", "ab", [0.7, 0.3]),
        family="mixtral",
        peer="other",
        why="it merges all experts as one tensor, as transformers holds them",
    ),
    Case(
        "ties, qwen3-moe",
        sparse("ties", ", density: 0.5"),
        op("ties", "ab", W),
        family="qwen3-moe",
        peer="other",
        why="it merges all experts as one tensor, as transformers holds them",
    ),
    Case(
        "slerp over the layers, bert",
        f"merge_method: slerp\nbase_model: a\n{PLAIN}parameters: {{t: [0.2, 0.8]}}",
        op("slerp", "ab", lambda name, layer: [0.8 - 0.6 * layer, 0.2 + 0.6 * layer]),
        family="bert-classifier",
    ),
    Case(
        "nearswap, llava",
        f"merge_method: nearswap\n{BASE}models: [{{model: a}}]\nparameters: {{t: 0.02}}",
        op("nearswap", "a", t=0.02),
        family="llava",
        peer="fails",
        why="it leaves the text tower out",
    ),
    Case(
        "an architecture named anew",
        "merge_method: linear\nparameters: {weight: 1}\nmodels:\n"
        "- {model: {model: {path: a}, override_architecture: MistralForCausalLM}}\n"
        "- {model: {model: {path: b}, override_architecture: MistralForCausalLM}}",
        op("linear", "ab"),
    ),
    Case(
        "an untied head with a tied one",
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: tied}]",
        lambda name, t: 0.5 * (t["a"] + t["tied"]),
    ),
    Case(
        "layers of a tied model on an untied base",
        "merge_method: linear\nbase_model: a\nparameters: {weight: 1}\n"
        "slices: [{sources: [{model: tied, layer_range: [0, 2]}]}]",
        op("linear", ["tied"]),
        peer="fails",
        why="it leaves the head out",
    ),
    Case(
        "a tied head with an untied one",
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: tied}, {model: a}]",
        lambda name, t: 0.5 * (t["a"] + t["tied"]),
    ),
)

REFUSED = (
    Case(
        "models of several shapes",
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: wide}]",
        expect="refused",
        says="hidden_size",
        peer="fails",
    ),
    Case(
        "a negative t of nearswap",
        f"merge_method: nearswap\n{BASE}models: [{{model: a}}]\nparameters: {{t: -1}}",
        expect="refused",
        says="-1.0 is outside [0, 1000]",
        peer="equal",
        why="it gives the base",
    ),
    Case(
        "a density above 1",
        sparse("ties", ", density: 1.5"),
        expect="refused",
        says="1.5 is outside (0, 1]",
        why="it keeps all",
    ),
    Case(
        "a base alone",
        "merge_method: ties\nbase_model: base\nmodels: [{model: base}]",
        expect="refused",
        says="ties needs at least 1 models besides the base",
        why="it copies the base",
    ),
    Case(
        "weights that add up to 0",
        "merge_method: linear\n" + weighted(a=1, b=-1),
        expect="refused",
        says="weights add up to 0",
        why="it writes infinities",
    ),
    Case(
        "a passthrough of two models",
        f"merge_method: passthrough\n{PLAIN}",
        expect="refused",
        says="takes at most 1",
        peer="fails",
    ),
    Case(
        "another architecture",
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: mistral}]",
        expect="refused",
        says="model_type",
        peer="fails",
        why="only with --allow-crimes",
    ),
)

CASES: tuple[Case, ...] = (*LINEAR, *SPHERES, *VECTORS, *NEWER, *STACKS, *IGNORED, *FAMILIES, *REFUSED)
