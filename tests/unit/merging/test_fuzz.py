"""Whatever the shape, dtypes, operator and parameters: a tensor of that shape and dtype, or a documented error."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from simmerge_ray.base.errors import InputError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.engine.compute import Computer
from simmerge_ray.merging.engine.global_trims import resolve_global_trims
from simmerge_ray.merging.engine.sources import NUMPY_DTYPES, TensorSource
from simmerge_ray.merging.graph import Apply, MergeGraph, Node, OutputTensor, Read, promoted
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0, 1e-30, -1e30, float("nan"), float("inf")])


@st.composite
def nodes(draw, depth: int = 2) -> Node:
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return Read(draw(st.sampled_from("abc")), "x")
    operator = draw(st.sampled_from(sorted(name for name, spec in OPERATOR_SPECS.items() if not spec.needs_grams)))
    spec = OPERATOR_SPECS[operator]
    count = draw(st.integers(1, 3))
    params = {}
    for name, parameter in spec.parameters.items():
        if draw(st.booleans()):
            known = {"bool": [True, False], "int": [1, 3], "choice": list(parameter.choices)}
            values = known.get(parameter.kind, [parameter.default, 0.2, 0.9, 1.0])
            params[name] = draw(st.sampled_from(values))
    weights = tuple(draw(st.sampled_from([0.0, 0.5, 1.0, -1.0, 0.3])) for _ in range(count))
    base = draw(nodes(depth=0)) if spec.uses_base and draw(st.integers(0, 4)) else None
    sources = tuple(draw(nodes(depth=depth - 1)) for _ in range(count))
    rounding = draw(st.sampled_from([None, "BF16", "F16", "F32"]))
    return Apply(operator, sources, weights, tuple(sorted(params.items())), base, step=1, round_to=rounding)


@pytest.mark.slow
@settings(max_examples=250)
@given(
    node=nodes(),
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    dtypes=st.tuples(*[st.sampled_from(["F16", "BF16", "F32", "F32", "F64"])] * 3) | st.just(("I64",) * 3),
    out=st.sampled_from([None, "BF16", "F16", "F32", "F64"]),
    cast=st.sampled_from([None, None, "BF16", "F32", "F64"]),
    values=st.lists(VALUES, min_size=1, max_size=9),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_tensor_or_a_documented_error(node, shape, dtypes, out, cast, values):
    count = int(np.prod(shape))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", 13)
        patch.setattr(kernels, "PAIR_BLOCK", 17)
        refs = {}
        for number, (key, dtype) in enumerate(zip("abc", dtypes, strict=True)):
            kept = [v for v in values if dtype != "I64" or np.isfinite(v)] or [1.0]
            filled = torch.tensor([kept[(i * 7 + number) % len(kept)] for i in range(count)], dtype=torch.float64)
            if dtype == "I64":
                filled = filled.clamp(-5, 5)
            (Path(name) / key).mkdir()
            save_file({"x": filled.to(TORCH[dtype]).reshape(shape)}, Path(name) / key / "model.safetensors")
            refs[key] = CheckpointRef(key, Path(name) / key)
        dtype = "I64" if dtypes[0] == "I64" else out or promoted(list(dtypes))
        output = OutputTensor("x", shape, dtype, node, None if dtype == "I64" else cast)
        graph = MergeGraph((output,), refs, {}, "a", ("a",), "fuzz")
        sources = {key: TensorSource(ref) for key, ref in refs.items()}
        found = np.empty(count, dtype=NUMPY_DTYPES[dtype])

        def keep(start: int, block: np.ndarray) -> None:
            assert block.dtype == found.dtype
            found[start : start + block.size] = block

        try:
            graph = resolve_global_trims(graph, num_threads=1)
            report = Computer(graph, sources).compute(graph.outputs[0], keep)
        except InputError as error:
            assert str(error)
        else:
            if dtype in ("F16", "F32", "F64") and not np.isfinite(found).all():
                assert report.not_finite
        finally:
            for source in sources.values():
                source.close()
