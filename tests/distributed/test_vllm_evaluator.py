"""Weight swaps in a live vLLM engine: what it answers afterwards is what the merge on disk answers."""

from __future__ import annotations

import pytest
import torch

from simmerge_ray.catalogue import load_catalogue
from simmerge_ray.checkpoints import CheckpointRef, read_config
from simmerge_ray.errors import CheckpointError, EngineError
from simmerge_ray.evaluation import load_tasks
from simmerge_ray.merging import merged_tensors, write_merge
from simmerge_ray.operators.specs import make_arm
from simmerge_ray.plans import pair_plan, resolve_plan, unmerged
from simmerge_ray.transformers_evaluator import TransformersEvaluator
from tests import tiny

pytestmark = pytest.mark.vllm
TWO_WAY = ("linear", "slerp", "nuslerp", "task_arithmetic", "ties", "dare_ties", "breadcrumbs", "model_stock")
# Token ids of prompts of many lengths.
PROMPTS = [[5 + (3 * a + b) % 40, 6, 7 + b, *([8] * (b % 4))] for a in range(3) for b in range(12)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def engine(request, tmp_path_factory):
    from simmerge_ray.distributed.vllm_evaluator import VllmEvaluator

    path = tiny.make_catalogue(tmp_path_factory.mktemp("vllm"), tied=request.param)
    catalogue = load_catalogue(path)
    engine = VllmEvaluator(catalogue.base, max_model_len=64)
    yield engine, catalogue
    engine.close()


def test_merges_in_memory_answer_like_their_checkpoints_on_disk(engine, tmp_path):
    evaluator, catalogue = engine
    for operator in TWO_WAY:
        resolved = resolve_plan(pair_plan("m0", "m1", make_arm(operator)), catalogue)
        on_disk = CheckpointRef("merged", write_merge(resolved, tmp_path / operator).path)
        evaluator.check_swap(resolved, PROMPTS[:8])  # log-probabilities
        assert evaluator.generate(PROMPTS, 6) == TransformersEvaluator(on_disk).generate(PROMPTS, 6)


def test_swapping_back_gives_the_first_answers_again(engine):
    evaluator, catalogue = engine
    evaluator.load(unmerged(catalogue.checkpoints[0]))
    first = evaluator.generate(PROMPTS, 6)
    evaluator.load(unmerged(catalogue.checkpoints[1]))
    assert evaluator.generate(PROMPTS, 6) != first
    evaluator.load(unmerged(catalogue.checkpoints[0]))
    assert evaluator.generate(PROMPTS, 6) == first


def test_the_check_notices_weights_that_were_not_taken(engine, monkeypatch):
    evaluator, catalogue = engine
    evaluator.load(unmerged(catalogue.checkpoints[0]))
    monkeypatch.setattr(evaluator, "load", lambda resolved: None)
    with pytest.raises(EngineError, match="does not hold the weights it was given"):
        evaluator.check_swap(unmerged(catalogue.checkpoints[1]), PROMPTS[:8])


def test_a_merge_that_is_not_finite_is_refused_by_name(engine, tmp_path):
    evaluator, catalogue = engine
    model = tiny.make_model(tied=read_config(catalogue.base)["tie_word_embeddings"])
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    tiny.save(model, tmp_path / "nan")
    with pytest.raises(CheckpointError, match="model.norm.weight holds NaN"):
        evaluator.load(unmerged(CheckpointRef("nan", tmp_path / "nan")))
    evaluator.check_swap(unmerged(catalogue.checkpoints[0]), PROMPTS[:8])  # the engine is whole


def test_after_a_broken_swap_a_new_engine_of_the_same_process_loads_a_written_merge(
    catalogue, catalogue_path, tmp_path, monkeypatch
):
    from simmerge_ray.distributed.demo import load_and_evaluate
    from simmerge_ray.distributed.vllm_evaluator import VllmEvaluator

    def broken(resolved, reports):
        yield from list(merged_tensors(resolved))[:3]
        raise OSError("disk gone")

    evaluator = VllmEvaluator(catalogue.base, max_model_len=64)
    with monkeypatch.context() as patch:
        patch.setattr("simmerge_ray.merging.stream.merged_tensors", broken)
        with pytest.raises(EngineError, match="disk gone"):
            evaluator.load(unmerged(catalogue.checkpoints[1]))
    evaluator.close()
    merged = write_merge(resolve_plan(pair_plan("m0", "m1", make_arm("nuslerp")), catalogue), tmp_path / "merged").path
    loaded = load_and_evaluate(str(merged), load_tasks(catalogue_path.parent / "tasks"), "vllm")
    assert set(loaded) == {"add", "copy"}
    for utilities in loaded.values():
        assert utilities["vllm"] == utilities["transformers"]
