"""Modules of models of several towers: which tensor belongs where, and where a config counts their layers."""

from __future__ import annotations

import pytest

from simmerge_ray.merging.mergekit.models import is_tied, untie
from simmerge_ray.merging.mergekit.modules import module_names, module_of, set_num_layers

T5 = {"is_encoder_decoder": True, "num_layers": 2, "num_decoder_layers": 3}
VISION = {"vision_config": {"depth": 4}, "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}}


@pytest.mark.parametrize(
    ("config", "name", "module"),
    [
        ({}, "model.layers.0.mlp.up_proj.weight", "default"),
        (T5, "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder"),
        (T5, "decoder.final_layer_norm.weight", "decoder"),
        (T5, "shared.weight", "shared"),
        (T5, "lm_head.weight", "shared"),
        (VISION, "model.visual.blocks.0.norm1.weight", "vision_tower"),
        (VISION, "visual.merger.mlp.0.weight", "multi_modal_projector"),
        (VISION, "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision_tower"),
        (VISION, "multi_modal_projector.linear_1.weight", "multi_modal_projector"),
        (VISION, "language_model.model.norm.weight", "text_decoder"),
    ],
)
def test_a_tensor_belongs_to_one_module(config, name, module):
    assert module_of(config, {name, "shared.weight"})(name) == module
    assert module in module_names(config, {name, "shared.weight"})


def test_what_is_in_no_tower_is_the_decoder_s_where_nothing_is_shared():
    names = {"model.encoder.conv1.weight", "model.decoder.embed_tokens.weight", "proj_out.weight"}
    assert module_of(T5, names)("proj_out.weight") == "decoder"
    assert module_names(T5, names) == ("decoder", "encoder")


def test_layers_are_counted_where_the_config_counts_them():
    config = {"is_encoder_decoder": True, "encoder_layers": 2, "decoder_layers": 3, "num_hidden_layers": 2}
    set_num_layers(config, "decoder", 1, lambda _: [])
    assert config == {"is_encoder_decoder": True, "encoder_layers": 2, "decoder_layers": 1, "num_hidden_layers": 2}
    config = {"num_hidden_layers": 2, "n_layer": 2, "layer_types": ["x", "y"]}
    set_num_layers(config, "default", 3, lambda key: [key] * 3)
    assert config == {"num_hidden_layers": 3, "n_layer": 3, "layer_types": ["layer_types"] * 3}
    config = {key: dict(value) for key, value in VISION.items()}
    set_num_layers(config, "vision_tower", 2, lambda _: [])
    set_num_layers(config, "text_decoder", 1, lambda key: [key])
    assert config["vision_config"] == {"depth": 2}
    assert config["text_config"] == {"num_hidden_layers": 1, "layer_types": ["text_config.layer_types"]}
    set_num_layers(config, "shared", 9, lambda _: [])  # it has no layers


def test_a_head_is_tied_where_the_config_says_so_and_not_after_that():
    for config in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}):
        assert is_tied(config)
        untie(config)
        assert not is_tied(config)
    assert not is_tied({}) and not is_tied({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})
