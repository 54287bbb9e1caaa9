"""Train the base and its experts: plain functions of one process, seeded, bit for bit repeatable on one machine.

They run on one thread whatever the process is set to, because the order of float32 sums depends on the threads.
An output directory appears under its name when it is complete, never before.
"""

import json
import math
import random
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from simmerge_ray.base.extras import require
from simmerge_ray.base.storage import new_directory
from simmerge_ray.research.zoo.domains import Example
from simmerge_ray.research.zoo.forms import training_stream
from simmerge_ray.research.zoo.model import build_model, build_tokenizer
from simmerge_ray.research.zoo.recipe import BaseRecipe, ExpertRecipe, TrainingRecipe

ROW_TOKENS = 64
PROMPT_WEIGHT = 0.1  # of a prompt's tokens in the loss: most are random, but probes read the model's view of them
COPIED_CHARACTERS = string.ascii_lowercase + string.digits + string.ascii_uppercase + "=+,: "
Progress = Callable[[int, int], None]


class Row(NamedTuple):
    """ROW_TOKENS ids, their positions (0 at the start of each example) and their weights as targets in the loss."""

    ids: list[int]
    positions: list[int]
    weights: list[float]


RowLoss = Callable[[torch.nn.Module, list[Row]], torch.Tensor]


def train_base(recipe: BaseRecipe, out_dir: str | Path, progress: Progress | None = None) -> Path:
    """Train the base from scratch and save it, model and tokenizer, in `out_dir`.

    It first learns to copy, on repeated random strings, and then the mixture of all domains. Without the first part
    the attention heads that look something up do not form, and retrieval stays at chance for thousands of steps.
    """

    def shifted(offset: int) -> Progress | None:
        num_steps = recipe.num_copy_steps + recipe.num_steps
        return None if progress is None else lambda step, _: progress(offset + step, num_steps)

    with reproducible(recipe.seed):
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, recipe.num_layers, recipe.hidden_size, recipe.intermediate_size)
        batches = batches_of(_copied_rows(tokenizer, recipe.seed, recipe.recall), recipe.num_rows)
        fit_model(model, batches, recipe.copy_learning_rate, recipe.num_copy_steps, shifted(0), _constant)
        batches = batches_of(packed_rows(tokenizer, dict(recipe.shares), recipe.seed), recipe.num_rows)
        fit_model(model, batches, recipe.learning_rate, recipe.num_steps, shifted(recipe.num_copy_steps))
    return _save(model, tokenizer, recipe, Path(out_dir))


def train_expert(
    recipe: ExpertRecipe, base_dir: str | Path, out_dir: str | Path, progress: Progress | None = None
) -> Path:
    """Fine-tune the checkpoint in `base_dir` and save a full checkpoint in `out_dir`; LoRA factors are merged in."""
    with reproducible(recipe.seed):
        tokenizer = AutoTokenizer.from_pretrained(base_dir)
        model = LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        batches = batches_of(packed_rows(tokenizer, recipe.shares(), recipe.seed), recipe.num_rows)
        if recipe.lora_rank is None:
            fit_model(model, batches, recipe.learning_rate, recipe.num_steps, progress)
        else:
            require("peft", "demo")
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear")
            adapted = get_peft_model(model, lora)
            fit_model(adapted, batches, recipe.learning_rate, recipe.num_steps, progress)
            model = adapted.merge_and_unload()
    return _save(model, tokenizer, recipe, Path(out_dir))


def train_checkpoint(recipe: BaseRecipe | ExpertRecipe, base_dir: Path | None, out_dir: Path) -> Path:
    """Train a base, or an expert of the one in `base_dir`."""
    if isinstance(recipe, BaseRecipe):
        return train_base(recipe, out_dir)
    assert base_dir is not None
    return train_expert(recipe, base_dir, out_dir)


def batches_of(rows: Iterator[Row], num_rows: int) -> Iterator[list[Row]]:
    while True:
        yield [next(rows) for _ in range(num_rows)]


def packed_rows(tokenizer: PreTrainedTokenizerFast, shares: Mapping[str, float], seed: int) -> Iterator[Row]:
    """Endless rows of training examples of the domains (see `forms.training_stream`), drawn with the weights
    `shares`."""
    streams = {name: training_stream(name, seed) for name in shares}
    return pack_rows(tokenizer, mixture(streams, shares, seed))


def mixture(streams: Mapping[str, Iterator[Example]], shares: Mapping[str, float], seed: int) -> Iterator[Example]:
    """Endless examples, each from a stream that is drawn with the weights `shares`."""
    generator = random.Random(f"mixture/{seed}")
    while True:
        (name,) = generator.choices(list(shares), weights=list(shares.values()))
        yield next(streams[name])


