"""Small sound files of every format, ways to damage them, and the commands that read them, run in this process."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st
from safetensors.numpy import save_file

SHAPES = {"model.embed_tokens.weight": (6, 4), "model.layers.0.mlp.up_proj.weight": (5, 4), "model.norm.weight": (4,)}
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 5, "vocab_size": 6, "tie_word_embeddings": True,
}  # fmt: skip
ADDED = {"id": 2, "content": "<unk>", "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
ADDED |= {"normalized": False}
TOKENIZER = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}, "added_tokens": [ADDED]}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "added_tokens_decoder": {"2": {"content": "<unk>", "special": True}},
    "chat_template": "{{ messages }}",
}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "fan_in_fan_out": False}
STEP = {"left": "a", "right": "b", "operator": "linear", "weight": 0.5, "parameters": {}}
PATHS = {"checkpoints": {"a": "a", "b": "b"}, "base": {"id": "base", "path": "base"}}
MEMBERS = [{"checkpoint": "a", "weight": 1.0}, {"checkpoint": "b", "weight": [0, 0.5]}]
RECIPE = {"operator": "ties", "parameters": {"density": 0.5}, "members": MEMBERS}
MERGEKIT: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": [0.2, 0.8], "density": 0.5}},
        {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}},
    ],
    "parameters": {"normalize": True},
    "dtype": "float32",
}


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    """Three tensors, a config and a tokenizer: what a merge reads."""
    path.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    tensors = {name: generator.random(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return path


def shard(path: Path) -> None:
    """A file for each tensor, and an index."""
    weight_map = {}
    for number, (name, shape) in enumerate(SHAPES.items(), 1):
        file = f"model-{number:05}-of-{len(SHAPES):05}.safetensors"
        save_file({name: np.ones(shape, np.float32)}, path / file)
        weight_map[name] = file
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    module = "base_model.model.model.layers.0.mlp.up_proj"
    pair = {
        f"{module}.lora_A.weight": np.ones((2, 4), np.float32),
        f"{module}.lora_B.weight": np.ones((5, 2), np.float32),
    }
    save_file(pair, path / "adapter_model.safetensors")


def write_files(root: Path) -> Path:
    """Checkpoints `base`, `a`, `b` (sharded) and an adapter `lora`, with plans, a mergekit file, a catalogue, tasks."""
    for seed, name in enumerate(("base", "a", "b")):
        write_checkpoint(root / name, seed)
    shard(root / "b")
    write_adapter(root / "lora")
    (root / "plan.json").write_text(json.dumps({"steps": [STEP], **PATHS, "predicted": None}))
    (root / "lora.json").write_text(json.dumps({"steps": [STEP], **PATHS, "adapters": {"a": "lora"}}))
    (root / "recipe.json").write_text(json.dumps(RECIPE | PATHS))
    (root / "merge.yaml").write_text(yaml.safe_dump(MERGEKIT))
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]
    union = {"merge_method": "linear", "models": models, "tokenizer_source": "union"}
    (root / "union.yaml").write_text(yaml.safe_dump(union))
    entries = [{"id": "a", "path": "a", "task": "add", "adapter": "lora"}, {"id": "b", "path": "b"}]
    (root / "catalogue.yaml").write_text(
        yaml.safe_dump({"base": {"id": "base", "path": "base"}, "checkpoints": entries})
    )
    (root / "tasks").mkdir()
    settings = {"settings": {"metric": "exact_match", "max_new_tokens": 4, "stop": ["\n"]}}
    items = [{"prompt": f"1+{n}=", "target": str(n + 1)} for n in range(3)]
    (root / "tasks" / "add.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (settings, *items)))
    return root


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: of the process. said: on both streams."""

    code: int
    said: str


@cache
def _command() -> Any:
    """All commands; the library makes them anew at each call of the app, which takes longer than most of them."""
    from typer.main import get_command

    from simmerge_ray.cli.app import app

    return get_command(app)


def run(*arguments: Any, cwd: Path | None = None) -> Ended:
    """`simmerge ARGUMENTS` in this process; what would be a traceback there is an exception here."""
    from simmerge_ray.cli.app import run_command

    before, said = signal.getsignal(signal.SIGTERM), io.StringIO()
    there = contextlib.chdir(cwd) if cwd is not None else contextlib.nullcontext()
    try:
        with there, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run_command(lambda: _command()([str(one) for one in arguments], prog_name="simmerge"))
    except SystemExit as ended:
        return Ended(int(ended.code or 0), said.getvalue())
    finally:
        signal.signal(signal.SIGTERM, before)
    raise AssertionError("a command exits")


def contents(root: Path) -> dict[str, int]:
    """Every file below a directory with its time of change."""
    return {
        os.path.join(where, name): os.lstat(os.path.join(where, name)).st_mtime_ns
        for where, _, names in os.walk(root)
        for name in names
    }


# Values that nobody expects, and text that stands for itself in JSON and YAML.
RAW = {
    "@deep": "[" * 3000 + "]" * 3000, "@deeper": '{"a":' * 100_000, "@nan": "NaN", "@inf": "Infinity",
    "@huge": "9" * 5000, "@large": "1e999", "@half": '"\\ud800"', "@nul": '"a\\u0000b"',
    "@long": '"' + "x" * 300_000 + '"',
    "@twice": '{"a": 1, "a": 2}', "@wide": "[" + "0," * 50_000 + "0]", "@bare": "]", "@bits": "\x00\x01",
}  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.5, 1e300, 1e-300, "", "a", "base",
    "b", "~nobody", "~root", "../a", "/", "/dev/zero", "/proc/self/mem", "s3://", "file:///etc", "F32", "I64", "F4",
    "é\u2028", "\n", "x" * 5000,
    [], {}, [[]], [None], [0], [1, 2, 3], ["a", "a"], {"a": 1}, {"a": None}, {"": ""}, *RAW,
]  # fmt: skip


