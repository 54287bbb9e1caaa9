"""What is said before the transformers evaluator runs: about how long a trial takes, by arithmetic that scales."""

from __future__ import annotations

import pytest

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.capacity.engines import trial_seconds, waiting_lines
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.size import num_elements
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.setup import prepare_search


def prepared(catalogue, catalogue_path, tmp_path, **options):
    tasks = load_tasks(catalogue_path.parent / "tasks")
    config = SearchConfig(**({"evaluator": "transformers", "pairs": "all"} | options))
    return prepare_search(catalogue, tasks, config, str(tmp_path))


def test_a_trial_takes_at_least_a_reading_of_all_weights_for_each_token_of_an_answer(
    catalogue, catalogue_path, tmp_path
):
    search = prepared(catalogue, catalogue_path, tmp_path)
    num = num_elements(read_headers(catalogue.base))
    tokens = {task: one.max_new_tokens for task, one in search.tasks.items()}
    least = sum(tokens.values()) * 4 * num / 5.3e9  # were all prompts of one length
    assert least < trial_seconds(search) < least * max(one.num_items for one in search.tasks.values()) * 2
    more_cores = prepared(catalogue, catalogue_path, tmp_path, cpus_per_trial=64)
    assert trial_seconds(more_cores) == pytest.approx(trial_seconds(search), rel=0.5)  # reading is no faster


def test_it_is_said_for_transformers_on_cpus_alone(catalogue, catalogue_path, tmp_path):
    (line,) = waiting_lines(prepared(catalogue, catalogue_path, tmp_path))
    assert line.startswith("a trial takes at most about 1 s by transformers") and "vLLM" in line
    assert not waiting_lines(prepared(catalogue, catalogue_path, tmp_path, evaluator="vllm"))
    assert not waiting_lines(prepared(catalogue, catalogue_path, tmp_path, gpus_per_trial=1))