def pack_rows(
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterator[Example],
    row_tokens: int = ROW_TOKENS,
    prompt_weight: float = PROMPT_WEIGHT,
) -> Iterator[Row]:
    """Endless rows of as many whole examples as fit, each `prompt target <eos>` with the tokenizer's `<bos>` if it puts
    one, then padding of weight 0. An example that is longer than a row is left out."""
    row = Row([], [], [])
    for example in examples:
        prompt = tokenizer(example.prompt).input_ids
        target = [*tokenizer(example.target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        num_tokens = len(prompt) + len(target)
        if num_tokens > row_tokens:
            continue
        num_free = row_tokens - len(row.ids)
        if num_tokens > num_free:
            row.ids.extend([tokenizer.pad_token_id] * num_free)
            row.positions.extend(range(num_free))
            row.weights.extend([0.0] * num_free)
            yield row
            row = Row([], [], [])
        row.ids.extend(prompt + target)
        row.positions.extend(range(num_tokens))
        row.weights.extend([0.0] + [prompt_weight] * (len(prompt) - 1) + [1.0] * len(target))


def repeated_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Row]:
    """Endless rows that repeat a random string of 4 to 24 characters; what can be copied counts in the loss."""
    generator = random.Random(seed)
    characters = tokenizer.convert_tokens_to_ids(list(COPIED_CHARACTERS))
    while True:
        num_characters = generator.randrange(4, 25)
        repeated = [generator.choice(characters) for _ in range(num_characters)]
        ids = [tokenizer.bos_token_id] + repeated * (ROW_TOKENS // num_characters + 1)
        num_random = num_characters + 1
        yield Row(ids[:ROW_TOKENS], list(range(ROW_TOKENS)), [0.0] * num_random + [1.0] * (ROW_TOKENS - num_random))


def recalled_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Row]:
    """Endless rows of two to four random pairs `name=value`, again and again in random order, with one separator and
    one end a row; a value counts in the loss from its second time. So looking up is learned many times a row, and by
    more than the separator before a value."""
    generator = random.Random(f"recalled/{seed}")
    characters = [character for character in COPIED_CHARACTERS if character.isalnum()]
    while True:
        last_letters = generator.sample(characters, generator.choice((2, 3, 4)))
        first_letters = generator.sample(characters, len(last_letters))
        pairs = {
            "".join([*generator.choices(characters, k=2), last]): "".join([first, *generator.choices(characters, k=2)])
            for last, first in zip(last_letters, first_letters, strict=True)
        }
        separator, end = generator.choice("=+,: "), generator.choice(" ,")
        text, weights, told = "", [0.0], set()
        while len(weights) < ROW_TOKENS:
            name = generator.choice([name for name in pairs if name not in told] or list(pairs))
            text += f"{name}{separator}{pairs[name]}{end}"
            weights += [0.0] * 4 + [float(name in told)] * 3 + [0.0]
            told.add(name)
        yield Row(tokenizer(text).input_ids[:ROW_TOKENS], list(range(ROW_TOKENS)), weights[:ROW_TOKENS])


def _copied_rows(tokenizer: PreTrainedTokenizerFast, seed: int, recall: float) -> Iterator[Row]:
    """Repeated strings, and as the share `recall` of all rows passages to look up."""
    generator = random.Random(f"copied/{seed}")
    repeated, recalled = repeated_rows(tokenizer, seed), recalled_rows(tokenizer, seed)
    while True:
        yield next(recalled if generator.random() < recall else repeated)


def _constant(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / 50)


def _cosine(step: int, num_steps: int) -> float:
    num_warmup = max(1, round(0.05 * num_steps))
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def fit_model(
    model: torch.nn.Module,
    batches: Iterator[list[Row]],
    learning_rate: float,
    num_steps: int,
    progress: Progress | None,
    schedule: Callable[[int, int], float] = _cosine,
    loss_of: RowLoss | None = None,
) -> None:
    """AdamW on the loss of each batch, by default `row_loss`; `schedule` scales the learning rate at each step."""
    loss_of = loss_of or row_loss
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, num_steps)
        loss = loss_of(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, num_steps)
    model.eval()


def row_loss(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    """Weighted mean cross-entropy of the next token, in nats."""
    ids, positions, weights = (torch.tensor(column) for column in zip(*rows, strict=True))
    weights = weights[:, 1:]
    # Positions start again at each example, as where it stands alone; attention crosses the border, as is usual in
    # packed training.
    logits = model(input_ids=ids, position_ids=positions).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread and a seeded global generator inside, both restored outside."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(num_threads)


def _save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe | ExpertRecipe, out_dir: Path
) -> Path:
    """Write a Hugging Face directory, which replaces a complete older one."""
    with new_directory(out_dir) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_recipe(directory, recipe)
    return out_dir


def write_recipe(directory: Path, recipe: TrainingRecipe) -> None:
    """`recipe.json`: what made the checkpoint, with the digest that says whether it is still current."""
    content = {"digest": recipe.digest(), "kind": type(recipe).__name__, **asdict(recipe)}
    (directory / "recipe.json").write_text(json.dumps(content, indent=2) + "\n")
