"""Candidate signals beside labels, and the predictor that is trained from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simmerge_ray.base.config import PredictorConfig, SearchConfig, TrainConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Place
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import ProbeSet
from simmerge_ray.search.evaluation.answers import AnswersTask

_SIGNATURES = "_signatures"  # in a label store; readers of Parquet directories skip names with an underscore


def answers_stage(
    catalogue: Catalogue, probe_sets: Mapping[str, ProbeSet], labels: Place, config: SearchConfig, narrator: Narrator
) -> dict[str, list[AnswersTask]]:
    """Answers of every member, by its id, and the note of them in the label store; computed where it has none yet.

    Raises:
        ProbeError, CheckpointError: see `members_answers`.
    """
    from simmerge_ray.on_ray.finding import ClusterOnDemand
    from simmerge_ray.selector.predictor.answers import answers_by_owner, note_answers
    from simmerge_ray.signals.candidates.signatures import members_answers
    from simmerge_ray.signals.signature import SignatureStore

    assert catalogue.base is not None, "checked by `check_owners`"
    with ClusterOnDemand() as cluster, narrator.stage("answers") as stage:
        with narrator.bar("units of work") as report:
            executor = cluster.executor(catalogue, config.concurrency or 2, config.gpus_per_trial, report)
            store = SignatureStore((labels / _SIGNATURES).resolve())
            answers = members_answers(catalogue, probe_sets, store, executor)
        note_answers(labels, answers, catalogue.base.id)
        stage.result = f"{sum(one.num_answers for one in answers.values())} answers of {', '.join(catalogue.ids)}"
    return answers_by_owner(answers, catalogue.base.id)


def predictor_stage(labels: Sequence[Place], out: Place, config: PredictorConfig, narrator: Narrator) -> None:
    """Train a predictor from label stores and write it.

    Raises:
        LabelError: a store without candidate signals, or too few rows.
    """
    from simmerge_ray.selector.predictor.rows import read_candidates
    from simmerge_ray.selector.predictor.train import train_predictor

    with narrator.stage("predictor") as stage:
        rows = read_candidates(labels)
        predictor = train_predictor(rows, TrainConfig(model=config.model, seed=config.seed))
        predictor.write(out)
        of = predictor.provenance
        stage.result = (
            f"{of['num_candidates']} candidates of {len(of['checkpoints'])} checkpoints and {len(of['bases'])} bases "
            f"-> {out}"
        )
    for what, found in of["left_out"].items():
        narrator.say(
            f"           {what} left out: R^2 {found['r2']:.3f}, Spearman {found['spearman']:.3f} over the candidates "
            f"of a set of members, root mean square error {found['rmse']:.3f}"
        )
