"""A service that may keep a parent: what it answers, learns, and hands to retraining."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simmerge_ray.base.errors import BanditError
from simmerge_ray.plans.keeping import KEEP, KEEP_ARMS, keep_label
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.selector.data.dataset import with_keep
from simmerge_ray.selector.data.files import LoadedDataset, find_dataset, read_dataset
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.selector.models.train import train_selector
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.warm_start import contexts_of
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.log.events import ArmAdded, RewardGiven
from simmerge_ray.service.retraining.material import material_of
from simmerge_ray.service.retraining.reward_labels import all_rows, logged_merges, reward_labels, training_rewards
from simmerge_ray.service.retraining.shadow import compare_on_log
from simmerge_ray.service.schemas import ArmRequest, Decision, DecisionRequest, RankRequest, RewardRequest
from simmerge_ray.signals.table import read_signal_table
from tests.unit.selector.made_up import write_study
from tests.unit.service.published import PublishedFiles, write_published
from tests.unit.service.rewarded import ARMS, CONFIG, NAMESPACE, Service, served
from tests.unit.service.test_learner import run

PAIR = {"left": "s1-c00", "right": "s1-c01"}
NAMES = tuple(keep_label(name) for name in PAIR.values())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> PublishedFiles:
    found = write_published(tmp_path_factory.mktemp("published"), keep=True)
    # The made-up signals of (b, a) are not quite those of (a, b) seen from the other side; real ones are.
    table = read_signal_table(found.signals)
    rows = {
        key: table.rows[key] if key[0] < key[1] else table.rows[key[1], key[0], key[2]].swap() for key in table.rows
    }
    found.signals.unlink()
    replace(table, rows=rows).write(found.signals)
    return found


async def kept_decision(learner: Learner) -> Decision:
    """The first one that keeps a parent."""
    for _ in range(200):
        _, answer = await learner.decide(DecisionRequest(**PAIR))
        if answer.arm in NAMES:
            return answer
    raise AssertionError("200 draws kept no parent")


def test_a_decision_keeps_a_checkpoint_by_its_name_and_learns_from_its_reward(files, tmp_path):
    async def use(learner: Learner) -> None:
        answer = await kept_decision(learner)
        assert set(answer.propensities) == {"linear", "ties", *NAMES}
        assert sum(answer.propensities.values()) == pytest.approx(1.0, abs=1e-9)
        assert {one.arm for one in answer.arms} == set(answer.propensities)
        assert answer.kind == "pair" and answer.overrode and answer.best_fixed in ("linear", "ties")
        assert answer.plan is not None and answer.plan.label == answer.arm
        assert keep_label(plan_from_json(answer.plan.plan).source or "") == answer.arm
        assert "left" not in answer.model_dump_json(exclude={"left"}) and "keep(right)" not in answer.model_dump_json()
        before = {one.arm: one.count for one in (await learner.policy()).arms}
        status, _ = await learner.reward(answer.decision_id, RewardRequest(utility=0.9))
        after = {one.arm: one.count for one in (await learner.policy()).arms}
        assert status == 201 and after == before | {KEEP: before[KEEP] + 1}
        record = await learner.get(answer.decision_id)
        assert record.decision == answer and record.utility == 0.9
        assert (await learner.catalogue()).arms == ["linear", "ties", KEEP]

    run(files, tmp_path, use, floor=0.2)


def test_without_exploration_one_choice_has_all_the_probability(files, tmp_path):
    async def use(learner: Learner) -> None:
        _, answer = await learner.decide(DecisionRequest(**PAIR, explore=False))
        assert sorted(answer.propensities.values()) == [0.0, 0.0, 0.0, 1.0]
        assert answer.propensities[answer.arm] == 1.0

    run(files, tmp_path, use)


def test_swapping_the_pair_gives_the_same_answers(files, tmp_path):
    async def use(learner: Learner) -> None:
        one = await learner.rank(RankRequest(**PAIR))
        other = await learner.rank(RankRequest(left=PAIR["right"], right=PAIR["left"]))
        assert {*NAMES} < {row.arm for row in one.arms} and one.arm == other.arm
        for name in ("utility", "sd", "expected", "expected_sd"):
            first, second = ({row.arm: getattr(row, name) for row in found.arms} for found in (one, other))
            assert first == pytest.approx(second, rel=1e-9)

    run(files, tmp_path, use)


def test_a_new_encoder_folds_kept_parents_from_their_side(files, tmp_path):
    another = write_published(tmp_path / "another", seed=1, keep=True)

    async def use(learner: Learner) -> None:
        answer = await kept_decision(learner)
        await learner.reward(answer.decision_id, RewardRequest(utility=0.9))
        await learner.publish(another.selector)
        view = await learner._follower.view()
        context = learner._follower.contexts_of(view).of(*PAIR.values(), None)
        posterior, prior = view.posteriors[KEEP], view.priors[KEEP]
        z = context.kept[answer.arm]
        np.testing.assert_allclose(posterior.precision - prior.precision, np.outer(z, z), atol=1e-9)
        np.testing.assert_allclose(posterior.moment - prior.moment, z * (0.9 - context.level), atol=1e-9)

    run(files, tmp_path, use, floor=0.2)


def test_a_selector_without_keep_goes_on_as_before_until_keep_is_added(tmp_path):
    plain = write_published(tmp_path / "published")

    async def use(learner: Learner) -> None:
        _, answer = await learner.decide(DecisionRequest(**PAIR))
        assert set(answer.propensities) == {"linear", "ties"} and answer.plan is None
        with pytest.raises(BanditError, match="sibling"):
            await learner.add_arm(ArmRequest(arm=KEEP, sibling="linear"))
        assert (await learner.add_arm(ArmRequest(arm=KEEP)))[0] == 201
        _, answer = await learner.decide(DecisionRequest(**PAIR))
        assert set(answer.propensities) == {"linear", "ties", *NAMES}
        assert sum(answer.propensities.values()) == pytest.approx(1.0, abs=1e-9)
        kept = next(one for one in answer.arms if one.arm == NAMES[0])
        assert kept.utility is None and kept.expected is not None

    run(plain, tmp_path, use)


# Retraining.


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LoadedDataset:
    found = read_dataset(find_dataset(write_study(tmp_path_factory.mktemp("study"), ["p"], num_checkpoints=8)))
    return replace(found, dataset=with_keep(found.dataset))


@pytest.fixture
def service(tmp_path, loaded):
    with served(tmp_path, loaded, train_selector(loaded.dataset, CONFIG)) as made:
        size = contexts_of(made.present.fitted, made.features("p-c00", "p-c01"), made.tasks).z.shape[1]
        made.append(ArmAdded(KEEP, GaussianPosterior.prior(size, 2.0)))
        yield made


def keep(service: Service, left: str, right: str, kept: str, utility: float) -> None:
    """A drawn decision that keeps a parent, as the service logs it, and its reward."""
    features = service.features(left, right)[:, :: 1 if kept == left else -1]
    encoded = contexts_of(service.present.fitted, features, service.tasks)
    arms = (*ARMS, keep_label(left), keep_label(right))
    changes = {"arms": arms, "propensities": (0.25,) * 4, "features": features, "learns": (KEEP,)}
    z = encoded.z_by_order[:, 0].mean(0)
    service.append(RewardGiven(service.decide(left, right, keep_label(kept), z=z, **changes), utility))


def test_a_reward_of_a_kept_checkpoint_is_a_label_of_it_and_trains_its_side(service):
    keep(service, "p-c00", "p-c01", "p-c01", 0.8)
    keep(service, "p-c01", "p-c00", "p-c01", 0.6)
    logged = logged_merges(all_rows(service.log))
    (label,) = reward_labels(logged, NAMESPACE, {})
    assert label.plan == MergePlan(source="p-c01") and label.outcome.items.tolist() == [0.8, 0.6]
    arms = (*ARMS, *KEEP_ARMS)
    one, other = training_rewards(logged.rewarded, arms, len(service.present.columns))
    assert one.arm == other.arm == KEEP and one.members == other.members == ("p-c01", "p-c00")
    np.testing.assert_array_equal(one.features, service.features("p-c00", "p-c01")[:, ::-1])
    np.testing.assert_array_equal(other.features, service.features("p-c01", "p-c00"))
    assert training_rewards(logged.rewarded, ARMS, len(service.present.columns)) == []  # a selector without keep


def test_a_retraining_with_kept_parents_keeps_their_arms_and_compares_them(service, tmp_path):
    generator = np.random.default_rng(0)
    pairs = [(one.left, one.right) for one in service.loaded.dataset.contexts if one.task == "s"]
    for index in generator.integers(len(pairs), size=10):  # an operator that the labels do not have
        event = service.decide(*pairs[index], "slerp", arms=(*ARMS, "slerp"), propensities=(0.3, 0.3, 0.4))
        service.append(RewardGiven(event, 0.5))
    for index in generator.integers(len(pairs), size=24):
        left, right = pairs[index]
        kept = (left, right)[generator.integers(2)]
        keep(service, left, right, kept, 0.9 if int(kept[-1]) % 2 == 0 else 0.2)
    material = service.material()
    assert material.dataset.arms == (*ARMS, "slerp", *KEEP_ARMS) and material.reference == (0, 1)
    assert material.measured == (0, 1, 3, 4)
    assert np.isnan(material.dataset.utilities[:, 2]).all() and np.isfinite(material.dataset.utilities[:, 3:]).all()
    compared = compare_on_log(service.present, service.present, material.logged.rewarded[10:])
    assert compared is not None and compared.num == 24 and compared.num_differ == 0
    candidate = service.retrain(tmp_path / "out")[1]
    selector = read_selector(candidate.path / "selector")
    assert selector.arms == (*ARMS, "slerp", *KEEP_ARMS) and selector.reference == ARMS
    assert KEEP in candidate.epoch.priors and candidate.labels is not None
    plain = replace(service.loaded, dataset=read_dataset_without_keep(service.loaded))
    without = material_of(plain, service.present, material.logged, NAMESPACE)
    assert without.dataset.arms == (*ARMS, "slerp") and all(one.arm != KEEP for one in without.rewards)


def read_dataset_without_keep(loaded: LoadedDataset):
    return replace(loaded.dataset, arms=ARMS, utilities=loaded.dataset.utilities[:, :2])