def places_of(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside another, its own first."""
    yield where
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_of(inner, (*where, key))


@st.composite
def changed_values(draw: Any, value: Any) -> Any:
    """A JSON value with one to three changes: something replaced, dropped, added or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        ways = list(places_of(value))
        *path, last = (None, *draw(st.sampled_from(ways)))
        if last is None:  # all of it
            return copy.deepcopy(draw(st.sampled_from(VALUES)))
        holder = value
        for key in path[1:]:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "swap"]))
        new = copy.deepcopy(draw(st.sampled_from(VALUES) | st.integers(-3, 80)))
        if what == "drop":
            del holder[last]
        elif what == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["", "a", "__metadata__", "weight", "merge_method", "<<", "x" * 300]))] = new
        elif what == "swap":
            others = list(holder) if isinstance(holder, dict) else range(len(holder))
            other = draw(st.sampled_from(sorted(others, key=str)))
            holder[last], holder[other] = holder[other], holder[last]
        else:
            holder[last] = new
    return value


def text_of(value: Any) -> str:
    """JSON, with what stands for itself put in."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


PIECES = [b"\0", b"\xff", b"[", b"{", b'"', b"\n", b": ", b"- ", b"&a *a"]


@st.composite
def changed_bytes(draw: Any, data: bytes) -> bytes:
    """Bytes with one to three changes: cut off, doubled, overwritten, or something put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["cut", "drop", "flip", "put", "double"]))
        if what == "cut":
            data = data[:at]
        elif what == "drop":
            data = data[:at] + data[at + draw(st.integers(1, 20)) :]
        elif what == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        elif what == "double":
            data = data[:at] + data[: draw(st.integers(0, 200))] + data[at:]
        else:
            data = data[:at] + draw(st.sampled_from(PIECES)) + data[at:]
    return data


def with_header(data: bytes, header: str, length: int | None = None, tail: bytes | None = None) -> bytes:
    """A safetensors file with another header; length, tail: what it says its length is, and other tensors."""
    old = int.from_bytes(data[:8], "little")
    text = header.encode("utf-8", "surrogatepass")
    said = len(text) if length is None else length
    return said.to_bytes(8, "little") + text + (data[8 + old :] if tail is None else tail)


def header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


@st.composite
def changed_safetensors(draw: Any, data: bytes) -> bytes:
    """Another header, another length of it, or fewer or more bytes of tensors."""
    what = draw(st.sampled_from(["header", "header", "header", "bytes", "length", "tail"]))
    if what == "header":
        return with_header(data, text_of(draw(changed_values(header_of(data)))))
    if what == "length":
        length = draw(st.sampled_from([0, 1, 2, 7, 8, 9, 100, 2**31, 2**63, 2**64 - 1]) | st.integers(0, len(data) + 9))
        return length.to_bytes(8, "little") + data[8:]
    if what == "tail":
        return data[: draw(st.integers(8, len(data)))] + b"\0" * draw(st.integers(0, 64))
    return draw(changed_bytes(data))


def write_learned(root: Path) -> Path:
    """Beside the others: a signal table, a selector, a catalogue of their checkpoints, labels, a log of a service."""
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.search.labels import LabelStore
    from simmerge_ray.service.bandit.policy import Noise
    from simmerge_ray.service.log.database import upgrade_database
    from simmerge_ray.service.log.events import (
        Activation,
        ArmAdded,
        DecisionClosed,
        RewardGiven,
        RewardVoided,
        WarmStart,
    )
    from simmerge_ray.service.log.replica import Replica
    from tests.unit.selector.made_up import made_up_labels, made_up_table
    from tests.unit.service.event_logs import ARMS, decision, encode, opened, prior
    from tests.unit.service.published import write_published

    table = made_up_table("s1", 4)
    entries = [{"id": name, "path": "a"} for name in table.checkpoint_ids]
    content = {"base": {"id": "s1-base", "path": "base"}, "checkpoints": entries}
    (root / "made-up.yaml").write_text(yaml.safe_dump(content))
    digests = load_catalogue(root / "made-up.yaml").digests()  # `plan` looks at the checkpoints of a pair
    table = replace(table, provenance={**table.provenance, "checkpoints": digests})
    write_published(root, table=table)
    LabelStore(root / "labels").append(made_up_labels(table, 4)[:4])
    LabelStore(root / "labels").append(made_up_labels(table, 4)[4:8])
    upgrade_database(url := f"sqlite:///{root}/service.db")
    with opened(url) as log:
        made = decision("d0"), RewardGiven("d0", 0.5), RewardVoided("d0", "wrong"), RewardGiven("d0", 0.25)
        others = decision("d1"), DecisionClosed("d1", "no"), decision("d2"), ArmAdded("slerp", prior())
        for event in (Activation("m0"), WarmStart({arm: prior() for arm in ARMS}, Noise(0.1)), *made, *others):
            log.append(event)
        replica = Replica(log, encode)
        replica.catch_up()
        replica.save_snapshot()
    return root
