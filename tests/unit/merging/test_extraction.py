"""`simmerge extract-lora`: adapters of fine-tunes against exact decompositions, peft, and our own adapter path."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from simmerge_ray.base.errors import InputError
from simmerge_ray.base.extraction import ExtractConfig
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.extraction import extract_lora, low_rank
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.plans.plan import unmerged
from tests import tiny
from tests.unit.checkpoints.test_adapters import make_base

MODELS = ("untied", "tied", "gpt2", "biased")


def pair(root, kind: str, change) -> tuple[CheckpointRef, CheckpointRef]:
    """(fine-tuned, base): `change(name, tensor)` is added to every parameter."""
    from copy import deepcopy

    base = make_base(kind)
    fine = deepcopy(base)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in fine.named_parameters():
            parameter.add_(change(name, parameter))
    return CheckpointRef("fine", tiny.save(fine, root / "fine")), CheckpointRef("base", tiny.save(base, root / "base"))


def noise(name: str, parameter: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(parameter) * 0.1


def of_rank_two(name: str, parameter: torch.Tensor) -> torch.Tensor:
    if parameter.ndim != 2 or "embed" in name or "head" in name or "wte" in name or "wpe" in name:
        return torch.zeros_like(parameter)
    return torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1]) * 0.1


def adapted(base: CheckpointRef, adapter) -> dict[str, torch.Tensor]:
    return dict(merged_tensors(unmerged(CheckpointRef("a", base.path, adapter=adapter))))


def by_peft(base: CheckpointRef, adapter) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), adapter)
    return model.merge_and_unload().state_dict()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_change_of_low_rank_is_recovered_and_loads_in_peft(tmp_path, kind, dtype):
    fine, base = pair(tmp_path, kind, of_rank_two)
    config = ExtractConfig(rank=3, alpha=6, dtype=dtype)
    made = extract_lora(fine, base, config, tmp_path / "adapter")
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert not made.left_out and all(share >= 1 - tolerance for share in made.kept.values())
    found, peft = adapted(base, tmp_path / "adapter"), by_peft(base, tmp_path / "adapter")
    for name, wanted in load_file(fine.path / "model.safetensors").items():
        torch.testing.assert_close(found[name], wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found[name], peft[name], rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_the_best_of_that_rank_and_what_is_left_out_is_said(tmp_path):
    fine, base = pair(tmp_path, "untied", noise)
    made = extract_lora(fine, base, ExtractConfig(rank=4), tmp_path / "adapter")
    new, old = (load_file(ref.path / "model.safetensors") for ref in (fine, base))
    found = adapted(base, tmp_path / "adapter")
    missed = changed = 0.0
    for name in new:
        change = (new[name] - old[name]).double()
        if "mlp" not in name:
            continue
        values = torch.linalg.svdvals(change)
        changed += float(values.square().sum())
        missed += float(values[4:].square().sum())
        torch.testing.assert_close((new[name] - found[name]).norm().item(), values[4:].norm().item(), rtol=1e-3, atol=0)
    assert made.kept["mlp"] == pytest.approx((1 - missed / changed) ** 0.5, abs=1e-3)
    assert made.kept["norm"] == made.kept["embedding"] == 0
    assert set(made.left_out) == {name for name in new if "norm" in name or "embed" in name or "head" in name}
    assert any("not in the adapter: 7 tensors" in line for line in made.lines())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["biased", "gpt2"])
def test_biases_are_kept_whole_as_peft_keeps_them_or_said_to_be_missing(tmp_path, kind):
    fine, base = pair(tmp_path, kind, lambda name, p: of_rank_two(name, p) + (0.1 if name.endswith("bias") else 0.0))
    wanted = load_file(fine.path / "model.safetensors")
    biases = {name for name in wanted if name.endswith("bias")}
    made = extract_lora(fine, base, ExtractConfig(rank=2), tmp_path / "without")
    assert set(made.left_out) == biases
    said = f"{len(biases)} biases: {made.left_out[0]}"
    assert any(said in line and "--bias all" in line for line in made.lines())
    assert said in (tmp_path / "without" / "README.md").read_text()
    made = extract_lora(fine, base, ExtractConfig(rank=2, bias="all"), tmp_path / "adapter")
    assert not made.left_out and "not in this adapter" not in (tmp_path / "adapter" / "README.md").read_text()
    found, peft = adapted(base, tmp_path / "adapter"), by_peft(base, tmp_path / "adapter")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[name], peft[name], rtol=1e-5, atol=1e-6)
    # peft itself names them so.
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), tmp_path / "adapter")
    assert (
        get_peft_model_state_dict(model).keys() == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    )


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_whole_modules_and_embeddings(tmp_path, kind):
    fine, base = pair(tmp_path, kind, noise)
    config = ExtractConfig(rank=99, modules_to_save=("embed_tokens", "norm"))  # all that the shapes allow
    made = extract_lora(fine, base, config, tmp_path / "adapter")
    assert made.left_out == (() if kind == "tied" else ("lm_head.weight",))
    found, peft = adapted(base, tmp_path / "adapter"), by_peft(base, tmp_path / "adapter")
    for name, wanted in load_file(fine.path / "model.safetensors").items():
        if name not in made.left_out:
            torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[name], peft[name], rtol=1e-5, atol=1e-6)


def test_embeddings_of_low_rank(tmp_path):
    fine, base = pair(tmp_path, "untied", noise)
    made = extract_lora(fine, base, ExtractConfig(rank=16, embeddings=True), tmp_path / "adapter")
    assert made.kept["embedding"] > 0.999
    found, peft = adapted(base, tmp_path / "adapter"), by_peft(base, tmp_path / "adapter")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, peft[name], rtol=1e-5, atol=1e-6)


def test_the_randomised_decomposition_is_near_the_exact_one_and_the_same_every_time():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(300, 200, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(200, 200, generator=generator))[0]
    values = torch.arange(1, 201).float() ** -0.7
    matrix = left * values @ right
    up, down = low_rank(matrix, 8, 16, 4, seed=3)
    best = values[8:].norm().item()
    assert (matrix - up @ down).norm().item() <= 1.005 * best
    state = torch.random.get_rng_state()
    again = low_rank(matrix, 8, 16, 4, seed=3)
    assert torch.equal(again[0], up) and torch.equal(again[1], down)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_command_writes_the_same_bytes_again_and_says_what_is_wrong(simmerge, tmp_path):
    fine, base = pair(tmp_path, "untied", noise)
    out = tmp_path / "adapter"
    line = ("extract-lora", fine.path, "--base", base.path, "--out", out, "--rank", 2, "--target", "q_proj")
    done = simmerge(*line)
    assert done.returncode == 0 and "kept of the change, attention: " in done.stdout + done.stderr
    before = (out / "adapter_model.safetensors").read_bytes()
    assert simmerge(*line).returncode == 0 and (out / "adapter_model.safetensors").read_bytes() == before
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"] and config["r"] == config["lora_alpha"] == 2
    for changes, message in (
        (("--target", "nowhere"), "has no weights in 'nowhere'"),
        (("--rank", 0), "greater than or equal to 1"),
        (("--base", tmp_path / "absent"), "is not a directory"),
        (("--out", fine.path), "is not an adapter made by"),
    ):
        wrong = simmerge(*line, *changes)
        assert wrong.returncode == 2 and message in wrong.stderr, wrong.stderr
    tied, _ = pair(tmp_path / "tied", "tied", noise)
    with pytest.raises(InputError, match=r"lacks lm_head.weight"):
        extract_lora(tied, base, ExtractConfig(), tmp_path / "none")
    with pytest.raises(InputError, match="keep it whole with --save-module embed_tokens"):
        extract_lora(tied, tied, ExtractConfig(embeddings=True), tmp_path / "none")
    assert not (tmp_path / "none").exists()
