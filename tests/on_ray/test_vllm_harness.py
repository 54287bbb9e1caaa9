"""Tasks of lm-evaluation-harness through a live vLLM engine: the same scores as through lm_eval's own `hf` model."""

from __future__ import annotations

import pytest

from simmerge_ray.search.evaluation.harness import load_harness_tasks
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from tests.unit.search.evaluation.test_harness import NUM_ITEMS, of_lm_eval, per_item, write_suite

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def test_scores_through_vllm_are_those_of_lm_eval_s_own_model(catalogue, tmp_path):
    from lm_eval.models.huggingface import HFLM

    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator

    suite = write_suite(tmp_path, TransformersEvaluator(catalogue.base))
    theirs = of_lm_eval(HFLM(pretrained=str(catalogue.base.path), device="cpu", dtype="float32", batch_size=1), suite)
    tasks = load_harness_tasks(["three"], suite)
    evaluator = VllmEvaluator(catalogue.base, max_model_len=32)
    try:
        for task in tasks.values():
            assert task.longest(evaluator.tokenizer)[0] <= evaluator.max_model_len
            utilities = task.evaluate(evaluator)
            assert utilities.tolist() == per_item(theirs, task) and 0 < utilities.sum() < NUM_ITEMS
    finally:
        evaluator.close()
