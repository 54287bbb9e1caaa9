"""The report card of a merge: what it keeps of every member of a catalogue, as numbers and as probes in words."""

from __future__ import annotations

from typing import Any

from simmerge_ray.base.errors import PlanError, unknown_name
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Place, as_place
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.compatibility import check_compatible
from simmerge_ray.checkpoints.probes import ProbeSet, load_probe_sets
from simmerge_ray.checkpoints.references import CheckpointRef, locate_checkpoint
from simmerge_ray.checkpoints.tokenizers import load_tokenizer


def retention_sources(
    model: str, catalogue_path: Place, probes: Place
) -> tuple[CheckpointRef, Catalogue, dict[str, ProbeSet]]:
    """What is looked at, the catalogue and its probes, checked before any weight is read.

    Args:
        model: id of a checkpoint of the catalogue, or the directory or hub id of any other.

    Raises:
        PlanError: no such checkpoint. ProbeError: see `check_members`. IncompatibleCheckpointsError: the model does not
            fit the catalogue.
    """
    return checked_sources(model, load_catalogue(catalogue_path), load_probe_sets(probes))


def checked_sources(
    model: str, catalogue: Catalogue, probe_sets: dict[str, ProbeSet]
) -> tuple[CheckpointRef, Catalogue, dict[str, ProbeSet]]:
    """`retention_sources` of a catalogue and probes that are read."""
    from simmerge_ray.signals.candidates.retention import check_members

    check_members(catalogue, probe_sets)
    known = {ref.id: ref for ref in catalogue.all_refs}
    if model not in known and "/" not in model and not as_place(model).is_dir():
        raise PlanError(
            f"{model!r} is no directory here, and {unknown_name('checkpoint of the catalogue', model, known)}"
        )
    ref = known[model] if model in known else locate_checkpoint(model)
    if model not in known:
        check_compatible((*catalogue.checkpoints, ref))
    return ref, catalogue, probe_sets


def retention_stage(
    ref: CheckpointRef,
    catalogue: Catalogue,
    probe_sets: dict[str, ProbeSet],
    narrator: Narrator,
    max_tokens: int,
    num_examples: int,
    signatures: Place | None = None,
) -> list[dict[str, Any]]:
    """One row a member: retention in [0, 1]; nll, kl and entropy in nats a token; the same of the base; examples.

    signatures: members' answers are read from there, and written there where they are missing.
    """
    from simmerge_ray.signals.candidates.answers import AnswerSpec
    from simmerge_ray.signals.candidates.retention import member_retentions
    from simmerge_ray.signals.candidates.signatures import members_answers
    from simmerge_ray.signals.compute import local_executor
    from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
    from simmerge_ray.signals.tokens import tokenize_probes

    used = {task: probe_sets[task] for task in sorted({t for t in catalogue.own_task.values() if t})}
    batches, spec, known = tokenize_probes(catalogue, used, SignatureSpec(), max_tokens), AnswerSpec(max_tokens), None
    with narrator.stage("retention") as stage:
        with narrator.bar("checkpoints run") as report:
            if signatures is not None:
                written = members_answers(catalogue, used, SignatureStore(signatures), local_executor(catalogue), spec)
                known = {owner.checkpoint: answers for owner, answers in written.items()}
            found = member_retentions(ref, catalogue, batches, spec, progress=report, known=known)
        kept = sum(one.scores.kept.sum() for one in found)
        stage.result = f"{kept} of {sum(len(one.own) for one in found)} answers kept"
    tokenizer = load_tokenizer(catalogue.checkpoints[0])
    rows = []
    for one in found:
        scores, base = one.scores, one.base_scores
        rows.append(
            {
                "member": one.member,
                "task": one.task,
                "num_answers": len(one.own),
                "retention": scores.retention,
                "nll": scores.mean_nll,
                "kl": scores.mean_kl,
                "entropy": scores.mean_entropy,
                "repetition": one.repetition,
                "base_retention": None if base is None else base.retention,
                "base_kl": None if base is None else base.mean_kl,
                "examples": [
                    {
                        "probe": probe_sets[one.task].probes[number].text,
                        "member": tokenizer.decode(one.own[number], skip_special_tokens=True),
                        "model": tokenizer.decode(one.answers[number], skip_special_tokens=True),
                        "kl": float(scores.kl[number] / scores.num_tokens[number]),
                    }
                    for number in one.most_different(num_examples)
                ],
            }
        )
    return rows
