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

from collections.abc import Sequence
from dataclasses import dataclass, replace

from simmerge_ray.base.errors import LabelError, StoreError, unknown_name
from simmerge_ray.service.bandit.warm_start import cold_ridge
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import EncoderEpoch
from simmerge_ray.service.log.fold import Setup, setups_of
from simmerge_ray.service.log.outcomes import Status
from simmerge_ray.service.registry import Registry
from simmerge_ray.service.retraining.reward_labels import all_rows
from simmerge_ray.service.retraining.shadow import MARGIN, verdict
from simmerge_ray.service.retraining.training import SELECTOR, Retrained

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


def present_setup(setups: Sequence[Setup], namespace: str) -> Setup:
    """What answers now. Raises LabelError: the log names no selector, so nothing was ever served from it."""
    if not setups:
        raise LabelError(f"the log of namespace {namespace!r} names no selector: start the service on it first")
    return setups[-1]


def promote(
    log: EventLog, registry: Registry, candidate: Retrained, present: Setup, head: int, margin: float = MARGIN
) -> Result:
    """Publish a candidate and begin its epoch, if it is not worse than the selector that it was compared with.

    head: the last event that was known when `present` was the present one.

    Raises StoreError: the database, or another selector began to answer meanwhile.
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
    Raises LabelError: it never answered in this log. InputError: the registry does not have it. StoreError.
    """
    setups = setups_of(all_rows(log))
    present = present_setup(setups, log.namespace)
    if version == present.version:
        return Result(UNCHANGED, version, "it is the present selector")
    former = next((one for one in reversed(setups) if one.version == version), None)
    if former is None:
        raise LabelError(unknown_name("former selector", version, {one.version for one in setups}))
    if former.noise is None or not former.priors:
        raise LabelError(f"selector {version!r} answered without priors in the log; it cannot begin an epoch")
    registry.path(version)
    ridge = cold_ridge(former.noise)
    epoch = EncoderEpoch(1, former.num_dimensions, ridge, former.priors, former.noise, version)
    _begin(log, epoch, present)
    return Result(PROMOTED, version, f"rolled back from {present.version}")


def _begin(log: EventLog, epoch: EncoderEpoch, present: Setup) -> None:
    """Append an epoch after the present one; of two at the same time one is refused, since both take one number."""
    event = replace(epoch, epoch=present.epoch + 1)
    outcome = log.append(event, key=f"retrain-{epoch.model_version}-{present.seq}")
    if outcome.status not in (Status.CREATED, Status.REPLAYED):
        raise StoreError(f"another selector began to answer meanwhile ({outcome.reason}); run again to compare with it")
