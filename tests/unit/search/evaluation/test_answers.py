"""Members' answers as a task without labels, and likelihoods of pairs of many lengths run together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.search.evaluation.answers import PREFIX, AnswersTask
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from tests import tiny


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(dict.fromkeys(tiny.CHARACTERS)) + 2, n_positions=128, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def evaluator(request, tmp_path_factory):
    model = tiny.make_model(tied=False) if request.param == "llama" else gpt2()
    path = tiny.save(model, tmp_path_factory.mktemp("evaluator") / request.param)
    # Small batches, so that pairs of several lengths are cut into several.
    return TransformersEvaluator(CheckpointRef(request.param, path), batch_size=16, max_model_len=64)


@pytest.fixture(scope="module")
def pairs(evaluator):
    """Prompts of 1 to 40 tokens; answers of 1 to 6 tokens, every second one what greedy decoding gives."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(40):
        before = [int(one) for one in generator.integers(2, 50, 1 + (7 * number) % 40)]
        length = 1 + number % 6
        after = [int(one) for one in generator.integers(2, 50, length)]
        if number % 2:
            after = []
            for _ in range(length):
                after.append(int(evaluator.log_probs([*before, *after])[-1].argmax()))
        found.append((before, after))
    return found


def test_run_together_with_padding_they_are_as_alone(evaluator, pairs):
    alone, together = (evaluator.log_likelihoods(pairs, padded=padded) for padded in (False, True))
    assert sum(one.is_greedy for one in alone) >= 20
    for (before, after), one, other in zip(pairs, alone, together, strict=True):
        assert other.total == pytest.approx(one.total, abs=1e-5 * len(after))
        assert (other.num_tokens, other.is_greedy) == (one.num_tokens, one.is_greedy) == (len(after), one.is_greedy)
        logs = evaluator.log_probs([*before, *after])[len(before) - 1 : -1]
        truth = float(logs.double().gather(1, torch.tensor(after)[:, None]).sum())
        assert one.total == pytest.approx(truth, abs=1e-5 * len(after))


def test_neither_order_nor_company_changes_a_likelihood(evaluator, pairs):
    whole = evaluator.log_likelihoods(pairs, padded=True)
    backwards = evaluator.log_likelihoods(pairs[::-1], padded=True)[::-1]
    few = evaluator.log_likelihoods(pairs[:5], padded=True)
    for one, other in zip([*whole, *whole[:5]], [*backwards, *few], strict=True):
        assert other.total == pytest.approx(one.total, abs=1e-4)
        assert other.is_greedy == one.is_greedy
    assert evaluator.log_likelihoods([], padded=True) == []


def test_items_are_worth_what_is_kept_of_them(evaluator, pairs):
    task = AnswersTask("m0 to add", pairs)
    found = evaluator.log_likelihoods(pairs)
    utilities = task.evaluate(evaluator)
    kept, nll = task.kept_and_nll(utilities)
    assert kept.tolist() == [one.is_greedy for one in found]
    np.testing.assert_allclose(nll, [-one.total for one in found], atol=1e-4)
    part = task.evaluate(evaluator, np.array([7, 3]))
    np.testing.assert_allclose(part, utilities[[7, 3]], atol=1e-5)


def test_a_task_is_named_by_whose_answers_and_told_apart_by_them():
    one = AnswersTask("m0 to add", [([1, 2], [3]), ([4], [5, 6])])
    assert one.name == f"{PREFIX}m0 to add" and one.num_items == 2 and one.num_tokens.tolist() == [1, 2]
    assert one.longest(None) == (3, 1)
    assert one.digest == AnswersTask("m1 to add", [([1, 2], [3]), ([4], [5, 6])]).digest
    assert one.digest != AnswersTask("m0 to add", [([1], [2, 3]), ([4], [5, 6])]).digest
