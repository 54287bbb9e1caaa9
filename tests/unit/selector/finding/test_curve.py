"""One look at the plain average: candidates near it are scored as they are, and nothing is lost where it fails."""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.base.finding import FindConfig, shortlist_of
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.selector.finding.curve import curved_sources
from simmerge_ray.selector.finding.sources import find_request, find_sources
from simmerge_ray.signals.candidates.signatures import answers_of_merge
from simmerge_ray.signals.compute import local_executor
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore

CONFIG = FindConfig(num_recipes=200, max_tokens=4, arms=("linear",))


@pytest.fixture(scope="module")
def straight(catalogue, catalogue_path, tmp_path_factory):
    store = SignatureStore(tmp_path_factory.mktemp("curve"))
    request = find_request(catalogue, load_probe_sets(catalogue_path.parent / "probes"), CONFIG)
    executor = local_executor(catalogue)
    signature = SignatureSpec(batch_size=24, num_coordinates=500)
    return request, find_sources(request, store, executor, signature), store, executor


def test_at_the_average_and_at_the_checkpoints_the_curve_is_what_they_do(straight):
    request, sources, store, executor = straight
    curved = curved_sources(request, sources, store, executor)
    count = len(request.catalogue.ids)
    rows = np.concatenate([np.zeros((1, count)), np.eye(count), np.full((1, count), 1 / count)])
    straight_scores, scores = sources.scorer.of_sums(rows), curved.scorer.of_sums(rows)
    np.testing.assert_allclose(scores.nll[:-1], straight_scores.nll[:-1], rtol=1e-6)  # these were run before

    merge = resolve_plan(MergePlan(recipe=plain_average(request.catalogue.ids)), request.catalogue)
    real = answers_of_merge(merge, sources.answers, store, executor, sources.digests)
    for place, owner in enumerate(sources.aim.owners):
        nll = -real[owner][0][:, 0].mean()
        assert scores.nll[-1, place] == pytest.approx(nll, abs=1e-5)
        assert abs(straight_scores.nll[-1, place] - nll) > 1e-5  # a mixture alone is off


def test_where_the_average_cannot_be_run_mixtures_stay_straight(straight, tmp_path):
    request, sources, _, _ = straight

    def fails(queue):
        raise CheckpointError("merge holds NaN")
        yield

    found = curved_sources(request, sources, SignatureStore(str(tmp_path)), fails)
    assert found is sources


def test_one_way_merges_need_no_average(straight):
    request, sources, store, _ = straight
    alone = find_request(request.catalogue, request.probe_sets, CONFIG.model_copy(update={"ways": (1, 1)}))

    def none(queue):
        raise AssertionError("nothing is run")

    assert curved_sources(alone, sources, store, none) is sources


def test_the_shortlist_grows_with_the_members_unless_it_is_given():
    assert [shortlist_of(count) for count in (1, 2, 3, 6, 12)] == [8, 8, 12, 24, 24]
    assert CONFIG.num_run(3) == 12 and CONFIG.model_copy(update={"shortlist": 5}).num_run(3) == 5
