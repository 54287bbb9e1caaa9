"""Values that change with the depth of a model: anchors, equally spaced over its layers, and linear between them.

The meaning is mergekit's, for its YAML files and for our plans. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Scalar = float | int | bool | str

# The first number is the layer's: T5 has layers inside its blocks, mixtures of experts have experts.
_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks|layer|block)\.)(\d+)(\..*)$")
OUTSIDE_LAYERS = 0.0  # embeddings, final norm and head take the first anchor


def split_layer(name: str) -> tuple[str, int, str] | None:
    """`model.layers.7.mlp.up.weight` -> (`model.layers.`, 7, `.mlp.up.weight`); None outside the layers."""
    match = _LAYER.match(name)
    return (match[1], int(match[2]), match[3]) if match else None


def layer_position(layer: int, num_layers: int) -> float:
    """`layer / (L - 1)`; 1 for the only layer."""
    return layer / (num_layers - 1) if num_layers > 1 else 1.0


def tensor_positions(names: Iterable[str]) -> dict[str, float]:
    """Where the tensors of a whole model stand, in [0, 1]; every stack of layers goes from 0 to 1."""
    split = {name: split_layer(name) for name in names}
    num_layers: dict[str, int] = {}
    for parts in filter(None, split.values()):
        num_layers[parts[0]] = max(num_layers.get(parts[0], 0), parts[1] + 1)
    return {
        name: layer_position(parts[1], num_layers[parts[0]]) if parts else OUTSIDE_LAYERS
        for name, parts in split.items()
    }


def gradient_value(anchors: Sequence[Scalar], position: float) -> Scalar:
    """The value at a position in [0, 1]; of booleans and words the anchor before it, which are not interpolated."""
    scaled = position * (len(anchors) - 1)
    low = int(scaled)
    below, above = anchors[low], anchors[min(len(anchors) - 1, low + 1)]
    if isinstance(below, bool | str) or isinstance(above, str) or len(anchors) == 1:
        return below
    part = scaled - low
    return (1 - part) * below + part * above
