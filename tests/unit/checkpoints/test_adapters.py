"""LoRA adapters made by peft, read while merging, are what `merge_and_unload` makes."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

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

# (model, LoraConfig): every kind that is merged; the model is a Llama, tied or not, a GPT-2, or a Qwen2 with biases.
KINDS = {
    "attention": ("untied", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "default-alpha": ("untied", {"r": 2, "target_modules": ["q_proj"]}),
    "rank-stabilised": ("untied", {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "use_rslora": True}),
    "patterns": ("untied", {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2},
                            "alpha_pattern": {"down_proj": 3}}),
    "regular-expressions": ("untied", {"r": 4, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"],
                            "use_rslora": True, "rank_pattern": {r"layers\.[0]\.self_attn\..*_proj": 2, "v_proj": 3},
                            "alpha_pattern": {r"model\.layers\.1\..*": 16, "q_proj": 2}}),
    "layers": ("untied", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "embedding": ("untied", {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "k_proj"]}),
    "head": ("untied", {"r": 3, "target_modules": ["lm_head", "k_proj"]}),
    "dora": ("untied", {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora-embedding": ("untied", {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True, "use_rslora": True}),
    "modules-to-save": ("untied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "mlp"]}),
    "tokens": ("untied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1, 3]}),
    "tokens-of-two": ("untied", {"target_modules": ["q_proj"],
                                 "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [2]}}),
    "parameters": ("untied", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}),
    "plain-init": ("untied", {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"}),
    "all-linear": ("untied", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "tied-tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [4, 2]}),
    "tied-modules": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
                              "ensure_weight_tying": True}),
    "bias-all": ("biased", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias-of-lora": ("biased", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora-bias": ("biased", {"target_modules": ["q_proj"], "lora_bias": True, "lora_alpha": 3}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "conv1d-not-said": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "linear-said-transposed": ("untied", {"target_modules": ["q_proj", "up_proj"], "fan_in_fan_out": True}),
}  # fmt: skip
REFUSED = {
    "tied-head": ("tied", {"target_modules": ["q_proj", "lm_head"]},
                  "changes lm_head.weight, .*tied.* untie"),
    "tied-embedding": ("tied", {"target_modules": ["embed_tokens"]}, "changes model.embed_tokens.weight, .*tied"),
    "tied-embedding-saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "untie"),
    "tied-both-saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
                        "untie"),
    "bias-without-one": ("untied", {"target_modules": ["q_proj"], "lora_bias": True}, "has no bias to add it to"),
    "pissa": ("untied", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "'pissa', which also changed"),
    "olora": ("untied", {"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "'olora', which also changed"),
    "activated": ("untied", {"target_modules": ["q_proj"], "alora_invocation_tokens": [1]},
                  "alora_invocation_tokens"),
    "replicated": ("untied", {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
                   "layer_replication"),
}  # fmt: skip
CONFIGS = {kind: config for kind, (_, config) in KINDS.items()}


@cache
def make_base(kind: str):
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    if kind == "llama":
        return tiny.make_model(tied=False)
    if kind in ("tied", "untied"):
        return tiny.make_model(tied=kind == "tied", hidden_size=16)
    torch.manual_seed(3)
    if kind == "gpt2":
        config = GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=None, eos_token_id=1
        )
        return GPT2LMHeadModel(config)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(
        **sizes, num_key_value_heads=1, vocab_size=32, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1
    )
    return Qwen2ForCausalLM(config)


def make_adapter(path, kind: str = "llama", **config):
    """(adapter directory, state dict of the merged model)"""
    from copy import deepcopy

    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(deepcopy(make_base(kind)), LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    again = PeftModel.from_pretrained(deepcopy(make_base(kind)), path)
    if config.get("lora_bias") and kind != "biased" or config.get("alora_invocation_tokens"):
        return path, {}  # peft cannot merge it
    return path, again.merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")

    @cache
    def of(kind: str):
        return tiny.save(make_base(kind), root / kind / "base")

    return of


@pytest.fixture
def base(bases):
    return bases("untied")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_added_as_peft_does(bases, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(kernels, "BLOCK", 100)  # blocks begin and end inside rows
    model, config = KINDS[kind]
    adapter, expected = make_adapter(tmp_path / "adapter", model, **config)
    ref = CheckpointRef("a", bases(model), adapter=adapter)
    found = dict(merged_tensors(unmerged(ref)))
    assert found.keys() == load_file(ref.path / "model.safetensors").keys()
    changed = 0
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name
        changed += not torch.equal(tensor, make_base(model).state_dict()[name])
    assert changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_added_is_refused_with_what_to_do(bases, tmp_path, kind):
    model, config, message = REFUSED[kind]
    adapter, _ = make_adapter(tmp_path / "adapter", model, **config)
    with pytest.raises(CheckpointError, match=message):
        dict(merged_tensors(unmerged(CheckpointRef("a", bases(model), adapter=adapter))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", ["linear", "ties", "model_stock"])
def test_merges_of_adapters_are_merges_of_the_adapted_models(base, tmp_path, operator):
    adapter, expected = make_adapter(tmp_path / "adapter", "untied", **CONFIGS["dora"])
    refs = (CheckpointRef("a", base, "base", adapter), CheckpointRef("b", base, "base"))
    resolved = ResolvedPlan(pair_plan("a", "b", make_arm(operator)), refs, CheckpointRef("base", base))
    original = dict(merged_tensors(unmerged(refs[1])))
    for name, tensor in merged_tensors(resolved):
        wanted = two_way(operator, original[name], expected[name], original[name])
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused_by_name(base, tmp_path):
    adapter, _ = make_adapter(tmp_path / "adapter", "untied", **CONFIGS["attention"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    ref = CheckpointRef("a", base, adapter=adapter)

    def refuse(message: str, **changes) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            dict(merged_tensors(unmerged(ref)))

    refuse("has kasa_config: .* merge it into its model", kasa_config={"r": 1})
    refuse("has a_key_of_tomorrow: 3; merge it", a_key_of_tomorrow=3)
    refuse("target_parameters: .*gate_up_proj", target_parameters=["experts.gate_up_proj"])
    refuse("adapter type 'IA3' is not supported", peft_type="IA3")
    refuse("has rank 4, its adapter_config.json says 8", r=8)
    refuse("target_parameters: 3", target_parameters=3)
    refuse("use_dora and lacks", use_dora=True)
    refuse("lora_alpha of .* is 'much'", lora_alpha="much")
    refuse("no name of a module", alpha_pattern={"(.*a)*b": 3})
    refuse("no regular expression", alpha_pattern={"(": 3})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    name = next(iter(tensors))
    for change, message in (
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": torch.ones(1)}, "lora_C"),
        ({"base_model.model.model.embed_tokens.weight": torch.ones(60, 16)}, "vocabulary or the layer was resized"),
        ({"base_model.model.nowhere.weight": torch.ones(1)}, "nowhere.weight, which the model lacks"),
        ({"elsewhere": torch.ones(1)}, "no tensor of a PEFT model"),
        ({name: torch.ones(4, 4)}, "change of .* has shape"),
        ({name: torch.ones(())}, r"matrices of .* have shapes .* and \(\)"),
        ({name: torch.ones(0, 16)}, r"matrices of .* have shapes"),
        ({"base_model.model.model.norm.token_adapter.trainable_tokens_delta": torch.ones(())}, "does not fit"),
    ):
        save_file(tensors | change, adapter / "adapter_model.safetensors")
        refuse(message)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json"):
        dict(merged_tensors(unmerged(ref)))


def test_what_is_neither_a_directory_nor_on_the_hub_is_named(base):
    with pytest.raises(CheckpointError, match=r"is not a directory .*no hub id"):
        locate_checkpoint("./nowhere", directory=base.parent)
    with pytest.raises(CheckpointError, match="is no directory here, .*HF_HUB_OFFLINE is set"):
        locate_checkpoint("nobody/nothing-at-all")
    with pytest.raises(CheckpointError, match="the revision 'v2' has no meaning"):
        locate_checkpoint("base", "v2", directory=base.parent)


def test_the_plan_and_the_mergekit_file_beside_the_weights_keep_the_adapter(base, tmp_path):
    adapter, _ = make_adapter(tmp_path / "adapter", "untied", **CONFIGS["attention"])
    located = locate_checkpoint(base.name, adapter=str(adapter), directory=base.parent)
    assert located.id == f"{base.name}+{adapter}" and located.path == base
    refs = (CheckpointRef("a", base, "base", adapter), CheckpointRef("b", base, "base"))
    out = write_merge(ResolvedPlan(pair_plan("a", "b", make_arm("linear")), refs, None), tmp_path / "out").path
    weights = (out / "model.safetensors").read_bytes()
    for file in ("simmerge_plan.json", "mergekit_config.yml"):
        again = read_request(out / file, tmp_path / file).write(WriteOptions(num_threads=1)).path
        assert (again / "model.safetensors").read_bytes() == weights
    plain = ResolvedPlan(pair_plan("a", "b", make_arm("linear")), (CheckpointRef("a", base), refs[1]), None)
    assert (write_merge(plain, tmp_path / "plain").path / "model.safetensors").read_bytes() != weights
