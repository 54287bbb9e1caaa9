"""Every family, merged, is what transformers makes of the same arithmetic on its state dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simmerge_ray.merging.request import read_request
from simmerge_ray.merging.write.output import WriteOptions
from tests.peer.families import FAMILIES, auto_class, inputs, make_checkpoints

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


LAYOUTS = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.", "model.vision_tower.vision_model."),
)


@pytest.mark.parametrize("renamed", ["a", "b"])
def test_one_model_with_names_of_several_releases_is_merged_and_loaded(tmp_path: Path, renamed: str):
    make_checkpoints(tmp_path, "llava")
    file = tmp_path / renamed / "model.safetensors"
    tensors = load_file(file)
    for old, new in LAYOUTS:
        assert any(name.startswith(old) for name in tensors)
        tensors = {name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "merge.yaml").write_text(TEXT)
    read_request(tmp_path / "merge.yaml", tmp_path / "out").write(WriteOptions(num_threads=1))
    kind = auto_class(tmp_path / "out")
    (merged, info), left, right = (
        kind.from_pretrained(tmp_path / "out", output_loading_info=True),
        *(kind.from_pretrained(tmp_path / name).state_dict() for name in "ab"),
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.3 * left[name] + 0.7 * right[name], rtol=1e-6, atol=1e-7)
