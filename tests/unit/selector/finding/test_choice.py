"""A whole choice on tiny checkpoints: what is planted is found, and the same call gives the same answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import ConfigError, PlanError, ProbeError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import GENERAL, ProbeSet, load_probe_sets
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.selector.finding.choice import choose
from simmerge_ray.selector.finding.curve import curved_sources
from simmerge_ray.selector.finding.probed import Prober, in_this_process
from simmerge_ray.selector.finding.sources import find_request, find_sources
from simmerge_ray.signals.compute import local_executor
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from tests import tiny

CONFIG = FindConfig(num_recipes=600, shortlist=6, max_tokens=4, arms=("linear", "ties(density=0.3)"))
SIGNATURE = SignatureSpec(batch_size=24, num_coordinates=2000)


@pytest.fixture(scope="module")
def room(catalogue, catalogue_path, tmp_path_factory):
    """A catalogue of m0 and m1, m0 again, the base again, and a model that has nothing to do with them."""
    root = tmp_path_factory.mktemp("finding")
    tiny.save(tiny.make_model(seed=77), root / "noise")
    paths = {"m0": catalogue.ref("m0").path, "m1": catalogue.ref("m1").path}
    more = {"twin": paths["m0"], "origin": catalogue.base.path, "noise": root / "noise"}
    refs = tuple(CheckpointRef(name, path) for name, path in (paths | more).items())
    own_task = {"m0": "add", "m1": "copy", "twin": "add", "origin": "copy", "noise": "add"}
    whole = Catalogue(refs, own_task, catalogue.base)
    found = load_probe_sets(catalogue_path.parent / "probes")
    general = ProbeSet(GENERAL, found["copy"].probes[:12])
    return whole, found | {GENERAL: general}, SignatureStore(root / "signatures")


def chosen(room, labels, is_exact=True, **changes):
    catalogue, probe_sets, store = room
    request = find_request(catalogue, probe_sets, CONFIG.model_copy(update=changes))
    executor = local_executor(request.catalogue)
    straight = find_sources(request, store, executor, SIGNATURE)
    sources = curved_sources(request, straight, store, executor)
    config = SearchConfig(evaluator="transformers", pairs="all")
    started = []

    def start(search):
        started.append(TransformersEvaluator(search.template, max_model_len=search.settings.max_model_len))
        return started[-1]

    lines: list[str] = []
    found = choose(request, sources, in_this_process(config, str(labels), start), lines.append, is_exact)
    return found, sources, len(started), lines


def weights_of(plan):
    return dict.fromkeys(plan.members, 1.0) if plan.recipe is None else dict(
        zip(plan.recipe.members, plan.recipe.weights, strict=True)
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(room, tmp_path_factory):
    return chosen(room, tmp_path_factory.mktemp("labels"), members=("m0", "m1"))


def test_what_is_ranked_was_run_over_all_probes(pair):
    found, sources, _, lines = pair
    assert len(found.virtual.scores) >= CONFIG.num_recipes
    assert lines[0] == f"{len(found.virtual.scores)} candidates scored from signatures"
    assert {one.plan.source for one in found.checkpoints} == {"base", "m0", "m1"}
    assert found.average in [one.plan for one in found.merges]
    assert all(one.num_probes == 24 for one in found.ranked)
    assert found.best is found.ranked[0] and found.best.score == max(one.score for one in found.ranked)
    own = {one.plan.source: one.retention for one in found.checkpoints}
    assert own["m0"][0] == own["m1"][1] == 1.0  # each keeps its own answers
    assert [owner.checkpoint for owner in sources.aim.owners] == ["m0", "m1"]


def test_virtual_scores_of_checkpoints_as_they_are_are_what_probing_finds(pair):
    found, sources, _, _ = pair
    virtual = sources.scorer.of_sums(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    probed = {one.plan.source: one for one in found.checkpoints}
    for row, name in enumerate(("base", "m0", "m1")):
        np.testing.assert_allclose(virtual.nll[row], probed[name].nll, atol=2e-4)
        # A likelier token outside the kept ones is seen by probing alone; here all 32 kept ones are 32 of 52.
        np.testing.assert_allclose(virtual.retention[row], probed[name].retention, atol=1e-9)


def test_what_signatures_know_of_checkpoints_and_the_average_is_what_running_them_finds(room, pair, tmp_path):
    found, sources, _, _ = pair
    known = sources.scorer.known()
    assert len(known) > 1 and set(known) <= {*(one.plan for one in found.checkpoints), found.average}
    config = SearchConfig(evaluator="transformers", pairs="all")
    request = find_request(room[0], room[1], CONFIG.model_copy(update={"members": ("m0", "m1")}))
    run = in_this_process(config, str(tmp_path), lambda search: TransformersEvaluator(search.template))
    prober = Prober(request.catalogue, sources.answers, sources.aim, run)
    for one in prober.probe(list(known), prober.parts):
        retention, nll = known[one.plan]
        np.testing.assert_array_equal(retention, one.retention)
        np.testing.assert_allclose(nll, one.nll, atol=1e-5)


def test_in_another_precision_checkpoints_are_run_again(room, tmp_path, monkeypatch):
    runs = []

    def counted(self, plans, bounds, chosen=None):
        runs.extend(plan for plan in plans if plan not in self.known)
        return probe(self, plans, bounds, chosen)

    probe = Prober.probe
    monkeypatch.setattr(Prober, "probe", counted)
    for is_exact in (True, False):
        runs.clear()
        _, sources, _, _ = chosen(room, tmp_path / str(is_exact), is_exact, members=("m0", "m1"))
        assert set(sources.scorer.known()).isdisjoint(runs) == is_exact


def test_the_same_call_gives_the_same_answer_and_a_second_one_runs_nothing(room, pair, tmp_path):
    first = pair[0]
    again, _, started, _ = chosen(room, tmp_path, members=("m0", "m1"))
    assert started == 1
    assert [(one.plan, one.score) for one in again.ranked] == [(one.plan, one.score) for one in first.ranked]
    assert again.virtual.scores.tolist() == first.virtual.scores.tolist()
    third, _, started, _ = chosen(room, tmp_path, members=("m0", "m1"))
    assert started == 0  # every label is there
    assert [(one.plan, one.score) for one in third.ranked] == [(one.plan, one.score) for one in first.ranked]


def test_a_member_of_random_weights_gets_weight_0(room, tmp_path):
    found, _, _, _ = chosen(room, tmp_path, members=("m0", "m1", "noise"))
    assert weights_of(found.best.plan).get("noise", 0.0) == 0.0
    for one in found.checkpoints:
        assert one.plan.source != "noise" or one.score < found.best.score


def test_of_two_equal_members_one_is_as_good_as_the_best(room, tmp_path):
    """No merge of the two keeps more; a scale a little above 1 may be surer of the same answers."""
    found, _, _, _ = chosen(room, tmp_path, members=("m0", "twin"))
    assert found.best.retention.tolist() == [1.0, 1.0]
    one, other = (next(x for x in found.checkpoints if x.plan.source == name) for name in ("m0", "twin"))
    assert one.score == other.score == pytest.approx(found.best.score, abs=0.01)
    assert one.retention.tolist() == [1.0, 1.0]


def test_where_the_members_are_the_base_the_base_is_kept(room, tmp_path):
    found, _, _, _ = chosen(room, tmp_path, members=("origin",))
    assert found.best.plan == MergePlan(source="base") and found.average is None


def test_nothing_may_be_forgotten(room, tmp_path):
    found, sources, _, _ = chosen(room, tmp_path, members=("m0", "m1"), forget=0.0)
    place = [owner.checkpoint for owner in sources.aim.owners].index("base")
    assert found.best.retention[place] == 1.0
    assert [one.plan.source for one in found.checkpoints][0] == "base"
    forgetful = [one for one in found.ranked if one.retention[place] < 1.0]
    assert forgetful and all(one.score == -np.inf for one in forgetful)


def test_numbers_of_ways_hold(room, tmp_path):
    found, _, _, _ = chosen(room, tmp_path, members=("m0", "m1", "noise"), ways=(2, 2))
    average = found.average
    assert all(len(one.plan.members) == 2 for one in found.merges if one.plan != average)


def test_what_cannot_be_asked_is_refused_before_a_weight_is_read(room):
    catalogue, probe_sets, _ = room

    def refused(error, message, catalogue=catalogue, probe_sets=probe_sets, **changes):
        with pytest.raises(error, match=message):
            find_request(catalogue, probe_sets, CONFIG.model_copy(update=changes))

    refused(PlanError, "m9", members=("m0", "m9"))
    refused(ConfigError, "name it under `base`", catalogue=replace(catalogue, base=None))
    refused(ConfigError, "objective 'math'", objective="math")
    refused(ConfigError, "ways 3-2", ways=(3, 2))
    refused(ConfigError, "there are 2 checkpoints", ways=(3, 4), members=("m0", "m1"))
    refused(ProbeError, "write copy.jsonl", probe_sets={"add": probe_sets["add"]})
    refused(
        ProbeError, "'m1' has no task", catalogue=replace(catalogue, own_task=dict(catalogue.own_task) | {"m1": None})
    )
    # One member twice is that member.
    assert find_request(catalogue, probe_sets, CONFIG.model_copy(update={"members": ("m0", "m0")})).catalogue.ids == (
        "m0",
    )


def test_general_probes_serve_any_member(room, tmp_path):
    catalogue, probe_sets, store = room
    members = replace(catalogue, own_task=dict.fromkeys(catalogue.ids, GENERAL))
    found, sources, _, _ = chosen((members, {GENERAL: probe_sets[GENERAL]}, store), tmp_path, members=("m0", "m1"))
    assert {one.checkpoint for one in sources.aim.owners} == {"m0", "m1", "base"}
    assert sources.aim.tasks == (GENERAL,)
    assert found.best.num_probes == 12 and np.isfinite(found.best.score)
