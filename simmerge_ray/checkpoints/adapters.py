"""PEFT LoRA adapters, added to the weights of their model as these are read. Hu et al. 2021, arXiv:2106.09685.

The adapted tensor is `W + s B A` with `s = alpha / r` (`alpha / sqrt(r)` for rank-stabilised LoRA), in float32; only
the rows of a block are multiplied, so no adapted tensor is ever held as a whole. What peft merges in another way (DoRA,
saved modules, biases, trained tokens) is merged so here; what cannot be merged right is refused by name. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from simmerge_ray.base.errors import shown_value
from simmerge_ray.base.storage import read_json_object
from simmerge_ray.checkpoints.adapter_changes import (
    WIDTHS,
    Added,
    Below,
    Change,
    LowRank,
    Magnitudes,
    Replaced,
    TrainedRows,
    read_floats,
    same_values,
)
from simmerge_ray.checkpoints.headers import TensorSpec, read_header
from simmerge_ray.checkpoints.pickles import adapter_file
from simmerge_ray.checkpoints.references import ADAPTER_CONFIG, CheckpointRef, read_config

_PREFIX = "base_model.model."
_REMEDY = "merge it into its model with peft's `merge_and_unload` first"
# Keys of LoraConfig (peft 0.21) that say how an adapter was trained or found, not what it does to the weights.
_HARMLESS = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters",
    "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# Their adapter belongs to a base whose weights were changed with it; conversion at saving undoes that.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # transformers' layers that store (in, out)
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings)\.weight$")
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output|output_layer)\.weight$")
_DEFAULT_ALPHA = 8
_MAX_PATTERN, _MAX_REPEATS = 200, 3


class LoraAdapter:
    """The changes of one adapter, by tensor of its model."""

    def __init__(self, ref: CheckpointRef, specs: Mapping[str, TensorSpec]) -> None:
        """Read the adapter of `ref` (a few MB; tensors that it replaces are left in their file).

        Raises CheckpointError: it is not supported, or does not fit.
        """
        assert ref.adapter is not None
        self._ref, self._specs = ref, specs
        self._config = self._read_config()
        self._found = self._read_header()
        self._changes: dict[str, list[Change]] = {}
        self._add_replaced()
        modules = {name.rsplit(".lora_", 1)[0] for name in self._found if ".lora_" in name}
        for module in sorted(modules):
            self._add_low_rank(module)
        self._add_tokens()

    @property
    def is_low_rank(self) -> bool:
        """Whether all it does is to add products of two matrices."""
        return all(isinstance(one, LowRank) for changes in self._changes.values() for one in changes)

    def changes(self, tensor: str) -> bool:
        return tensor in self._changes

    def factors(self, tensor: str) -> tuple[np.ndarray, np.ndarray, float]:
        """`up`, `down` and `scale` of `scale * up @ down`, which has the tensor's shape; for an `is_low_rank` one."""
        (pair,) = self._changes[tensor]
        assert isinstance(pair, LowRank)
        return pair.up, pair.down, pair.scale

    def apply(self, tensor: str, start: int, values: np.ndarray, stored: Below) -> None:
        """Change `values`, the flat float32 elements of `tensor` from `start` on; `stored` reads the model's own."""
        self._apply(self._changes[tensor], start, values, stored)

    def _apply(self, changes: list[Change], start: int, values: np.ndarray, stored: Below) -> None:
        for number, change in enumerate(changes):

            def below(begin: int, end: int, number: int = number) -> np.ndarray:
                block = stored(begin, end)
                self._apply(changes[:number], begin, block, stored)
                return block

            change.apply(start, values, below)

    # What the adapter's files say

    def _read_config(self) -> dict[str, Any]:
        assert self._ref.adapter is not None
        file = self._ref.adapter / ADAPTER_CONFIG
        if not file.exists():
            raise self._ref.error(f"{self._ref.adapter} holds no {ADAPTER_CONFIG}")
        config = read_json_object(file, self._ref.error)
        if config.get("peft_type") != "LORA":
            kind = config.get("peft_type")
            raise self._ref.error(f"adapter type {shown_value(kind)} is not supported; known: 'LORA'; {_REMEDY}")
        for key in sorted(config.keys() - _HARMLESS):
            if config[key] not in (None, False, [], {}):
                self._refuse(f"{key}: {shown_value(config[key])}")
        if config.get("init_lora_weights") not in _PLAIN_INITS:
            init = config["init_lora_weights"]
            self._refuse(
                f"init_lora_weights: {shown_value(init)}, which also changed the weights of its model; save it "
                "again with peft's `path_initial_model_for_weight_conversion`, or"
            )
        parameters = config.get("target_parameters") or []
        is_plain = isinstance(parameters, list) and all(str(name).endswith(".weight") for name in parameters)
        if parameters and (not is_plain or config.get("rank_pattern") or config.get("alpha_pattern")):
            self._refuse(f"target_parameters: {shown_value(parameters)}")
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(key) or {}, dict):
                raise self._ref.error(f"{file}: {key} is a mapping, got {shown_value(config[key])}")
        return config

    def _refuse(self, what: str) -> None:
        raise self._ref.error(f"the adapter has {what}; {_REMEDY}")

    def _read_header(self) -> dict[str, TensorSpec]:
        """The tensors of the adapter, by their names in the model."""
        found = {}
        for name, spec in read_header(self._ref, adapter_file(self._ref)).items():
            if not name.startswith(_PREFIX):
                raise self._ref.error(f"the adapter holds {name}, which is no tensor of a PEFT model; {_REMEDY}")
            if spec.dtype not in WIDTHS:
                raise self._ref.error(f"{spec.file} has dtype {spec.dtype}; known: {', '.join(WIDTHS)}")
            found[name.removeprefix(_PREFIX)] = spec
        return found

    def _tensor(self, name: str) -> str | None:
        """The name in the model's files; the model in memory may have a prefix more, or less."""
        inner = name.partition(".")[2]
        return next((n for n in (name, inner, f"model.{name}", f"transformer.{name}") if n in self._specs), None)

    def _whole(self, name: str) -> np.ndarray:
        spec = self._found[name]
        return read_floats(spec, 0, math.prod(spec.shape)).reshape(spec.shape)

    # The changes

    def _add_replaced(self) -> None:
        """What stands in the adapter's file under the name of a tensor of the model takes its place."""
        replaced: dict[str, str] = {}
        lost: list[str] = []
        for name in sorted(self._found):
            if ".lora_" in name or ".token_adapter." in name:
                continue
            plain = name.replace(".base_layer.", ".")
            tensor = self._tensor(plain)
            if tensor is None:
                lost.append(plain)
            elif (shape := self._found[name].shape) != self._specs[tensor].shape:
                raise self._ref.error(
                    f"the adapter holds {plain} of shape {shape}, the model has {self._specs[tensor].shape}: it was "
                    f"trained after the vocabulary or the layer was resized; {_REMEDY}"
                )
            else:
                replaced[tensor] = name
                self._changes[tensor] = [Replaced(self._found[name])]
        heads = [name for name in lost if _HEADS.search(name)]
        if others := [name for name in lost if name not in heads]:
            raise self._ref.error(f"the adapter changes {others[0]}, which the model lacks")
        if self._is_tied:
            self._check_tied(replaced, heads)
        elif heads:
            raise self._ref.error(f"the adapter changes {heads[0]}, which the model lacks")

    @property
    def _is_tied(self) -> bool:
        """Whether the model's output layer is its embedding."""
        config = read_config(self._ref)
        text = config.get("text_config")
        tied = config.get("tie_word_embeddings")
        tied = text.get("tie_word_embeddings", tied) if isinstance(text, dict) else tied
        return bool(tied) if tied is not None else not any(_HEADS.search(name) for name in self._specs)

    def _check_tied(self, replaced: Mapping[str, str], heads: list[str]) -> None:
        """A saved embedding or output layer of a tied model: fine where the two are there and equal."""
        inputs = [name for tensor, name in replaced.items() if _EMBEDDINGS.search(tensor)]
        outputs = [name for tensor, name in replaced.items() if _HEADS.search(tensor)]
        outputs += [name for name in self._found if name.replace(".base_layer.", ".") in heads]
        if (
            inputs
            and outputs
            and all(same_values(self._found[inputs[0]], self._found[one]) for one in (*inputs, *outputs))
        ):
            return
        if inputs or outputs:
            self._refuse_untying((inputs or outputs)[0].replace(".base_layer.", "."))

    def _refuse_untying(self, name: str) -> None:
        raise self._ref.error(
            f"the adapter changes {name}, and the model's embedding and output layer are one tensor (tied), which no "
            "longer holds with it (peft's `merge_and_unload` changes both, and the model answers otherwise than before "
            "merging); untie the model first: save it with tie_word_embeddings false and both tensors"
        )

    def _add_low_rank(self, module: str) -> None:
        """The product of a module's two matrices, then what DoRA and a bias add to it."""
        embedding = f"{module}.lora_embedding_A" in self._found
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        known = {f"{module}.{part}" for part in (*names, "lora_B.bias", "lora_magnitude_vector")}
        dora = f"{module}.lora_magnitude_vector"
        if f"{dora}.weight" in self._found:
            self._found[dora] = self._found.pop(f"{dora}.weight")
        for name in sorted(self._found):
            if name.startswith(f"{module}.lora_") and name not in known:
                self._refuse(f"a tensor {name}")
        for name in names:
            if f"{module}.{name}" not in self._found:
                raise self._ref.error(f"the adapter lacks {module}.{name}")
        tensor = self._tensor(f"{module}.weight")
        if tensor is None:
            if self._is_tied and _HEADS.search(f"{module}.weight"):
                self._refuse_untying(f"{module}.weight")
            raise self._ref.error(f"the adapter changes {module}.weight, which the model lacks")
        if (_EMBEDDINGS.search(tensor) or _HEADS.search(tensor)) and self._is_tied:
            self._refuse_untying(tensor)
        down, up = (self._whole(f"{module}.{name}") for name in names)
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or not up.shape[1]:
            raise self._ref.error(f"the adapter's matrices of {module} have shapes {up.shape} and {down.shape}")
        scale = self._scale(module, down.shape[0])
        is_row = not embedding and not self._is_transposed(tensor, up.shape[0], down.shape[-1])
        pair = LowRank(up, down, scale) if is_row else LowRank(down.T, up.T, scale)
        shape = self._specs[tensor].shape
        if pair.shape != shape:
            raise self._ref.error(f"the adapter's change of {tensor} has shape {pair.shape}, the tensor {shape}")
        self._changes.setdefault(tensor, []).append(pair)
        if dora in self._found:
            magnitude = self._whole(dora).reshape(-1)
            if magnitude.size != shape[0 if is_row else 1]:
                raise self._ref.error(f"{dora} has {magnitude.size} values, {tensor} is {shape}")
            self._changes[tensor].append(Magnitudes(magnitude, pair.shape, is_row))
        elif self._config.get("use_dora"):
            raise self._ref.error(f"the adapter has use_dora and lacks {dora}")
        if f"{module}.lora_B.bias" in self._found:
            self._add_bias(module, scale)

    def _add_bias(self, module: str, scale: float) -> None:
        bias, vector = self._tensor(f"{module}.bias"), self._whole(f"{module}.lora_B.bias")
        if bias is None or self._specs[bias].shape != vector.shape:
            raise self._ref.error(f"the adapter has lora_bias, and {module} has no bias to add it to (peft refuses it)")
        self._changes.setdefault(bias, []).append(Added(np.float32(scale) * vector))

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._of_module("alpha_pattern", module, self._config.get("lora_alpha", _DEFAULT_ALPHA))
        asked = self._of_module("rank_pattern", module, self._config.get("r", rank))
        if asked != rank:
            raise self._ref.error(
                f"the adapter of {module} has rank {rank}, its adapter_config.json says {shown_value(asked)}"
            )
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise self._ref.error(f"lora_alpha of {module} is {shown_value(alpha)}; a number is needed")
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _of_module(self, key: str, module: str, default: Any) -> Any:
        """peft's rule: the first pattern that, as a regular expression, matches the end of the module's name."""
        for pattern, value in (self._config.get(key) or {}).items():
            is_long = len(pattern) > _MAX_PATTERN or len(re.findall(r"[*+{]", pattern)) > _MAX_REPEATS
            if is_long or re.search(r"\)[*+{]", pattern):  # it could take for ever
                self._refuse(f"a {key} that is no name of a module, {pattern[:60]!r}")
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise self._ref.error(f"{key} {pattern!r} is no regular expression: {error}") from None
        return default

    def _is_transposed(self, tensor: str, num_out: int, num_in: int) -> bool:
        """Whether a linear layer stores its weight as (in, out): the kind of layer says so, not `fan_in_fan_out`,
        which peft sets to what the layer is."""
        if num_out != num_in:
            return self._specs[tensor].shape == (num_in, num_out)
        return read_config(self._ref).get("model_type") in _CONV1D_MODELS and not _HEADS.search(tensor)

    def _add_tokens(self) -> None:
        """Rows of embeddings that were trained as they are."""
        indices = self._config.get("trainable_token_indices")
        for name in sorted(name for name in self._found if ".token_adapter." in name):
            module, _, part = name.partition(".token_adapter.")
            if part not in ("trainable_tokens_delta", "trainable_tokens_delta.default"):
                self._refuse(f"a tensor {name}")
            tensor = self._tensor(f"{module}.weight")
            wanted = indices
            if isinstance(indices, dict):
                wanted = next((v for k, v in indices.items() if module == k or module.endswith(f".{k}")), None)
            rows = self._whole(name)
            if tensor is None or not isinstance(wanted, list) or rows.ndim != 2 or len(wanted) != len(rows):
                raise self._ref.error(
                    f"the adapter's {name} does not fit trainable_token_indices {shown_value(wanted)}"
                )
            if len(self._specs[tensor].shape) != 2:
                raise self._ref.error(f"the adapter has trained tokens of {tensor}, which is no matrix")
            num_rows, width = self._specs[tensor].shape
            if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_rows for i in wanted):
                raise self._ref.error(f"trainable_token_indices go beyond the {num_rows} rows of {tensor}")
            if rows.shape[1] != width:
                raise self._ref.error(f"the adapter's {name} has shape {rows.shape}, {tensor} {(num_rows, width)}")
            self._changes.setdefault(tensor, []).append(TrainedRows(dict(zip(wanted, rows, strict=True)), width))
