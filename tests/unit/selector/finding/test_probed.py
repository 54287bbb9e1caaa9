"""Candidates run over answers as trials of a search: what is measured, kept, joined, and halved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.finding import FACTOR
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.search.evaluation.evaluator import LogLikelihood
from simmerge_ray.search.objectives import parse_objective
from simmerge_ray.selector.finding.aim import Aim, worth
from simmerge_ray.selector.finding.probed import Prober, halve, in_this_process
from simmerge_ray.selector.finding.space import kept_checkpoints, sum_of
from simmerge_ray.signals.candidates.signatures import Owner
from tests.unit.selector.finding.made_up import MadeUpEvaluator, own_answers

CONFIG = SearchConfig(evaluator="transformers", pairs="all")
OWNERS = (Owner("m0", "add"), Owner("m1", "copy"))
PLANS = [sum_of([("m0", 0.1 * n), ("m1", 1.0)]) for n in range(1, 10)]


def prober_of(catalogue, uri, log, refuses=None, num_probes=(24, 24)):
    answers = [
        own_answers(catalogue.ids, owner, num, seed=n)
        for n, (owner, num) in enumerate(zip(OWNERS, num_probes, strict=True))
    ]
    aim = Aim(OWNERS, "base", parse_objective("mean", ["add", "copy"]))
    run = in_this_process(CONFIG, str(uri), lambda search: MadeUpEvaluator(log, refuses))
    return Prober(catalogue, answers, aim, run)


class Fixed:
    """An evaluator whose likelihoods are given."""

    def __init__(self, found):
        self.found = found

    def log_likelihoods(self, pairs, padded=False):
        return self.found


ITEMS = st.lists(
    st.tuples(st.booleans(), st.floats(1e-4, 1.0), st.integers(1, 16)).map(
        # A greedy token is at least as likely as any of 10,000 others; one that is not has at most half of all.
        lambda one: (one[0], one[1] if one[0] else one[1] / 2, one[2])
    ),
    min_size=1,
    max_size=8,
)


@given(ITEMS)
def test_kept_and_nll_take_apart_what_evaluate_put_together(items):
    found = [LogLikelihood(float(np.log(p) * length), length, greedy, p) for greedy, p, length in items]
    task = AnswersTask("x", [([1], [2] * length) for _, _, length in items])
    utilities = task.evaluate(Fixed(found))
    assert ((utilities >= 0) & (utilities <= 1)).all()
    kept, nll = task.kept_and_nll(utilities)
    assert kept.tolist() == [greedy for greedy, _, _ in items]
    np.testing.assert_allclose(nll, [-one.total for one in found], rtol=1e-9, atol=1e-9)


@given(ITEMS)
def test_nor_does_a_label_store_lose_them(items):
    """It holds float32."""
    found = [LogLikelihood(float(np.log(max(p, 1e-3)) * length), length, greedy, p) for greedy, p, length in items]
    task = AnswersTask("x", [([1], [2] * length) for _, _, length in items])
    utilities = task.evaluate(Fixed(found))
    stored = utilities.astype(np.float32).astype(np.float64)
    (kept, nll), (expected, exact) = task.kept_and_nll(stored), task.kept_and_nll(utilities)
    assert kept.tolist() == expected.tolist()
    assert (np.abs(nll - exact) / task.num_tokens).max() <= 1e-4


def test_what_is_impossible_is_87_nats_a_token_stored_or_not():
    task = AnswersTask("x", [([1], [2, 3])])
    utilities = task.evaluate(Fixed([LogLikelihood(-1e5, 2, False, 0.0)]))
    for items in (utilities, utilities.astype(np.float32)):
        kept, nll = task.kept_and_nll(items)
        assert not kept[0] and nll[0] == pytest.approx(2 * 87.3, rel=1e-3)


def test_parts_of_the_probes_join_to_the_whole(catalogue, tmp_path):
    whole = prober_of(catalogue, tmp_path / "whole", []).probe(PLANS, [24])
    for bounds in ([8, 24], [5, 6, 24]):
        parts = prober_of(catalogue, tmp_path / str(len(bounds)), []).probe(PLANS, bounds)
        for one, other in zip(whole, parts, strict=True):
            assert one.plan == other.plan and one.num_probes == other.num_probes == 24
            assert one.retention.tolist() == other.retention.tolist()
            np.testing.assert_allclose(one.nll, other.nll, rtol=1e-12)
            assert one.score == pytest.approx(other.score, rel=1e-12)
            assert one.score == pytest.approx(float(worth(one.retention, one.nll).mean()), rel=1e-12)


def test_what_the_label_store_holds_is_not_run_again(catalogue, tmp_path):
    log: list[tuple[str, int]] = []
    prober = prober_of(catalogue, tmp_path, log)
    first = prober.probe(PLANS[:4], [8])
    assert sorted(log) == sorted((plan.label, 8) for plan in PLANS[:4] for _ in OWNERS)
    log.clear()
    prober.probe(PLANS[:2], [8, 24])
    assert sorted(log) == sorted((plan.label, 16) for plan in PLANS[:2] for _ in OWNERS)  # only what is new
    log.clear()
    # Another process, the same store.
    again = prober_of(catalogue, tmp_path, log).probe([*PLANS[:4], PLANS[5]], [8])
    assert {label for label, _ in log} == {PLANS[5].label}
    assert [(one.plan, one.score) for one in again[:4]] == [(one.plan, one.score) for one in first]


def test_other_answers_are_other_labels(catalogue, tmp_path):
    log: list[tuple[str, int]] = []
    prober_of(catalogue, tmp_path, log).probe(PLANS[:1], [24])
    log.clear()
    prober_of(catalogue, tmp_path, log, num_probes=(24, 23)).probe(PLANS[:1], [24])
    assert [count for _, count in log] == [23]


def test_plans_that_cannot_be_measured_are_left_out(catalogue, tmp_path):
    refused = "0.3 m0"
    found = prober_of(catalogue, tmp_path, [], refused).probe(PLANS, [24])
    assert [one.plan for one in found] == [plan for plan in PLANS if refused not in plan.label]
    assert len(found) == len(PLANS) - 1


def test_checkpoints_are_asked_for_everybody_s_answers(catalogue, tmp_path):
    log: list[tuple[str, int]] = []
    found = prober_of(catalogue, tmp_path, log).probe(kept_checkpoints(catalogue.ids, "base"), [24])
    assert [one.plan.source for one in found] == ["base", "m0", "m1", "m2"]
    assert all(one.retention.shape == (2,) for one in found)
    assert len(log) == 8


def test_owners_with_fewer_probes_are_run_over_what_they_have(catalogue, tmp_path):
    log: list[tuple[str, int]] = []
    prober = prober_of(catalogue, tmp_path, log, num_probes=(24, 6))
    assert prober.num_probes == 24
    (found,) = prober.probe(PLANS[:1], [16, 24])
    assert sorted(count for _, count in log) == [6, 8, 16]
    assert found.retention.shape == (2,) and (found.retention[1] * 6) % 1 == pytest.approx(0.0, abs=1e-9)


def test_a_part_of_the_probes_is_counted_from_what_was_run(catalogue, tmp_path):
    log: list[tuple[str, int]] = []
    prober = prober_of(catalogue, tmp_path, log, num_probes=(24, 20))
    (whole,) = prober.probe(PLANS[:1], prober.parts)
    run = len(log)
    even, odd = (
        prober.probe(PLANS[:1], prober.parts, lambda num, rest=rest: np.arange(num) % 2 == rest)[0] for rest in (0, 1)
    )
    assert len(log) == run  # nothing is run again
    np.testing.assert_allclose((even.retention + odd.retention) / 2, whole.retention, rtol=1e-12)


def test_halving_runs_few_candidates_over_all_probes(catalogue, tmp_path):
    log: list[tuple[str, int]] = []
    lines: list[str] = []
    prober = prober_of(catalogue, tmp_path, log)
    average = MergePlan(recipe=plain_average(["m0", "m1"]))
    always = [*kept_checkpoints(["m0", "m1"], "base"), average]
    found = halve(prober, PLANS, always, lines.append)
    first = 16  # a third of 24 tells candidates apart too badly
    assert {label for label, count in log if count == first} >= {plan.label for plan in PLANS}
    whole = {label for label, count in log if count == 24 - first}
    assert len(whole) == len(always) + len(PLANS) // FACTOR
    assert {one.plan.label for one in found} == whole and {plan.label for plan in always} <= whole
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert all(one.num_probes == 24 for one in found)
    # The survivors are the best ones of the first round.
    of_first = sorted(prober.probe(PLANS, [first]), key=lambda one: -one.score)
    assert {one.plan for one in of_first[:3]} == {one.plan for one in found} - set(always)
    assert lines == ["9 candidates on 16 probes of each member", "7 candidates and checkpoints on all 24 probes"]


def test_few_candidates_are_not_halved(catalogue, tmp_path):
    log: list[tuple[str, int]] = []
    found = halve(prober_of(catalogue, tmp_path, log), PLANS[:3], [PLANS[0]])
    assert len(found) == 3 and {count for _, count in log} == {8, 16}


def test_of_equally_good_ones_checkpoints_come_first(catalogue, tmp_path):
    class Alike(MadeUpEvaluator):
        def log_likelihoods(self, pairs, padded=False):
            return [LogLikelihood(-0.1 * len(after), len(after), True, float(np.exp(-0.1))) for _, after in pairs]

    prober = prober_of(catalogue, tmp_path, [])
    prober._run = in_this_process(CONFIG, str(tmp_path), lambda search: Alike([]))
    found = halve(prober, PLANS, kept_checkpoints(["m0", "m1"], "base"))
    assert [one.plan.source for one in found[:3]] == ["base", "m0", "m1"]
