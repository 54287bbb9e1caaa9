"""Merges of different vocabularies against mergekit 0.1.5, token by token, and of kinds of rules.

`python -m benchmarks.merge.vocabularies [--venv DIRECTORY]` makes tiny checkpoints with byte-level BPE tokenizers
(other merges, added tokens, other ids, padded embeddings; float32 untied and bfloat16 tied), runs every case by both,
and prints how far the tensors are from each other. mergekit numbers new tokens anew in every process, so rows are
compared by token; so are the tokens of a text. A case without `base_model` has another first model there every time.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.measuring import markdown, pinned_environment, script_parser
from benchmarks.merge.mergekit_env import DEFAULT_DIRECTORY, mergekit_python
from simmerge_ray.base.errors import InputError
from simmerge_ray.merging.request import read_request
from simmerge_ray.merging.write.output import WriteOptions

TEXTS = {
    "base": ["the quick brown fox jumps over the lazy dog, hello world, hello merging of models"],
    "code": ["def main(argument): return argument + 1; hello world 123 456 quick sort"],
    "french": ["le chat noir et le chien blanc, bonjour le monde"],
}
SENTENCE = "hello world, def main(argument): le chat noir <|tool|> <|code|> foo bar quick"
PEER = """
import json, logging, sys, yaml
logging.disable(logging.CRITICAL)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
failed = {}
for name, text in json.loads(open(sys.argv[1]).read()).items():
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(config, f"{sys.argv[2]}/{name}", MergeOptions(quiet=True))
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {error}"[:80]
open(sys.argv[3], "w").write(json.dumps(failed))
"""


def tokenizer(kind: str, size: int, added: tuple[str, ...] = (), shuffled: bool = False) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS[kind] * 5, trainer)
    if shuffled:
        content = json.loads(made.to_str())
        ids = list(content["model"]["vocab"].values())
        random.Random(0).shuffle(ids)
        content["model"]["vocab"] = dict(zip(content["model"]["vocab"], ids, strict=True))
        content["added_tokens"][0]["id"] = content["model"]["vocab"]["<|end|>"]
        made = Tokenizer.from_str(json.dumps(content))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    fast.add_tokens([AddedToken(text, special=text.startswith("<")) for text in added])
    return fast


def make_zoo(root: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    zoo = {
        "base": tokenizer("base", 300),
        "added": tokenizer("base", 300, ("<|tool|>", "foo bar")),
        "code": tokenizer("code", 320, ("<|code|>",)),
        "french": tokenizer("french", 310, ("<|tool|>",)),
        "shuffled": tokenizer("base", 300, shuffled=True),
        "padded": tokenizer("base", 300),
    }
    for seed, (name, one) in enumerate(zoo.items()):
        for suffix, tied, dtype in (("", False, torch.float32), ("-16", True, torch.bfloat16)):
            num_rows = len(one.get_vocab()) + (12 if name == "padded" else 0)
            torch.manual_seed(seed)
            config = LlamaConfig(
                **sizes, vocab_size=num_rows, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0
            )
            LlamaForCausalLM(config).to(dtype).save_pretrained(root / f"{name}{suffix}")
            one.save_pretrained(root / f"{name}{suffix}")


def cases(root: Path) -> dict[str, str]:
    """mergekit files by name, as JSON."""

    def case(weights: Mapping[str, float], base: str | None = "base", method: str = "linear", **more: Any) -> str:
        models: list[dict[str, Any]] = [{"model": str(root / name)} for name in weights]
        for model, weight in zip(models, weights.values(), strict=True):
            model |= {"parameters": {"weight": weight}} if method != "slerp" else {}
        document: dict[str, Any] = {"merge_method": method, "models": models, **more}
        if base is not None:
            document["base_model"] = str(root / base)
        return json.dumps(document)

    union = {"tokenizer_source": "union"}
    found = {}
    for name in ("added", "code", "shuffled", "padded", "french"):
        pair, pair_16 = {"base": 0.3, name: 0.7}, {"base-16": 0.3, f"{name}-16": 0.7}
        found[f"union, {name}"] = case(pair, **union)
        found[f"base, {name}"] = case(pair, tokenizer_source="base")
        found[f"model, {name}"] = case(pair, tokenizer_source=str(root / name))
        found[f"union, {name}, bf16"] = case(pair_16, "base-16", **union)
        found[f"union, {name}, bf16 as float32"] = case(pair_16, "base-16", dtype="float32", **union)
    three, three_16 = {"base": 0.2, "added": 0.3, "code": 0.5}, {"base-16": 0.2, "added-16": 0.3, "french-16": 0.5}
    found["union of three"] = case(three, **union)
    found["union of three, bf16"] = case(three_16, "base-16", **union)
    found["means, no base"] = case({"french": 0.2, "added": 0.3, "code": 0.5}, None, **union)
    found["means, no base, bf16"] = case({"french-16": 0.2, "added-16": 0.3, "code-16": 0.5}, None, **union)
    apart = {"added": 0.3, "code": 0.5}
    found["ties"] = case(apart, method="ties", parameters={"density": 0.6}, **union)
    found["slerp"] = case({"base": 1, "code": 1}, method="slerp", parameters={"t": 0.4}, **union)
    found["padding to 64"] = case({"base": 0.3, "code": 0.7}, tokenizer={"source": "union", "pad_to_multiple_of": 64})
    rules = {
        "<|tool|>": {"source": str(root / "added")},
        "<new>": {"source": {"kind": "zero"}},
        "<|code|>": {"source": {"kind": "model_token", "model": str(root / "base"), "token": "t"}},
        "quick": {"source": {"kind": "model_token", "model": str(root / "added"), "token_id": 7}, "force": True},
    }
    found["rules of tokens, padding"] = case(
        three, tokenizer={"source": "union", "tokens": rules, "pad_to_multiple_of": 8}
    )
    found["chat template"] = case({"base": 0.3, "code": 0.7}, chat_template="chatml", **union)
    return found


def compared(ours: Path, theirs: Path) -> list[object]:
    """[largest difference relative to the tensor, elements that differ, notes]"""
    from transformers import AutoTokenizer

    first, other = (load_file(path / "model.safetensors") for path in (ours, theirs))
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (ours, theirs)]
    ids = [one.get_vocab() for one in tokenizers]
    notes = [] if ids[0].keys() == ids[1].keys() and first.keys() == other.keys() else ["other tokens or tensors"]
    tokens, worst, unequal = sorted(ids[0].keys() & ids[1].keys()), 0.0, 0
    for name in first.keys() & other.keys():
        tensor, peer = first[name], other[name]
        if tensor.shape != peer.shape or tensor.dtype != peer.dtype:
            notes.append(f"{name}: {tensor.dtype} {list(tensor.shape)}, there {peer.dtype} {list(peer.shape)}")
            continue
        if "embed" in name or "lm_head" in name:
            padding = list(range(len(tokens), len(tensor)))
            tensor = tensor[[*(ids[0][token] for token in tokens), *padding]]
            peer = peer[[*(ids[1][token] for token in tokens), *padding]]
        worst = max(worst, float((tensor.float() - peer.float()).abs().max() / peer.float().abs().max()))
        unequal += int((tensor != peer).sum())
    if len({tuple(one.tokenize(SENTENCE)) for one in tokenizers}) > 1:
        notes.append("a text is cut otherwise")
    if tokenizers[0].chat_template != tokenizers[1].chat_template:
        notes.append("the template's text is ours")
    return [f"{worst:.0e}" if unequal else "0", unequal, "; ".join(notes)]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--venv", type=Path, default=DEFAULT_DIRECTORY, help="mergekit's environment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vocabularies-") as name:
        root = Path(name)
        make_zoo(root / "zoo")
        every = cases(root / "zoo")
        (root / "cases.json").write_text(json.dumps(every))
        python = mergekit_python(arguments.venv.absolute())
        environment = pinned_environment() | {"PYTHONPATH": ""}
        command = [python, "-c", PEER, root / "cases.json", root / "peer", root / "failed.json"]
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        failed = json.loads((root / "failed.json").read_text())
        os.makedirs(root / "ours")
        rows: list[list[object]] = []
        for title, text in every.items():
            (root / "case.yml").write_text(text)
            try:
                read_request(root / "case.yml", root / "ours" / title).write(WriteOptions(num_threads=1))
            except InputError as error:
                rows.append([title, "-", "-", f"refused here: {error}"[:100]])
                continue
            if title in failed:
                rows.append([title, "-", "-", f"failed there: {failed[title]}"])
            else:
                rows.append([title, *compared(root / "ours" / title, root / "peer" / title)])
        print(markdown(["case", "largest difference", "elements that differ", ""], rows))


if __name__ == "__main__":
    main()
