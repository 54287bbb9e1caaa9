"""Every family, merged, is what transformers makes of the same arithmetic on its state dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simmerge_ray.merging.request import read_request
from simmerge_ray.merging.write.output import WriteOptions
from tests.peer.families import FAMILIES, auto_class, inputs

TEXT = """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: 0.7}}
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_is_loaded_by_transformers_and_computes_what_the_state_dicts_do(
    family_path: Callable[[str], Path], tmp_path: Path, family: str
):
    root = family_path(family)
    (root / "merge.yaml").write_text(TEXT)
    read_request(root / "merge.yaml", tmp_path / "out").write(WriteOptions(num_threads=1))
    kind = auto_class(tmp_path / "out")
    merged, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    left, right = (kind.from_pretrained(root / name) for name in "ab")
    theirs = {name: value.clone() for name, value in right.state_dict().items()}
    for name, value in left.state_dict().items():
        theirs[name] = 0.3 * value + 0.7 * theirs[name] if value.is_floating_point() else value
    right.load_state_dict(theirs)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        arguments = inputs(family)
        ours, expected, alone = (model.eval()(**arguments).logits for model in (merged, right, left))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, alone, atol=1e-4)
