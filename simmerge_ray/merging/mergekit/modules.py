"""The modules of a model of several towers: an encoder and a decoder, or what sees beside what writes.

mergekit names them for each architecture; these are its names for those that have more than one module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

WHOLE = "default"  # the only module of other models

_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")
_PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|connector|visual\.(deepstack_)?merger(_list)?)\.")
_TOWER = re.compile(r"^(?:model\.)?(encoder|decoder)\.")
# Where `config.json` holds the number of layers of a module, by what holds it; the first key that is there counts.
_LAYER_KEYS: Mapping[str, tuple[tuple[str | None, tuple[str, ...]], ...]] = {
    "encoder": ((None, ("encoder_layers", "num_layers", "num_hidden_layers")),),
    "decoder": ((None, ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers")),),
    "vision_tower": (("vision_config", ("num_hidden_layers", "depth")),),
    "text_decoder": (("text_config", ("num_hidden_layers",)), (None, ("num_hidden_layers",))),
    WHOLE: ((None, ("num_hidden_layers", "n_layer", "num_layers")), ("text_config", ("num_hidden_layers",))),
}
# Names that transformers has given to the same tensors, of before 4.52 and since; it loads each of them.
_RENAMED = (
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(vision_tower|multi_modal_projector|visual)\."), r"model.\1."),
    (re.compile(r"\bvision_tower\.vision_model\."), "vision_tower."),
)


def present_names(names: Iterable[str]) -> dict[str, str]:
    """The names of tensors by what the present transformers calls them."""
    found = {}
    for name in names:
        present = name
        for pattern, replacement in _RENAMED:
            present = pattern.sub(replacement, present)
        found[present] = name
    return found


def module_of(config: Mapping[str, Any], names: Iterable[str]) -> Callable[[str], str]:
    """The module to which a tensor belongs, as a function of its name; `names` are all of the checkpoint."""
    if "vision_config" in config:
        return _multimodal_module
    if not config.get("is_encoder_decoder"):
        return lambda _: WHOLE
    rest = "shared" if "shared.weight" in names else "decoder"

    def tower(name: str) -> str:
        match = _TOWER.match(name)
        return match[1] if match else rest

    return tower


def _multimodal_module(name: str) -> str:
    if _PROJECTOR.search(name):
        return "multi_modal_projector"
    return "vision_tower" if _VISION.search(name) else "text_decoder"


def module_names(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """All modules of a checkpoint, in name order."""
    names = set(names)
    which = module_of(config, names)
    return tuple(sorted({which(name) for name in names}))


def set_num_layers(config: dict[str, Any], module: str, count: int, layers: Callable[[str], list[Any]]) -> None:
    """Write the number of layers of a module of the output into its config, where the config has such a key.

    layers: values of the output's layers for a key that holds one for each (`layer_types`).
    """
    for part, keys in _LAYER_KEYS.get(module, ()):
        holder = config if part is None else config.get(part)
        if not isinstance(holder, dict) or not (found := [key for key in keys if key in holder]):
            continue
        # Configs of one tower may name the number twice; of several, the first name is the tower's.
        holder.update(dict.fromkeys(found if module == WHOLE else found[:1], count))
        if "layer_types" in holder and module in (WHOLE, "text_decoder"):
            holder["layer_types"] = layers("layer_types" if part is None else f"{part}.layer_types")
        return
