"""Weight swaps in a live vLLM engine: what it answers afterwards is what the merge on disk answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from simmerge_ray.base.errors import CheckpointError, ConfigError, EngineError
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.model import end_of_text
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm
from simmerge_ray.plans.plan import pair_plan, resolve_plan, unmerged
from simmerge_ray.search.evaluation import Item, Task, load_tasks
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.signals.candidates.answers import write_answers
from simmerge_ray.signals.collect import ProbeModel
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.tokens import tokenize_probes
from tests import tiny

pytestmark = pytest.mark.vllm
TWO_WAY = [name for name, spec in OPERATOR_SPECS.items() if spec.max_sources != 1 and not spec.needs_grams]
# Token ids of prompts of many lengths.
PROMPTS = [[5 + (3 * a + b) % 40, 6, 7 + b, *([8] * (b % 4))] for a in range(3) for b in range(12)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def engine(request, tmp_path_factory):
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator

    path = tiny.make_catalogue(tmp_path_factory.mktemp("vllm"), tied=request.param)
    catalogue = load_catalogue(path)
    engine = VllmEvaluator(catalogue.base, max_model_len=64)
    yield engine, catalogue
    engine.close()


@pytest.fixture
def reference(engine):
    """The same weights as the engine's in transformers: the second checkpoint."""
    evaluator, catalogue = engine
    evaluator.load(unmerged(catalogue.checkpoints[1]))
    return TransformersEvaluator(catalogue.checkpoints[1], max_model_len=64)


@pytest.fixture
def broken_afterwards(engine):
    """For tests that break the engine on purpose: it is the same one again for the next test."""
    evaluator, catalogue = engine
    evaluator.load(unmerged(catalogue.checkpoints[0]))
    yield
    assert evaluator._broken
    with pytest.raises(EngineError):
        evaluator.generate(PROMPTS[:1], 1)
    evaluator._broken = None
    evaluator.check_swap(unmerged(catalogue.checkpoints[0]), PROMPTS[:4])


def plan_of(operator, catalogue):
    return resolve_plan(pair_plan("m0", "m1", make_arm(operator)), catalogue)


def is_tied(catalogue):
    return read_config(catalogue.base)["tie_word_embeddings"]


def test_merges_in_memory_answer_like_their_checkpoints_on_disk(engine, tmp_path):
    evaluator, catalogue = engine
    for operator in TWO_WAY:
        resolved = plan_of(operator, catalogue)
        on_disk = CheckpointRef("merged", write_merge(resolved, tmp_path / operator).path)
        evaluator.check_swap(resolved, PROMPTS[:8])  # tokens and log-probabilities
        assert evaluator.generate(PROMPTS, 6) == TransformersEvaluator(on_disk).generate(PROMPTS, 6)


def test_swapping_back_gives_the_first_answers_again(engine):
    evaluator, catalogue = engine
    evaluator.load(unmerged(catalogue.checkpoints[0]))
    first = evaluator.generate(PROMPTS, 6)
    evaluator.load(unmerged(catalogue.checkpoints[1]))
    assert evaluator.generate(PROMPTS, 6) != first
    evaluator.load(unmerged(catalogue.checkpoints[0]))
    assert evaluator.generate(PROMPTS, 6) == first


def test_the_check_notices_weights_that_were_not_taken(engine, broken_afterwards, monkeypatch):
    evaluator, catalogue = engine
    with monkeypatch.context() as patch, pytest.raises(EngineError, match="does not answer like the weights"):
        patch.setattr(evaluator, "load", lambda resolved: None)
        evaluator.check_swap(unmerged(catalogue.checkpoints[1]), PROMPTS[:8])


