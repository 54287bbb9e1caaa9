"""LoRA adapters made by peft, read while merging, are what `merge_and_unload` makes."""

from __future__ import annotations

import json

import pytest
import torch

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.references import CheckpointRef, locate_checkpoint
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.request import read_request
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.merging.write.output import WriteOptions
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import ResolvedPlan, pair_plan, unmerged
from tests import tiny
from tests.operators import two_way

CONFIGS = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "use_rslora": True},
    "patterns": {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2},
                 "alpha_pattern": {"down_proj": 3}},
    "embedding": {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "k_proj"]},
}  # fmt: skip


def make_adapter(path, **config):
    """(adapter directory, state dict of the merged model)"""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.make_model(tied=False), LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path, save_embedding_layers=False)
    return path, model.merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.make_model(tied=False), tmp_path_factory.mktemp("lora") / "base")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_added_as_peft_does(base, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(kernels, "BLOCK", 1000)  # blocks begin and end inside rows
    adapter, expected = make_adapter(tmp_path / "adapter", **CONFIGS[kind])
    ref = locate_checkpoint("base", adapter=str(adapter), directory=base.parent)
    assert ref.id == f"base+{adapter}" and ref.path == base
    found = dict(merged_tensors(unmerged(ref)))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operator", ["linear", "ties", "model_stock"])
def test_merges_of_adapters_are_merges_of_the_adapted_models(base, tmp_path, operator):
    adapter, expected = make_adapter(tmp_path / "adapter", **CONFIGS["attention"])
    refs = (CheckpointRef("a", base, "base", adapter), CheckpointRef("b", base, "base"))
    resolved = ResolvedPlan(pair_plan("a", "b", make_arm(operator)), refs, CheckpointRef("base", base))
    original = dict(merged_tensors(unmerged(refs[1])))
    for name, tensor in merged_tensors(resolved):
        wanted = two_way(operator, original[name], expected[name], original[name])
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_added_is_refused_by_name(base, tmp_path):
    adapter, _ = make_adapter(tmp_path / "adapter", **CONFIGS["attention"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    ref = CheckpointRef("a", base, adapter=adapter)

    def refuse(message: str, **changes) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            dict(merged_tensors(unmerged(ref)))

    refuse("use_dora: True; merge it into its model", use_dora=True)
    refuse("bias: 'all'", bias="all")
    refuse("adapter type 'IA3' is not supported", peft_type="IA3")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="holds no adapter_config.json"):
        dict(merged_tensors(unmerged(ref)))


def test_what_is_neither_a_directory_nor_on_the_hub_is_named(base):
    with pytest.raises(CheckpointError, match="is not a directory .*no hub id"):
        locate_checkpoint("./nowhere", directory=base.parent)
    with pytest.raises(CheckpointError, match="neither a directory nor a hub repository that can be had"):
        locate_checkpoint("nobody/nothing-at-all")
    with pytest.raises(CheckpointError, match="the revision 'v2' has no meaning"):
        locate_checkpoint("base", "v2", directory=base.parent)


def test_the_plan_and_the_mergekit_file_beside_the_weights_keep_the_adapter(base, tmp_path):
    adapter, _ = make_adapter(tmp_path / "adapter", **CONFIGS["attention"])
    refs = (CheckpointRef("a", base, "base", adapter), CheckpointRef("b", base, "base"))
    out = write_merge(ResolvedPlan(pair_plan("a", "b", make_arm("linear")), refs, None), tmp_path / "out").path
    weights = (out / "model.safetensors").read_bytes()
    for file in ("simmerge_plan.json", "mergekit_config.yml"):
        again = read_request(out / file, tmp_path / file).write(WriteOptions(num_threads=1)).path
        assert (again / "model.safetensors").read_bytes() == weights
    plain = ResolvedPlan(pair_plan("a", "b", make_arm("linear")), (CheckpointRef("a", base), refs[1]), None)
    assert (write_merge(plain, tmp_path / "plain").path / "model.safetensors").read_bytes() != weights
