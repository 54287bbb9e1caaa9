"""Training: repeatable, whole or absent, and saved as what transformers and the shipped base expect."""

import json
from dataclasses import replace
from importlib.resources import files
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from simmerge_ray.research.zoo.domains import DOMAINS, evaluation_items
from simmerge_ray.research.zoo.model import MAX_POSITIONS, build_tokenizer
from simmerge_ray.research.zoo.recipe import BASE_RECIPE, ExpertRecipe
from simmerge_ray.research.zoo.training import (
    ROW_TOKENS,
    packed_rows,
    recalled_rows,
    repeated_rows,
    train_base,
    train_expert,
)

TINY_BASE = replace(
    BASE_RECIPE, num_copy_steps=1, num_steps=2, num_rows=2, num_layers=1, hidden_size=32, intermediate_size=32
)
TINY_EXPERT = ExpertRecipe("tiny", "math", learning_rate=1e-3, num_steps=2, replay=0.1, num_rows=2)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_base(TINY_BASE, tmp_path_factory.mktemp("zoo") / "base")


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_base_training_repeats_to_the_bit(base_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # the global generator decides nothing
    assert _same(_weights(train_base(TINY_BASE, tmp_path / "again")), _weights(base_dir))
    assert not _same(_weights(train_base(replace(TINY_BASE, seed=1), tmp_path / "other")), _weights(base_dir))


@pytest.mark.parametrize("lora_rank", [None, 2], ids=["full", "lora"])
def test_expert_is_a_full_checkpoint_like_its_base_and_repeats_to_the_bit(
    base_dir: Path, tmp_path: Path, lora_rank: int | None
) -> None:
    recipe = replace(TINY_EXPERT, lora_rank=lora_rank)
    expert, base = _weights(train_expert(recipe, base_dir, tmp_path / "expert")), _weights(base_dir)
    assert {name: tensor.shape for name, tensor in expert.items()} == {name: t.shape for name, t in base.items()}
    assert not _same(expert, base)
    assert _same(expert, _weights(train_expert(recipe, base_dir, tmp_path / "again")))
    embeddings_moved = not torch.equal(expert["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert embeddings_moved == (lora_rank is None)
    assert all((tmp_path / "expert" / name).is_file() for name in ("config.json", "tokenizer.json"))
    assert json.loads((tmp_path / "expert" / "recipe.json").read_text())["digest"] == recipe.digest()


def test_training_leaves_threads_and_the_global_generator_as_they_were(base_dir: Path, tmp_path: Path) -> None:
    num_threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    train_expert(TINY_EXPERT, base_dir, tmp_path / "expert")
    assert torch.get_num_threads() == num_threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_progress_counts_every_step_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train_base(TINY_BASE, tmp_path / "base", lambda step, num_steps: seen.append((step, num_steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_interrupted_training_leaves_nothing_and_keeps_what_was_there(base_dir: Path, tmp_path: Path) -> None:
    def interrupt(step: int, num_steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_expert(TINY_EXPERT, base_dir, tmp_path / "expert", interrupt)
    assert list(tmp_path.iterdir()) == []
    before = _weights(train_expert(TINY_EXPERT, base_dir, tmp_path / "expert"))
    with pytest.raises(KeyboardInterrupt):
        train_expert(replace(TINY_EXPERT, seed=5), base_dir, tmp_path / "expert", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]
    assert _same(before, _weights(tmp_path / "expert"))


def test_packed_rows_hold_whole_examples_and_weigh_only_what_is_learned() -> None:
    tokenizer = build_tokenizer()
    for row in islice(packed_rows(tokenizer, {domain: 1.0 for domain in DOMAINS}, seed=0), 50):
        assert len(row.ids) == len(row.positions) == len(row.weights) == ROW_TOKENS
        assert row.ids.count(tokenizer.bos_token_id) == row.ids.count(tokenizer.eos_token_id) > 0
        for token, position, weight in zip(*row, strict=True):
            if token == tokenizer.bos_token_id:
                assert position == 0
            assert (weight == 0) == (token in (tokenizer.bos_token_id, tokenizer.pad_token_id))


def test_rows_are_full_and_positions_start_again_at_each_example() -> None:
    tokenizer = build_tokenizer()
    for row in islice(packed_rows(tokenizer, {"math": 1.0, "code": 1.0}, seed=0), 20):
        assert len(row.ids) == len(row.positions) == len(row.weights) == ROW_TOKENS
        starts = [index for index, token in enumerate(row.ids) if token == tokenizer.bos_token_id]
        assert len(starts) >= 2 and all(row.positions[start] == 0 for start in starts)
        for begin, end in zip(starts, starts[1:], strict=False):
            assert row.positions[begin:end] == list(range(end - begin))


def test_repeated_rows_count_only_what_can_be_copied() -> None:
    for row in islice(repeated_rows(build_tokenizer(), seed=0), 20):
        period = row.weights.index(1.0) - 1
        assert row.ids[1 + period :] == row.ids[1 : ROW_TOKENS - period]


def test_shipped_base_loads_and_was_made_by_the_recipe() -> None:
    shipped = files("simmerge_ray.research.zoo") / "base"
    assert json.loads((shipped / "recipe.json").read_text())["digest"] == BASE_RECIPE.digest()
    model = AutoModelForCausalLM.from_pretrained(str(shipped))
    tokenizer = AutoTokenizer.from_pretrained(str(shipped))
    assert model.config.max_position_embeddings == MAX_POSITIONS
    assert model.config.head_dim == 32
    built = build_tokenizer()
    for domain in DOMAINS:
        for item in evaluation_items(domain, 20):
            assert tokenizer(item.prompt).input_ids == built(item.prompt).input_ids
            assert tokenizer.decode(tokenizer(item.prompt).input_ids, skip_special_tokens=True) == item.prompt


def test_recalled_rows_count_a_value_from_its_second_time_alone() -> None:
    tokenizer = build_tokenizer()
    for row in islice(recalled_rows(tokenizer, seed=0), 20):
        assert len(row.ids) == len(row.positions) == len(row.weights) == ROW_TOKENS
        passages = [tokenizer.decode(row.ids[start : start + 8]) for start in range(1, ROW_TOKENS - 8, 8)]
        for number, (passage, start) in enumerate(zip(passages, range(1, ROW_TOKENS, 8), strict=False)):
            known = passage in passages[:number]
            assert row.weights[start : start + 8] == [0.0] * 4 + [float(known)] * 3 + [0.0]
            assert known or passage[:3] not in {one[:3] for one in passages[:number]}  # a name has one value
