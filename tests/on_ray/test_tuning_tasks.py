"""Tunings on Ray: each ends at the bits of a run in this process, also where one was interrupted before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.on_ray.tuning_tasks import run_tunings, write_grams_on_ray
from simmerge_ray.pipelines.tune import tuning_job
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.tokens import tokenize_probes
from simmerge_ray.signals.tuning.grams import gram_jobs
from simmerge_ray.signals.tuning.run import run_tuning

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

CONFIG = TuneConfig(num_steps=4, max_tokens=4)


def test_several_at_once_end_at_the_bits_of_one_process(catalogue, catalogue_path, tmp_path):
    import torch

    probe_sets = load_probe_sets(catalogue_path.parent / "probes")
    jobs = [
        tuning_job(replace(catalogue, checkpoints=pair), probe_sets, CONFIG, tmp_path / "local")
        for pair in (catalogue.checkpoints[:2], catalogue.checkpoints[1:])
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tasks: float32 sums depend on the number of threads
    try:
        local = [run_tuning(job) for job in jobs]
    finally:
        torch.set_num_threads(threads)
    on_ray = [replace(job, state_file=tmp_path / f"{number}.npz") for number, job in enumerate(jobs)]
    halfway = replace(on_ray[0], config=CONFIG.model_copy(update={"num_steps": 2}))
    seen = []
    assert len(run_tunings([halfway], report=lambda number, _: seen.append(number))) == 1  # as if interrupted there
    tuned = run_tunings(on_ray, report=lambda number, _: seen.append(number))
    assert sorted(seen) == [0, 0, 1]
    for one, other in zip(tuned, local, strict=True):
        assert one.recipe == other.recipe
        np.testing.assert_array_equal(one.state.points, other.state.points)
        assert one.state.num_steps == CONFIG.num_steps


def test_gram_matrices_are_the_same_bytes_from_any_number_of_workers(catalogue, catalogue_path, tmp_path):
    batches = tokenize_probes(catalogue, load_probe_sets(catalogue_path.parent / "probes"), SignatureSpec(), 4)
    found = []
    for num_workers in (1, 2, 3):
        jobs = gram_jobs(catalogue, batches, 4, tmp_path / str(num_workers))
        write_grams_on_ray(jobs, max_running=num_workers)
        found.append([(job.out / "model.safetensors").read_bytes() for job in jobs])
    assert len(found[0]) == 3 and found[0] == found[1] == found[2]
