"""A LoRA member is tuned by its factors as by the checkpoint that it makes; memory is stated before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import TokenBatch, load_probe_sets
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.model import load_model
from simmerge_ray.signals.candidates.answers import join_answers
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.tokens import tokenize_probes
from simmerge_ray.signals.tuning.memory import rows_at_once, stated_bytes
from simmerge_ray.signals.tuning.prepare import prepare_tuning
from simmerge_ray.signals.tuning.vectors import LowRankVector
from tests import tiny
from tests.unit.checkpoints.test_adapters import make_adapter


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_lora_member_is_its_checkpoint(tmp_path):
    tiny.save(tiny.make_model(tied=False), tmp_path / "base")
    other = tiny.make_model(tied=False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tiny.save(other, tmp_path / "full")
    tiny.write_texts(tmp_path)
    adapter, _ = make_adapter(tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    base = CheckpointRef("base", tmp_path / "base")
    lora = CheckpointRef("lora", tmp_path / "base", "base", adapter)
    tiny.save(load_model(lora), tmp_path / "written")
    config = TuneConfig(groups="block", max_tokens=4)
    found = []
    for member in (lora, CheckpointRef("lora", tmp_path / "written", "base")):
        refs = (CheckpointRef("full", tmp_path / "full", "base"), member)
        catalogue = Catalogue(refs, {"full": "add", "lora": "copy"}, base)
        batches = tokenize_probes(catalogue, load_probe_sets(tmp_path / "probes"), SignatureSpec(), 4)
        tuning = prepare_tuning(catalogue, batches, config)
        at = np.random.default_rng(0).uniform(0.2, 0.8, tuning.start.shape)
        found.append(
            (tuning, tuning.model.objective(at, tuning.batches, "kl", True), stated_bytes(catalogue, batches, config))
        )
    (low, of_low, low_bytes), (dense, of_dense, dense_bytes) = found
    assert any(isinstance(vector, LowRankVector) for vector in low.model.vectors[1].values())
    assert not any(isinstance(vector, LowRankVector) for vector in dense.model.vectors[1].values())
    for one, other_value in zip(of_low, of_dense, strict=True):
        np.testing.assert_allclose(one, other_value, rtol=2e-3, atol=1e-4)
    assert low_bytes < dense_bytes
    names = {name for name, _ in tiny.make_model(tied=False).named_parameters()}
    weights = low.recipe(at).weights
    for name in names:
        for row, weight in zip(at, weights, strict=True):
            group = low.model.group_names[[weight.of(name) == value for value in row].index(True)]
            assert not group or group in name


def test_answers_are_regrouped_with_their_own_probes():
    lengths = ((3, 5), (4, 2, 6))
    batches, written = [], []
    for of_batch in lengths:
        mask = torch.tensor([[int(place < length) for place in range(max(of_batch))] for length in of_batch])
        batches.append(TokenBatch(torch.randint(2, 40, mask.shape) * mask, mask))
        written.append([list(range(50, 50 + length)) for length in of_batch])
    answers = join_answers(batches, written, "t")
    texts = [b.input_ids[row][b.attention_mask[row] == 1] for b in answers.batches for row in range(len(b.input_ids))]
    chosen = [3, 0, 4]
    one = answers.select(chosen)
    for place, number in enumerate(chosen):
        assert torch.equal(one.input_ids[place][one.attention_mask[place] == 1], texts[number])
        own = torch.cat([batch.tokens[batch.answer == number] for batch in answers.batches])
        assert torch.equal(one.tokens[one.answer == number], own) and torch.equal(one.tokens[one.rows == place], own)
    assert torch.equal(one.input_ids[one.rows, one.columns + 1], one.tokens)


def test_a_micro_batch_is_as_large_as_its_tokens_and_logits_allow(tmp_path):
    base = CheckpointRef("base", tiny.save(tiny.make_model(), tmp_path / "base"))
    assert rows_at_once(base, 64, 16) == 32 and rows_at_once(base, 5000, 16) == 1
    (tmp_path / "base" / "config.json").write_text(
        (tmp_path / "base" / "config.json").read_text().replace('"vocab_size": 52', '"vocab_size": 49152')
    )
    assert rows_at_once(base, 48, 16) == 16
