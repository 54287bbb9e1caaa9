"""Gradients over the depth of a model: laws of the interpolation, and where tensors stand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.plans.operators.gradients import gradient_value, layer_position, split_layer, tensor_positions

ANCHORS = st.lists(st.floats(0, 1), min_size=1, max_size=64)


@given(ANCHORS)
def test_an_anchor_is_the_value_at_its_place(anchors):
    for index, anchor in enumerate(anchors):
        position = layer_position(index, len(anchors)) if len(anchors) > 1 else 0.3
        assert gradient_value(anchors, position) == pytest.approx(anchor, abs=1e-12)
    assert gradient_value(anchors, 0.0) == anchors[0] and gradient_value(anchors, 1.0) == anchors[-1]


@given(ANCHORS, st.floats(0, 1))
def test_a_value_lies_between_its_neighbours(anchors, position):
    place = position * (len(anchors) - 1)
    near = [anchors[int(place)], anchors[min(len(anchors) - 1, int(place) + 1)]]
    assert min(near) - 1e-12 <= gradient_value(anchors, position) <= max(near) + 1e-12


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_two_anchors_are_a_straight_line(low, high, position):
    assert gradient_value((low, high), position) == pytest.approx(low + position * (high - low), abs=1e-12)


def test_every_stack_of_layers_goes_from_0_to_1_and_the_rest_stands_at_0():
    names = ["embed.weight", "lm_head.weight", "model.norm.weight", "vision.blocks.0.w"]
    names += [f"model.layers.{layer}.mlp.w" for layer in (0, 1, 2, 4)]
    expected = dict.fromkeys(names[:3], 0.0) | {"vision.blocks.0.w": 1.0}
    expected |= {f"model.layers.{layer}.mlp.w": layer / 4 for layer in (0, 1, 2, 4)}
    assert tensor_positions(names) == expected


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts.7.w1.weight", 3),
        ("bert.encoder.layer.3.attention.self.query.weight", 3),
        ("encoder.block.3.layer.1.DenseReluDense.wi.weight", 3),
        ("transformer.h.3.attn.c_attn.weight", 3),
        ("model.layers.3.block_sparse_moe.experts.5.w2.weight", 3),
        ("visual.blocks.3.norm1.weight", 3),
        ("multi_modal_projector.linear_1.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_the_first_number_is_the_layer_s(name, layer):
    parts = split_layer(name)
    assert (parts and parts[1]) == layer
