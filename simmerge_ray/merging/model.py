"""A checkpoint as a transformers model in memory: built, loaded, and given the weights of another one in place."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.base.extras import import_transformers
from simmerge_ray.checkpoints.references import CheckpointRef, local_files, read_config
from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.merging.engine.whole import flat_tensor

# Of config.json; what else differs may change the outputs.
_COSMETIC_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def load_model(ref: CheckpointRef, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The checkpoint as a transformers causal language model, eager attention, in evaluation mode.

    The weights of one in a store are read by ranges into a model that is built from its `config.json`.

    Raises CheckpointError: transformers cannot load it, or a weight of it is absent or not finite.
    """
    model = None if isinstance(ref.path, Path) else built_model(ref, dtype)
    if model is None or not put_weights(model, ref):  # the names of its files may not cover the parameters
        with local_files(ref, weights=True) as directory:
            model = _loaded_model(ref, directory, dtype)
    check_finite(model, ref)
    return model.eval().to(device)


def built_model(ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the checkpoint's architecture, for weights that are put into it, or a CheckpointError."""
    transformers = import_transformers()
    with local_files(ref) as directory:
        try:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
            if (directory / "generation_config.json").exists():
                model.generation_config = transformers.GenerationConfig.from_pretrained(
                    directory, local_files_only=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise ref.error(f"transformers cannot load it: {error}") from error
    return model


def _loaded_model(ref: CheckpointRef, directory: Path, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError

    try:
        model, info = import_transformers().AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ref.error(f"transformers cannot load it: {error}") from error
    if absent := sorted(info["missing_keys"]):  # transformers would only warn, and draw random numbers for them
        raise CheckpointError(f"checkpoint {ref.id!r} lacks tensors: {', '.join(absent[:5])}")
    if ref.adapter is not None and not put_weights(model, ref):
        raise ref.error("its adapter's tensors have no place in the model")
    return model


def check_finite(model: nn.Module, ref: CheckpointRef) -> None:
    """Raises CheckpointError naming the first tensor that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        # A finite sum has finite terms, and is four times as fast; a sum of finite terms may still overflow.
        if not bool(torch.isfinite(parameter.detach().sum())) and not bool(torch.isfinite(parameter).all()):
            raise ref.error(f"tensor {name} holds NaN or infinity")


def put_weights(model: Any, ref: CheckpointRef) -> bool:
    """`put_tensors` of a checkpoint, its adapter's change included; much cheaper than building another model."""
    source = TensorSource(ref)
    try:
        names = source.specs.items()
        return put_tensors(model, ((n, flat_tensor(source.read_whole(n)).reshape(spec.shape)) for n, spec in names))
    finally:
        source.close()


@torch.no_grad()
def put_tensors(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> bool:
    """Put named tensors into a model of the same architecture; those it does not know are left out, as by transformers.

    Returns False, with the model unusable, where the names do not cover the model's parameters one by one; then load
    it anew.
    """
    parameters = dict(model.named_parameters())  # tied ones once
    aliases = {name: p for name, p in model.named_parameters(remove_duplicate=False)} | dict(model.named_buffers())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    filled: set[int] = set()
    for name, values in tensors:
        target = aliases.get(name, aliases.get(prefix + name))
        if target is None:
            continue
        if target.shape != values.shape:
            return False
        if id(target) in filled and not torch.equal(target, values.to(target)):
            return False  # tied in the model, yet stored twice with other values: transformers does not tie these
        target.copy_(values)
        filled.add(id(target))
    return all(id(parameter) in filled for parameter in parameters.values())


def config_key(ref: CheckpointRef) -> str:
    """What `config.json` says of the computation: a model built from it can take weights of the same key only.

    Checkpoints of one catalogue have the same shapes, yet may differ in the base of the rotary embedding and the like.
    """
    return json.dumps({key: v for key, v in read_config(ref).items() if key not in _COSMETIC_KEYS}, sort_keys=True)


def end_of_text(ref: CheckpointRef, config: Any) -> Tensor:
    """The tokens that end a text, int64: of `generation_config.json` (CheckpointError: damaged), else of the config."""
    from transformers import GenerationConfig

    text = config.get_text_config()
    found = text.eos_token_id
    with local_files(ref) as directory:
        if (directory / "generation_config.json").exists():
            try:
                found = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
            except (OSError, ValueError) as error:
                raise ref.error(f"cannot read its generation_config.json: {error}") from error
    ends = torch.tensor([] if found is None else found, dtype=torch.int64).reshape(-1)
    return ends[ends < text.vocab_size]
