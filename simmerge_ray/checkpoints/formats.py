"""Checkpoints in formats that hold no plain weights: by what they are known, and what their owner can do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

_ORIGINAL = "merge the checkpoint that it was made of (`base_model` of its model card), or dequantise it first"
_LOAD = "`AutoModelForCausalLM.from_pretrained(PATH{})`{}, and `save_pretrained`"
# By name of the method: what else to do than to take the original.
_REMEDIES = {
    "bitsandbytes": _LOAD.format("", ", `model.dequantize()`"),
    "fp8": _LOAD.format(", quantization_config=FineGrainedFP8Config(dequantize=True)", ""),
    "mxfp4": _LOAD.format(", quantization_config=Mxfp4Config(dequantize=True)", ""),
    "compressed-tensors": _LOAD.format(", quantization_config=CompressedTensorsConfig(dequantize=True)", ""),
    "higgs": _LOAD.format("", ", `model.dequantize()`"),
}
_TITLES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "mxfp4": "MXFP4"}
# Names of tensors by which a method is known where `config.json` says nothing.
_MARKS = (
    ("bitsandbytes", re.compile(r"\.weight\.(absmax|quant_map|quant_state|nested_absmax)|\.SCB$")),
    ("compressed-tensors", re.compile(r"\.weight_packed$")),
    ("gptq", re.compile(r"\.g_idx$")),
    ("awq", re.compile(r"\.qweight$")),
    ("mxfp4", re.compile(r"_proj_blocks$")),
    ("fp8", re.compile(r"\.weight_scale(_inv)?$")),
)
_WEIGHT_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class HasDtype(Protocol):
    """A tensor of a header."""

    @property
    def dtype(self) -> str: ...


def quantisation(specs: Mapping[str, HasDtype], config: Mapping[str, Any], plain_dtypes: Iterable[str]) -> str | None:
    """What is quantised in a checkpoint and what to do, for a message; None where nothing is."""
    asked = config.get("quantization_config")
    dtypes = sorted({spec.dtype for spec in specs.values()} - set(plain_dtypes))
    found = next((method for method, mark in _MARKS if any(mark.search(name) for name in specs)), None)
    if not asked and not dtypes and found is None:
        return None
    method = asked.get("quant_method") if isinstance(asked, Mapping) else None
    if method is None and isinstance(asked, Mapping) and (asked.get("load_in_4bit") or asked.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str):
        method = found or ("fp8" if any(dtype.startswith("F8") for dtype in dtypes) else None)
    title = f"{_TITLES.get(method, method[:40])}, " if method else ""
    reason = f"tensors of dtype {', '.join(dtypes)}" if dtypes else "quantization_config" if asked else "its tensors"
    remedy = f": {_REMEDIES[method]}" if method in _REMEDIES else ""
    return f"is quantised ({title}{reason}); {_ORIGINAL}{remedy}"


def is_pickled(names: Iterable[str]) -> bool:
    """Whether the weights of a directory with these files are there as pickles (`.bin`)."""
    return any(name in _WEIGHT_FILES for name in names)


def what_is_there(names: Iterable[str]) -> str:
    """What to do with a directory that holds other weights than those that are read; empty where it holds none."""
    names = sorted(names)
    if gguf := next((name for name in names if name.endswith(".gguf")), None):
        return f"; {gguf} is a quantised GGUF file: {_ORIGINAL}: {_LOAD.format(f', gguf_file={gguf!r}', '')}"
    for suffix, kind in ((".bin", "a pickle"), (".pth", "a pickle"), (".pt", "a pickle"), (".ckpt", "a pickle")):
        if other := next((name for name in names if name.endswith(suffix)), None):
            return (
                f"; {other} is {kind} under a name that transformers does not load; load it with what wrote it, and "
                "save it with `save_pretrained`"
            )
    for suffix, kind in ((".msgpack", "Flax"), (".h5", "TensorFlow")):
        if any(name.endswith(suffix) for name in names):
            return f"; its weights are {kind}'s; convert them with a transformers release below 5"
    return ""