def test_the_comparison_knows_every_tensor_of_a_llama_and_names_what_it_does_not_know(engine):
    evaluator, catalogue = engine
    evaluator.load(unmerged(catalogue.checkpoints[0]))
    start = "simmerge_start"
    assert evaluator._engine.collective_rpc(start, args=(catalogue.checkpoints[0],)) == [[]]
    others = evaluator._engine.collective_rpc(start, args=(catalogue.checkpoints[1],))[0]
    names = {
        "model.embed_tokens.weight (VocabParallelEmbedding)",
        "model.layers.1.self_attn.qkv_proj.weight (QKVParallelLinear)",
    }
    assert names | {"model.norm.weight (RMSNorm)", "lm_head.weight (ParallelLMHead)"} <= set(others)
    assert len(others) == 15  # 2 layers of 6, embedding, norm, head
    evaluator._engine.collective_rpc(start, args=(catalogue.checkpoints[0],))


def test_an_output_layer_that_keeps_its_old_pack_is_noticed(engine, broken_afterwards, monkeypatch):
    evaluator, catalogue = engine
    if not is_tied(catalogue):
        evaluator._broken = "an untied output layer is packed again by vLLM itself"
        return
    with monkeypatch.context() as patch, pytest.raises(EngineError, match=r"lm_head\.weight: values differ"):
        patch.setattr("simmerge_ray.on_ray.vllm_worker.repack_head", lambda model: None)
        evaluator.load(unmerged(catalogue.checkpoints[1]))


def drop(stream):
    return ((name, tensor) for name, tensor in stream if name != NAMED)


def nudge(stream):
    """A change of one part in a thousand, less than between close fine-tunes."""
    return ((name, tensor * 1.001 if name == NAMED else tensor) for name, tensor in stream)


NAMED = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize("change", [drop, nudge])
def test_what_the_engine_did_not_take_is_noticed(engine, broken_afterwards, monkeypatch, change):
    from simmerge_ray.on_ray.vllm_worker import StreamSample

    evaluator, catalogue = engine
    taken = StreamSample.taken
    with monkeypatch.context() as patch, pytest.raises(EngineError, match=r"layers\.1\.self_attn\.qkv_proj\.weight"):
        patch.setattr(StreamSample, "taken", lambda self, stream: change(taken(self, stream)))
        evaluator.load(unmerged(catalogue.checkpoints[1]))


def test_a_merge_without_a_tensor_is_refused(engine, broken_afterwards, monkeypatch):
    evaluator, catalogue = engine
    with monkeypatch.context() as patch, pytest.raises(EngineError, match=f"{NAMED} is missing in the merge"):
        patch.setattr("simmerge_ray.merging.in_memory.merged_tensors", lambda *args: drop(merged_tensors(*args)))
        evaluator.load(unmerged(catalogue.checkpoints[1]))


def test_a_merge_that_is_not_finite_is_refused_by_name(engine, tmp_path):
    evaluator, catalogue = engine
    model = tiny.make_model(tied=is_tied(catalogue))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    tiny.save(model, tmp_path / "nan")
    with pytest.raises(CheckpointError, match="model.norm.weight holds NaN"):
        evaluator.load(unmerged(CheckpointRef("nan", tmp_path / "nan")))
    evaluator.check_swap(unmerged(catalogue.checkpoints[0]), PROMPTS[:8])  # the engine is whole


def test_both_evaluators_give_the_same_utilities(engine, reference):
    evaluator, catalogue = engine
    for task in load_tasks(catalogue.base.path.parent / "tasks").values():
        answers = reference.generate([reference.tokenizer(item.prompt)["input_ids"] for item in task.items], 3)
        # Half of the targets are what the model answers, so that matches and misses both occur.
        items = tuple(
            replace(item, target=answer if number % 2 and answer.strip() else item.target)
            for number, (item, answer) in enumerate(zip(task.items, answers, strict=True))
        )
        exact = Task("exact", items, "exact_match", 3)
        given = exact.evaluate(evaluator)
        assert np.array_equal(given, exact.evaluate(reference)) and 0 < given.mean() < 1
        entropy = Task("entropy", items, "cross_entropy")
        ours, theirs = -np.log(entropy.evaluate(evaluator)), -np.log(entropy.evaluate(reference))
        assert np.abs(ours - theirs).max() <= 1e-4
        mean = Task("mean", items, "mean_probability")
        assert np.abs(mean.evaluate(evaluator) - mean.evaluate(reference)).max() <= 1e-4
        choices = tuple(Item(item.prompt, "ab", ("ab", "7", "c+1")) for item in items)
        choice = Task("choice", choices, "multiple_choice")
        assert np.array_equal(choice.evaluate(evaluator), choice.evaluate(reference))


