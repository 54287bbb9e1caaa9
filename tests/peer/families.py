"""Tiny random checkpoints of many families, from the configs of transformers; a base and copies of it with noise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests import tiny

CHARACTERS = "abcdefghijklmnopqr"  # and <pad>, <eos>: 20 tokens
VOCABULARY = len(CHARACTERS) + 2
TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "initializer_range": 0.2,
}
# 16 bytes a row at least, which grouped products need.
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
_VISION = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 8,
}
_ENCODER = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}

# Class of the config, class of the model, and the config's entries.
FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**TEXT, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", TEXT),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", TEXT),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", TEXT),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", TEXT),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", TEXT),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", TEXT),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", TEXT),
    "granite": ("GraniteConfig", "GraniteForCausalLM", TEXT),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**TEXT, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**TEXT, **EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 8},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**TEXT, **EXPERTS, "num_experts": 3}),
    "deepseek-v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {k: v for k, v in TEXT.items() if k != "head_dim"}
        | EXPERTS
        | {"num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"q_lora_rank": None, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
    ),
    "llava": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "image_token_index": 19,
            "vision_feature_layer": -1,
        },
    ),
    "gemma3-vision": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "gemma3_text"},
            "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 19,
            "boi_token_index": 17,
            "eoi_token_index": 18,
        },
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "bert-classifier": ("BertConfig", "BertForSequenceClassification", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ENCODER),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 1}
        | {"num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 8, "encoder_layers": 2, "decoder_layers": 1, "num_mel_bins": 8}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
        | {"max_source_positions": 10, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1}
        | {"eos_token_id": 1, "decoder_start_token_id": 1, "begin_suppress_tokens": None, "suppress_tokens": None},
    ),
}


def make_model(family: str, seed: int = 0, **entries: Any) -> Any:
    """A random model of a family in float32; `entries` replace those of its config."""
    import transformers

    config, model, known = FAMILIES[family]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**(dict(known) | entries))).eval()


def make_checkpoints(root: Path, family: str, names: Sequence[str] = ("base", "a", "b"), **entries: Any) -> None:
    """Directories of the names under `root`: the first a base, the others it with noise on every float tensor."""
    base = make_model(family, **entries)
    for number, name in enumerate(names):
        model = make_model(family, **entries)
        model.load_state_dict(base.state_dict())
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for parameter in model.parameters() if number else ():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(root / name)
        tiny.write_tokenizer(root / name, CHARACTERS)


def inputs(family: str) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass."""
    ids = torch.tensor([[2, 5, 3, 9, 16, 4]])
    if family == "whisper":
        features = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(5))
        return {"input_features": features, "decoder_input_ids": ids}
    if family == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    if family in ("llava", "gemma3-vision"):
        pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        extra = {"token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0]])} if family == "gemma3-vision" else {}
        return {"input_ids": torch.tensor([[2, 19, 19, 19, 19, 4]]), "pixel_values": pixels, **extra}
    return {"input_ids": ids}


def auto_class(root: Path) -> Any:
    """The class that `config.json` names."""
    import transformers

    return getattr(transformers, json.loads((root / "config.json").read_text())["architectures"][0])
