"""All that a retraining is made from: the offline labels and the rewards of the log, those held out set apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from simmerge_ray.base.config import TrainConfig, check_config
from simmerge_ray.base.errors import LabelError, SelectorError
from simmerge_ray.base.storage import digest_bytes, digest_json
from simmerge_ray.plans.keeping import KEEP, KEEP_ARMS, keeps, merge_arms
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.files import LoadedDataset
from simmerge_ray.selector.data.rewards import RewardedMerge, rewards_digest
from simmerge_ray.selector.data.splits import Fold, checkpoint_folds, pairs_of
from simmerge_ray.selector.models.model import FittedModel, Selector
from simmerge_ray.selector.models.train import fit_models, usable_folds
from simmerge_ray.service.bandit.artifact import Classes
from simmerge_ray.service.retraining.reward_labels import LoggedMerges, Rewarded, training_rewards

FORMAT = 1
HELD_OUT = 0.25  # of the rewards, the last ones
MIN_REWARDS_OF_ARM = 8  # below that an arm without labels stays with the bandit, and is none of the selector's


@dataclass(frozen=True)
class Material:
    """All that a retraining is made from.

    dataset: labels, with a column for each later operator, in which nothing was measured. labelled: the same without
    these. training: rewards up to event `last_seq`. rewards: what a selector learns from them. known: those of them
    that the present selector was trained on.
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
        """Columns of the merge operators that the labels have."""
        return tuple(range(len(merge_arms(self.labelled.arms))))

    @cached_property
    def measured(self) -> tuple[int, ...]:
        """Columns of all that the labels have, kept parents included."""
        return tuple(k for k, arm in enumerate(self.dataset.arms) if arm in self.labelled.arms)

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
        return self.models_without_groups(self.rewards)

    def models_without_groups(self, rewards: Sequence[RewardedMerge]) -> list[FittedModel]:
        """A model for each fold, from its contexts and from the rewards of merges without its checkpoints."""
        parts = [fold.training for fold in self.folds]
        return fit_models(self.dataset, parts, self.config, self.reference, rewards)


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

    Raises LabelError: no rewards, or they or the labels do not fit the present selector. SelectorError: that cannot be
    trained again: it is no mlp, or its task encoding needs more than the log has.
    """
    if not logged.rewarded:
        raise LabelError(f"the log of namespace {namespace!r} has no rewards to retrain from")
    config, labelled = _config_of(present), loaded.dataset
    if labelled.columns != present.columns:
        other = sorted(set(labelled.columns) ^ set(present.columns)) or ["their order"]
        raise LabelError(f"the data set and the present selector have different features, e.g. {other[0]}")
    num_held_out = max(1, round(held_out * len(logged.rewarded)))
    training, latest = logged.rewarded[:-num_held_out], logged.rewarded[-num_held_out:]
    counts = Counter(one.arm for one in training)
    merges, kept = merge_arms(labelled.arms), KEEP_ARMS if keeps(labelled.arms) else ()
    # A selector that has no `keep` does not get it from rewards: the bandit goes on with it.
    later = {a for a, n in counts.items() if n >= MIN_REWARDS_OF_ARM} - {*merges, KEEP}
    added = tuple(sorted(later))
    arms, width = (*merges, *added, *kept), len(labelled.columns)
    missing = np.full((len(labelled.contexts), len(added)), np.nan)
    utilities = np.hstack([labelled.utilities[:, : len(merges)], missing, labelled.utilities[:, len(merges) :]])
    before = present.provenance.get("rewards", {})
    known_seq = before.get("last_seq", 0) if before.get("namespace") == namespace else 0
    training_rewards(latest, arms, width)  # they have to fit as well: the new encoder folds them
    return Material(
        dataset=replace(labelled, arms=arms, utilities=utilities),
        labelled=labelled,
        loaded=loaded,
        logged=logged,
        training=training,
        rewards=training_rewards(training, arms, width),
        known=training_rewards([one for one in training if one.seq <= known_seq], arms, width),
        held_out=latest,
        last_seq=training[-1].seq if training else 0,
        later=added,
        config=config,
        namespace=namespace,
        identical=identical or {},
    )


def _config_of(present: Selector) -> TrainConfig:
    """What the present selector was trained with; raises SelectorError as `material_of`."""
    config = check_config(TrainConfig, dict(present.provenance["config"]), "the present selector's config")
    if config.model != "mlp" or config.task_encoding != "none":  # the fold encodes features, it knows no tasks
        raise SelectorError(
            f"the present selector is {config.model} with task encoding {config.task_encoding}; rewards retrain mlp "
            "with none"
        )
    return config
