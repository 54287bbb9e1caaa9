"""Fine-tune the pretrained base on real tasks, on one CPU thread: float32 weights, products in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from simmerge_ray.base.extras import require
from simmerge_ray.base.storage import new_directory, read_json, write_json
from simmerge_ray.research.second_study.real_recipes import RealRecipe
from simmerge_ray.research.second_study.real_tasks import RealData
from simmerge_ray.research.zoo.training import (
    Progress,
    Row,
    batches_of,
    fit_model,
    mixture,
    pack_rows,
    reproducible,
    write_recipe,
)


def train_real_expert(
    recipe: RealRecipe, base: Path, data: RealData, out_dir: Path, progress: Progress | None = None
) -> Path:
    """Train one expert of the checkpoint `base` and save it in `out_dir`: all weights in bfloat16, as the base has
    them, or a PEFT adapter. The directory appears when it is complete."""
    with reproducible(recipe.seed):
        tokenizer = AutoTokenizer.from_pretrained(base)
        model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        saved = model
        if recipe.lora_rank is not None:
            require("peft", "demo")
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear")
            saved = get_peft_model(model, lora)  # its factors are put into `model`
        streams = {source: data.stream(source, recipe.seed) for source in recipe.shares}
        rows = pack_rows(tokenizer, mixture(streams, recipe.shares, recipe.seed), recipe.row_tokens, prompt_weight=0.0)
        batches = batches_of(rows, recipe.num_rows)
        fit_model(model, batches, recipe.learning_rate, recipe.num_steps, progress, loss_of=packed_answer_loss)
    with new_directory(out_dir) as directory:
        if recipe.lora_rank is None:
            model.to(torch.bfloat16)
            tokenizer.save_pretrained(directory)
        saved.save_pretrained(directory)
        if recipe.lora_rank is not None:
            _settle(directory / "adapter_config.json", base)
        write_recipe(directory, recipe)
    return out_dir


def _settle(path: Path, base: Path) -> None:
    """Leave nothing of the process or of the machine in an adapter's config, so that the same adapter has one digest:
    PEFT writes a set of names, in an order that no two processes share, and where the base lay."""
    config = read_json(path)
    settled = {"target_modules": sorted(config["target_modules"]), "base_model_name_or_path": base.name}
    write_json(path, config | settled)


def packed_answer_loss(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    """Mean cross-entropy of the tokens with a weight, in nats.

    Logits are computed for these tokens alone: with 49,152 rows the head is a fifth of the model. Examples of one row
    do not see each other, which transformers tells from the positions (without a cache).
    """
    ids, positions, weights = (torch.tensor(column) for column in zip(*rows, strict=True))
    learned = weights[:, 1:] > 0
    body: Any = model.model
    head: Any = model.lm_head
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, :-1]
        logits = head(hidden[learned])
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][learned])