def test_both_evaluators_keep_the_same_of_a_member_s_answers(engine, reference):
    """A probed candidate is the same in either engine: retention to the bit, nll within 1e-4."""
    evaluator, catalogue = engine
    runner, member = ProbeModel(), catalogue.checkpoints[0]  # not the one whose weights are loaded
    batches = tokenize_probes(catalogue, load_probe_sets(catalogue.base.path.parent / "probes"), SignatureSpec(), 6)
    ends = end_of_text(member, runner.load(member).config).tolist()
    pairs = []
    for batch in batches["add"]:
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        pairs += zip(rows, write_answers(runner.load(member), batch, ends, 6), strict=True)
    # What the loaded weights answer themselves is kept, what another member answers for the most part is not.
    task = AnswersTask("m0", [*pairs, *((probe, reference_answer(reference, probe)) for probe, _ in pairs[:8])])
    (kept, nll), (theirs, their_nll) = (task.kept_and_nll(task.evaluate(one)) for one in (evaluator, reference))
    assert kept.tolist() == theirs.tolist() and 0 < kept.mean() < 1 and kept[-8:].all()
    assert np.abs((nll - their_nll) / task.num_tokens).max() <= 1e-4


def reference_answer(reference, probe):
    answer = []
    for _ in range(4):
        answer.append(int(reference.log_probs([*probe, *answer])[-1].argmax()))
    return answer


def test_both_evaluators_cut_before_the_same_stop_strings(engine, reference):
    evaluator, _ = engine
    whole = reference.generate(PROMPTS, 8)
    stop = tuple(dict.fromkeys(text[2:4] for text in whole if len(text) > 4))[:3] + ("a", ">")
    cuts = reference.generate(PROMPTS, 8, stop)
    assert evaluator.generate(PROMPTS, 8, stop) == cuts
    assert any(len(cut) < len(text) for cut, text in zip(cuts, whole, strict=True))


def test_likelihoods_of_more_tokens_than_a_step_takes_are_transformers(engine, reference):
    evaluator, _ = engine
    generator = np.random.default_rng(0)
    # 12000 tokens: prompts are cut between steps of 8192.
    pairs = [([int(one) for one in generator.integers(2, 50, 30)],) * 2 for _ in range(200)]
    for one, other in zip(evaluator.log_likelihoods(pairs), reference.log_likelihoods(pairs), strict=True):
        assert abs(one.total - other.total) / one.num_tokens <= 1e-4
        assert (one.num_tokens, one.is_greedy) == (other.num_tokens, other.is_greedy)


def test_a_likelihood_is_greedy_if_decoding_gives_it(engine, reference):
    evaluator, _ = engine
    answers = [tokens for tokens, _ in evaluator.greedy(PROMPTS[:6], 4)]
    pairs = list(zip(PROMPTS[:6], answers, strict=True))
    assert all(one.is_greedy for one in evaluator.log_likelihoods(pairs))
    others = [(before, [*after[:-1], (after[-1] + 1) % 40]) for before, after in pairs]
    assert not any(one.is_greedy for one in evaluator.log_likelihoods(others))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 4096}, "needs as many CPU cores"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "uni"}, "does not fit the executor"),
        ({"distributed_executor_backend": "rays"}, "did you mean 'ray'"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(catalogue, options, message):
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator

    with pytest.raises(ConfigError, match=message):
        VllmEvaluator(catalogue.base, **options)
