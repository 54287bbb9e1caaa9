"""vLLM engines started for one test each: fresh ones on written merges, of other dtypes, with ranks as processes.

They are not in one file with the engines that live longer: one engine at a time in a process.
"""

from __future__ import annotations

import multiprocessing
import os
from contextlib import contextmanager

import pytest
import torch

from simmerge_ray.base.errors import CheckpointError, EngineError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.plans.plan import unmerged
from simmerge_ray.search.evaluation import load_tasks
from tests import tiny
from tests.on_ray.test_vllm_evaluator import PROMPTS, plan_of

pytestmark = pytest.mark.vllm
# Some virtual machines announce AMX and fault when bfloat16 products use it. Read at the first product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@contextmanager
def engine_of(template, dtype="float32", **options):
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator

    evaluator = VllmEvaluator(template, dtype, max_model_len=64, **options)
    try:
        yield evaluator
    finally:
        evaluator.close()
    assert not multiprocessing.active_children()


def fresh_answers(resolved, directory, dtype="float32", **options):
    written = CheckpointRef("new", write_merge(resolved, directory).path)
    with engine_of(written, dtype, **options) as fresh:
        return fresh.greedy(PROMPTS, 6, 3)


def largest_gap(one, other):
    """Of log-probabilities of the tokens that both name; the chosen tokens must be equal."""
    gaps = [0.0]
    for (tokens, places), (same, others) in zip(one, other, strict=True):
        assert tokens == same
        for token, place, facing in zip(tokens, places, others, strict=True):
            assert token in place and token in facing
            gaps += [abs(place[key] - facing[key]) for key in place.keys() & facing.keys()]
    return max(gaps)


def test_a_swapped_engine_equals_a_fresh_one_on_the_written_merge(catalogue, tmp_path):
    operators = ("linear", "ties")
    swapped = {}
    with engine_of(catalogue.base) as evaluator:
        for operator in operators:
            evaluator.load(plan_of(operator, catalogue))
            swapped[operator] = evaluator.greedy(PROMPTS, 6, 3)
    for operator in operators:
        assert largest_gap(swapped[operator], fresh_answers(plan_of(operator, catalogue), tmp_path / operator)) <= 1e-4


def test_a_swapped_engine_in_bfloat16_equals_a_fresh_one(catalogue, tmp_path):
    resolved = plan_of("linear", catalogue)
    with engine_of(catalogue.base, "bfloat16") as evaluator:
        evaluator.check_swap(unmerged(catalogue.checkpoints[1]), PROMPTS[:8])
        evaluator.load(resolved)
        swapped = evaluator.greedy(PROMPTS, 6, 3)
    assert largest_gap(swapped, fresh_answers(resolved, tmp_path / "merged", "bfloat16")) <= 1e-4


def test_after_a_broken_swap_a_new_engine_of_the_same_process_loads_a_written_merge(
    catalogue, catalogue_path, tmp_path, monkeypatch
):
    from simmerge_ray.pipelines.demo import load_and_evaluate

    def renamed(*args):
        return ((name.replace("layers.1.mlp.up", "layers.7.mlp.up"), one) for name, one in merged_tensors(*args))

    with engine_of(catalogue.base) as evaluator, monkeypatch.context() as patch:
        patch.setattr("simmerge_ray.merging.in_memory.merged_tensors", renamed)
        with pytest.raises(EngineError, match="swapping in .* failed"):
            evaluator.load(unmerged(catalogue.checkpoints[1]))
    merged = write_merge(plan_of("nuslerp", catalogue), tmp_path / "merged").path
    loaded = load_and_evaluate(str(merged), load_tasks(catalogue_path.parent / "tasks"), "vllm")
    assert set(loaded) == {"add", "copy"}
    for utilities in loaded.values():
        assert utilities["vllm"] == utilities["transformers"]


def test_two_ranks_swap_like_a_fresh_engine_of_one_rank(catalogue, tmp_path):
    resolved = plan_of("ties", catalogue)
    model = tiny.make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    not_finite = CheckpointRef("nan", tiny.save(model, tmp_path / "nan"))
    with engine_of(catalogue.base, tensor_parallel_size=2) as evaluator:
        evaluator.check_swap(unmerged(catalogue.checkpoints[1]), PROMPTS[:8])
        with pytest.raises(CheckpointError, match="model.norm.weight holds NaN"):  # its class survives the processes
            evaluator.load(unmerged(not_finite))
        evaluator.load(resolved)
        swapped = evaluator.greedy(PROMPTS, 6, 3)
        with pytest.raises(EngineError, match="swapping in 'gone' failed"):
            evaluator.load(unmerged(CheckpointRef("gone", tmp_path / "gone")))
    assert largest_gap(swapped, fresh_answers(resolved, tmp_path / "merged")) <= 1e-4


def test_an_engine_that_does_not_start_leaves_no_process(catalogue, tmp_path, monkeypatch):
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator

    # vLLM takes the first checkpoint, and the comparison with what it loaded fails after its process has started.
    monkeypatch.setattr("simmerge_ray.on_ray.vllm_evaluator._START", "no_such_method")
    with pytest.raises(EngineError, match="did not start"):
        VllmEvaluator(catalogue.base, max_model_len=64, distributed_executor_backend="mp")
    assert not multiprocessing.active_children()
