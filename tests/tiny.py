"""Tiny real checkpoints, made on the spot: a Llama of two layers with a character tokenizer, and noisy copies of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789+=-*;: >?.,ABC"


def write_tokenizer(path: Path, characters: str = CHARACTERS) -> None:
    """A character-level `PreTrainedTokenizerFast` with `<pad>` and `<eos>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)


def make_model(seed: int = 0, tied: bool = True, num_layers: int = 2, hidden_size: int = 64):
    """A small random LlamaForCausalLM in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(dict.fromkeys(CHARACTERS)) + 2,
            hidden_size=hidden_size,
            intermediate_size=96,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )


def save(model, path: Path, characters: str = CHARACTERS) -> Path:
    model.save_pretrained(path)
    write_tokenizer(path, characters)
    return path


def make_catalogue(
    root: Path,
    num_checkpoints: int = 3,
    tied: bool = True,
    noise: float = 0.05,
    tasks: tuple[str, ...] = ("add", "copy"),
) -> Path:
    """A base, `num_checkpoints` copies with noise on it, two probe sets and two tasks; the catalogue's path."""
    base = make_model(tied=tied)
    save(base, root / "base")
    entries = []
    for index in range(num_checkpoints):
        model = make_model(tied=tied)
        torch.manual_seed(100 + index)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
        save(model, root / f"m{index}")
        entries.append({"id": f"m{index}", "path": f"m{index}", "task": tasks[index % len(tasks)]})
    write_texts(root, tasks)
    path = root / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"base": {"id": "base", "path": "base"}, "checkpoints": entries}))
    return path


def write_texts(root: Path, tasks: tuple[str, ...] = ("add", "copy"), num_items: int = 24) -> None:
    """`probes/<task>.jsonl` and `tasks/<task>.jsonl` with short prompts of several lengths."""
    for directory in ("probes", "tasks"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    for number, task in enumerate(tasks):
        prompts = [f"{task[0]}{(7 * i + number) % 100}+{i}" + "=" * (1 + i % 3) for i in range(2 * num_items)]
        (root / "probes" / f"{task}.jsonl").write_text(
            "".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts[:num_items])
        )
        rows = [
            {"prompt": prompt, "target": CHARACTERS[i % 30], "metric": "contains", "max_new_tokens": 6}
            for i, prompt in enumerate(prompts[num_items:])
        ]
        (root / "tasks" / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
