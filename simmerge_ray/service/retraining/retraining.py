"""Retraining from rewards: log -> labels -> train -> shadow -> promote -> roll back. Ray-free.

The offline labels and the rewards of the log train a new selector with the config of the present one. The last part of
the rewards is held out, and the new one is compared with the present one on it, and on the labels (`shadow`). What is
promoted is the very selector that was compared: it goes into the registry, then an `EncoderEpoch` into the log, whose
priors come from the labels, and every replica folds the whole log again with the new encoder; the rewards that were
held out count there like all others. To roll back is an epoch, too, of the former selector with its own priors: nothing
that was learned since is lost, it is folded with the former encoder.

The same log and labels make the same version, whatever ran before, was killed or runs beside; promoting it a second
time appends nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig, check_config
from simmerge_ray.base.errors import LabelError, SelectorError, StoreError, unknown_name
from simmerge_ray.base.storage import digest_bytes, digest_json, new_directory, write_json
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.files import LoadedDataset
from simmerge_ray.selector.data.rewards import RewardedMerge, rewards_digest
from simmerge_ray.selector.data.splits import Fold, checkpoint_folds, pairs_of
from simmerge_ray.selector.models.model import FittedModel, Selector, read_selector
from simmerge_ray.selector.models.train import MIN_CONTEXTS, train_selector, usable_folds
from simmerge_ray.selector.planning.files import write_selectors
from simmerge_ray.service.bandit.artifact import POWER, RIDGE, Classes, WarmStartFile, read_warm_start, write_warm_start
from simmerge_ray.service.bandit.off_policy import Estimate
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.warm_start import (
    cold_ridge,
    merge_values,
    merges_of,
    out_of_fold_level,
    warm_posteriors,
)
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import Activation, ArmAdded, EncoderEpoch, WarmStart
from simmerge_ray.service.log.fold import EventRow
from simmerge_ray.service.log.outcomes import Status
from simmerge_ray.service.registry import Registry
from simmerge_ray.service.retraining.reward_labels import (
    SETUP_KINDS,
    LoggedMerges,
    Rewarded,
    all_rows,
    logged_merges,
    reward_labels,
    training_rewards,
)
from simmerge_ray.service.retraining.shadow import (
    MARGIN,
    OnLabels,
    OnLog,
    compare_on_labels,
    compare_on_log,
    fold_models,
    left_out,
    override_on_log,
    verdict,
)
from simmerge_ray.signals.propagation.second_order import SecondOrder

FORMAT = 1
HELD_OUT = 0.25  # of the rewards, the last ones
MIN_REWARDS_OF_ARM = 8  # below that an arm without labels stays with the bandit, and is none of the selector's
SELECTOR, LABELS = "selector", "labels"


@dataclass(frozen=True)
class Setup:
    """A selector that answered from event `seq` on, and what its arms started from."""

    seq: int
    epoch: int
    version: str
    num_dimensions: int
    priors: Mapping[str, GaussianPosterior]
    noise: Noise | None


@dataclass(frozen=True)
class Material:
    """All that a retraining is made from.

    dataset: labels, with a column for each later arm, in which nothing was measured. labelled: the same without these.
    training: rewards up to event `last_seq`. rewards: what a selector learns from them. known: those
    of them that the present selector was trained on.
    held_out: the later ones. later: arms of rewards alone. config: of the present selector. identical: arms that
    make the same merge of a pair, by the labels.
    """

    dataset: SelectionDataset
    labelled: SelectionDataset
    loaded: LoadedDataset
    logged: LoggedMerges
    training: tuple[Rewarded, ...]
    rewards: list[RewardedMerge]
    known: list[RewardedMerge]
    held_out: tuple[Rewarded, ...]
    last_seq: int
    later: tuple[str, ...]
    config: TrainConfig
    namespace: str
    identical: Classes

    @cached_property
    def reference(self) -> tuple[int, ...]:
        """Columns of the arms that the labels have."""
        return tuple(range(len(self.labelled.arms)))

    @cached_property
    def digest(self) -> str:
        """Of all that the result depends on."""
        arrays = digest_bytes(self.labelled.features.tobytes(), self.labelled.utilities.tobytes())
        contexts = [[one.left, one.right, one.task] for one in self.labelled.contexts]
        read = [contexts, self.dataset.arms, self.dataset.columns, arrays]
        # The held-out rewards as well: they are in the comparison, and in the labels.
        every = [[one.seq, one.plan.id, one.tasks, one.utility] for one in self.logged.rewarded]
        told = [rewards_digest(self.rewards), every, self.last_seq, self.namespace]
        return digest_json([FORMAT, read, told, self.config.model_dump(mode="json")])

    @cached_property
    def folds(self) -> list[Fold]:
        """Groups of checkpoints that are left out in turn; none where too few are left then."""
        return usable_folds(checkpoint_folds(pairs_of(self.dataset.contexts), self.config.num_folds, self.config.seed))

    @cached_property
    def fold_models(self) -> list[FittedModel]:
        """What the candidate would be without each group."""
        return fold_models(self.dataset, self.folds, self.config, self.reference, self.rewards)


@dataclass(frozen=True)
class Candidate:
    """A trained selector beside the present one. epoch: to be promoted by, its number still open."""

    version: str
    path: Path
    epoch: EncoderEpoch
    log: OnLog | None
    labels: OnLabels | None


def setups_of(rows: Iterable[EventRow]) -> list[Setup]:
    """Every selector that ever answered, in order; the last is the present one. Rows of other kinds are skipped."""
    found: list[Setup] = []
    epoch, size, noise = 0, 0, None
    priors: dict[str, GaussianPosterior] = {}
    for row in rows:
        if row.kind not in SETUP_KINDS:
            continue
        event = row.event
        if isinstance(event, EncoderEpoch):
            epoch, priors, noise, size = event.epoch, dict(event.priors), event.noise, event.num_dimensions
            found.append(Setup(row.seq, epoch, event.model_version, size, dict(priors), noise))
        elif isinstance(event, Activation):
            found.append(Setup(row.seq, epoch, event.model_version, size, dict(priors), noise))
        elif isinstance(event, WarmStart | ArmAdded) and event.epoch == epoch:
            priors |= dict(event.priors) if isinstance(event, WarmStart) else {event.arm: event.prior}
            noise = event.noise if isinstance(event, WarmStart) else noise
            size = next(iter(priors.values())).num_dimensions
            if found:  # it belongs to the selector that answers
                found[-1] = replace(found[-1], priors=dict(priors), noise=noise, num_dimensions=size)
    return found


def present_setup(logged: LoggedMerges, namespace: str) -> Setup:
    """What answers now.

    Raises:
        LabelError: the log names no selector, so nothing was ever served from it.
    """
    setups = setups_of(logged.setups)
    if not setups:
        raise LabelError(f"the log of namespace {namespace!r} names no selector: start the service on it first")
    return setups[-1]


def material_of(
    loaded: LoadedDataset,
    present: Selector,
    logged: LoggedMerges,
    namespace: str,
    held_out: float = HELD_OUT,
    identical: Classes | None = None,
) -> Material:
    """Join labels and rewards.

    Args:
        held_out: share of the rewards, the last ones, that nothing is trained on. identical: `identical_arms` of the
            labels.

    Raises:
        LabelError: no rewards, or they or the labels do not fit the present selector. SelectorError: that cannot be
            trained again: it is no mlp, or its task encoding needs more than the log has.
    """
    config = check_config(TrainConfig, dict(present.provenance["config"]), "the present selector's config")
    if config.model != "mlp" or config.task_encoding != "none":  # the fold encodes features, it knows no tasks
        raise SelectorError(
            f"the present selector is {config.model} with task encoding {config.task_encoding}; rewards retrain mlp "
            "with none"
        )
    labelled = loaded.dataset
    if labelled.columns != present.columns:
        other = sorted(set(labelled.columns) ^ set(present.columns)) or ["their order"]
        raise LabelError(f"the data set and the present selector have different features, e.g. {other[0]}")
    if not logged.rewarded:
        raise LabelError(f"the log of namespace {namespace!r} has no rewards to retrain from")
    num_held_out = max(1, round(held_out * len(logged.rewarded)))
    training, later = logged.rewarded[:-num_held_out], logged.rewarded[-num_held_out:]
    counts: dict[str, int] = {}
    for one in training:
        arm = one.plan.steps[-1].arm.label
        counts[arm] = counts.get(arm, 0) + 1
    added = tuple(sorted(a for a, n in counts.items() if a not in labelled.arms and n >= MIN_REWARDS_OF_ARM))
    arms = (*labelled.arms, *added)
    missing = np.full((len(labelled.contexts), len(added)), np.nan)
    last_seq = training[-1].seq if training else 0
    before = present.provenance.get("rewards", {})
    known_seq = before.get("last_seq", 0) if before.get("namespace") == namespace else 0
    width = len(labelled.columns)
    training_rewards(later, arms, width)  # they have to fit as well: the new encoder folds them
    return Material(
        dataset=replace(labelled, arms=arms, utilities=np.hstack([labelled.utilities, missing])),
        labelled=labelled,
        loaded=loaded,
        logged=logged,
        training=training,
        rewards=training_rewards(training, arms, width),
        known=training_rewards([one for one in training if one.seq <= known_seq], arms, width),
        held_out=later,
        last_seq=last_seq,
        later=added,
        config=config,
        namespace=namespace,
        identical=identical or {},
    )


def train_candidate(material: Material, present: Selector, out: Path) -> Candidate:
    """Train a selector on labels and rewards, compare it with the present one, and keep all of it below `out`.

    The selector whole or not at all, under a name by what it is made from; what is there is read.

    Raises:
        LabelError: too few labels, see `train_selector`.
    """
    target = out / f"retrain-{material.digest[:12]}"
    if not target.exists():
        selector = _trained(material, material.dataset, material.rewards)
        tested = zip((left_out(material.dataset, one) for one in material.folds), material.fold_models, strict=True)
        override = override_on_log(selector.override, selector.arms, material.training, list(tested))
        with new_directory(target) as partial:
            _write(partial, material, replace(selector, override=override))
    selector, warm = read_selector(target / SELECTOR), read_warm_start(target / SELECTOR)
    assert warm is not None, "written with the selector"
    size = next(iter(warm.posteriors.values())).num_dimensions
    event = EncoderEpoch(1, size, cold_ridge(warm.noise), warm.posteriors, warm.noise, selector.version)
    if event.model_version == present.version:
        return Candidate(event.model_version, target, event, None, None)
    compared = target / f"comparison-{present.version}.json"
    if not compared.exists():
        log = compare_on_log(present, selector, material.held_out)
        write_json(compared, {"log": _plain(log), "labels": _plain(_on_labels(material))})
    return Candidate(event.model_version, target, event, *_read_comparison(compared))


def _trained(material: Material, dataset: SelectionDataset, rewards: Sequence[RewardedMerge]) -> Selector:
    selector = train_selector(dataset, material.config, material.labelled.arms, rewards)
    about = {"namespace": material.namespace, "num": len(rewards), "last_seq": material.last_seq}
    return replace(selector, provenance={**selector.provenance, "rewards": about})


def _write(target: Path, material: Material, selector: Selector) -> None:
    """Selector with its warm start, that of the shortlist on the features of `second_order`, the rewards as labels."""
    part = material.dataset.restricted(SecondOrder(material.loaded.tables[0]).columns)
    index = [material.dataset.columns.index(column) for column in part.columns]
    rewards = [replace(one, features=one.features[..., index]) for one in material.rewards]
    write_selectors(target / SELECTOR, selector, _trained(material, part, rewards), material.labelled)
    write_warm_start(target / SELECTOR, _warm_start(material, selector))
    digests: dict[str, str] = {}
    for table in material.loaded.tables:
        digests |= table.provenance["checkpoints"]
    LabelStore(target / LABELS).append(reward_labels(material.logged, material.namespace, digests))


def _warm_start(material: Material, selector: Selector) -> WarmStartFile:
    """Priors from the labels alone: the rewards come when the log is folded."""
    labelled, folds = material.labelled, material.folds
    if not folds:
        raise LabelError(
            f"no checkpoint can be left out and {MIN_CONTEXTS} contexts kept: the bandit cannot start from these labels"
        )
    merges = merges_of(labelled, selector.fitted, range(len(labelled.contexts)))
    level = merge_values(out_of_fold_level(labelled, folds, material.config, material.fold_models), merges)
    posteriors, noise = warm_posteriors(merges, labelled.arms, level, RIDGE, POWER)
    return WarmStartFile(posteriors, noise, material.identical)


def _on_labels(material: Material) -> OnLabels | None:
    dataset, folds, config, reference = material.dataset, material.folds, material.config, material.reference
    old = fold_models(dataset, folds, config, reference, material.known)
    return compare_on_labels(dataset, folds, config, reference, old, material.fold_models, material.loaded.base_of)


def _plain(value: OnLog | OnLabels | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _read_comparison(path: Path) -> tuple[OnLog | None, OnLabels | None]:
    content = json.loads(path.read_text())
    log, labels = content["log"], content["labels"]
    if log is not None:
        log = OnLog(**{**log, **{name: Estimate(**log[name]) for name in ("present", "candidate", "gain")}})
    if labels is not None:
        interval = labels["interval"]
        labels = OnLabels(**{**labels, "interval": tuple(interval) if interval else None})
    return log, labels


PROMOTED, UNCHANGED, REFUSED, TRAINED = "promoted", "unchanged", "not promoted", "trained"


@dataclass(frozen=True)
class Result:
    """What a retraining did, one of the four above (unchanged: it answers already), with which selector, and why."""

    done: str
    version: str
    reason: str

    @property
    def line(self) -> str:
        """For people."""
        return f"selector {self.version} {self.done}: {self.reason}"

    @property
    def refused(self) -> bool:
        """Whether it was not promoted because it may be worse."""
        return self.done == REFUSED


def promote(
    log: EventLog, registry: Registry, candidate: Candidate, present: Setup, head: int, margin: float = MARGIN
) -> Result:
    """Publish a candidate and begin its epoch, if it is not worse than the selector that it was compared with.

    Args:
        head: the last event that was known when `present` was the present one.

    Raises:
        StoreError: the database, or another selector began to answer meanwhile.
    """
    if candidate.version == present.version:
        return Result(UNCHANGED, candidate.version, "the present selector was trained on the same")
    decided = verdict(candidate.log, candidate.labels, margin)
    if not decided.promote:
        return Result(REFUSED, candidate.version, decided.reason)
    if setups_of(all_rows(log, head)):
        raise StoreError("another selector began to answer meanwhile; run again to compare with it")
    version = registry.publish(candidate.path / SELECTOR)
    if version != candidate.version:
        raise StoreError(f"the registry named the selector {version!r}, the log would name it {candidate.version!r}")
    _begin(log, candidate.epoch, present)
    return Result(PROMOTED, version, decided.reason)


def roll_back(log: EventLog, registry: Registry, version: str) -> Result:
    """Let a former selector answer again, from the priors that it had.

    Raises:
        LabelError: it never answered in this log. InputError: the registry does not have it. StoreError.
    """
    setups = setups_of(all_rows(log))
    if not setups:
        raise LabelError(f"the log of namespace {log.namespace!r} names no selector")
    present = setups[-1]
    if version == present.version:
        return Result(UNCHANGED, version, "it is the present selector")
    former = next((one for one in reversed(setups) if one.version == version), None)
    if former is None:
        raise LabelError(unknown_name("former selector", version, {one.version for one in setups if one.version}))
    if former.noise is None or not former.priors:
        raise LabelError(f"selector {version!r} answered without priors in the log; it cannot begin an epoch")
    registry.path(version)
    epoch = EncoderEpoch(1, former.num_dimensions, cold_ridge(former.noise), former.priors, former.noise, version)
    _begin(log, epoch, present)
    return Result(PROMOTED, version, f"rolled back from {present.version}")


def _begin(log: EventLog, epoch: EncoderEpoch, present: Setup) -> None:
    """Append an epoch after the present one; of two at the same time one is refused, since both take one number."""
    event = replace(epoch, epoch=present.epoch + 1)
    outcome = log.append(event, key=f"retrain-{epoch.model_version}-{present.seq}")
    if outcome.status not in (Status.CREATED, Status.REPLAYED):
        raise StoreError(f"another selector began to answer meanwhile ({outcome.reason}); run again to compare with it")


def report_text(material: Material, candidate: Candidate, present: Setup, result: Result, margin: float) -> str:
    """The retraining in Markdown."""
    counts: dict[str, int] = {}
    for one in material.logged.rewarded:
        counts[one.plan.steps[-1].arm.label] = counts.get(one.plan.steps[-1].arm.label, 0) + 1
    num_plans = sum(len(one.plan.steps) > 1 for one in material.logged.rewarded)
    lines = [
        f"# Retraining of {present.version}: {result.done}",
        "",
        f"{result.reason[:1].upper()}{result.reason[1:]}.",
        "",
        f"- new selector: `{candidate.version}`; present one: `{present.version}` (encoder epoch {present.epoch})",
        f"- log of namespace `{material.namespace}`, events 1 to {material.logged.head}: "
        f"{len(material.logged.rewarded)} rewards that count ({num_plans} of plans of several steps), "
        f"{len(material.logged.infeasible)} merges closed as infeasible",
        f"- trained on {len(material.rewards)} rewards, up to event {material.last_seq} (the present one knew "
        f"{len(material.known)} of them), and on {len(material.labelled.contexts)} labelled contexts; "
        f"{len(material.held_out)} later rewards held out",
        "- rewards by arm: " + ", ".join(f"`{arm}` {count}" for arm, count in sorted(counts.items())),
    ]
    if material.later:
        lines.append(f"- arms known from rewards alone: {', '.join(f'`{arm}`' for arm in material.later)}")
    lines += ["", "## On the log", "", *_log_lines(candidate.log, margin)]
    lines += ["", "## On the labels", "", *_label_lines(candidate.labels, margin)]
    return "\n".join(lines) + "\n"


def _log_lines(log: OnLog | None, margin: float) -> list[str]:
    if log is None:
        return ["Not compared: fewer than two of the held-out rewards are of drawn decisions."]
    rows = [
        f"| {name} | {one.value:.4f} | {one.standard_error:.4f} | {one.effective:.1f} |"
        for name, one in (("present", log.present), ("new", log.candidate), ("new - present", log.gain))
    ]
    return [
        f"What the choices of either selector would have earned on {log.num} held-out decisions that were drawn "
        f"(doubly robust); in {log.num_differ} the two choose differently. What was played earned {log.observed:.4f}.",
        "",
        "| | utility | standard error | effective decisions |",
        "|---|---|---|---|",
        *rows,
        "",
        f"With 95 % the difference is above {log.low:+.4f}; to be promoted it has to be above {-margin:+.4f}.",
    ]


def _label_lines(labels: OnLabels | None, margin: float) -> list[str]:
    if labels is None:
        return ["Not compared: too few checkpoints to leave some out."]
    interval = "no interval" if labels.interval is None else "[{:+.4f}, {:+.4f}]".format(*labels.interval)
    return [
        f"The best predicted arm of each merge on checkpoints that were left out ({labels.num_contexts} contexts), "
        f"{labels.unit}: trained as the present one {labels.present:.4f}, as the new one {labels.candidate:.4f}; "
        f"difference {labels.gain:+.4f} {interval}; to be promoted it has to be above {-margin:+.4f}.",
    ]


def read_log(log: EventLog) -> LoggedMerges:
    """All that the log says about merges. Raises StoreError, LabelError."""
    return logged_merges(all_rows(log))
