"""From a catalogue and probes to what the tuner runs: task vectors, groups, and every member's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.checkpoints.adapters import LoraAdapter
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.model import load_model
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.recipe import Recipe, recipe_of
from simmerge_ray.signals.candidates.answers import (
    AnswerSpec,
    answer_logits,
    kept_log_probabilities,
    kept_tokens,
)
from simmerge_ray.signals.candidates.retention import answers_of
from simmerge_ray.signals.collect import ProbeModel
from simmerge_ray.signals.tuning.groups import groups_of, member_weight
from simmerge_ray.signals.tuning.tuner import CoefficientModel, TuningBatch
from simmerge_ray.signals.tuning.vectors import DenseVector, LowRankVector, TaskVector


@dataclass(frozen=True)
class Tuning:
    """members: their order is that of the coefficients' rows. start: (M, G)."""

    model: CoefficientModel
    batches: tuple[TuningBatch, ...]
    members: tuple[str, ...]
    start: np.ndarray

    def recipe(self, coefficients: np.ndarray) -> Recipe:
        """Task arithmetic with a weight for each member and group."""
        names = self.model.group_names
        rows = (dict(zip(names, map(float, row), strict=True)) for row in coefficients)
        return recipe_of(
            make_arm("task_arithmetic"),
            {member: member_weight(row) for member, row in zip(self.members, rows, strict=True)},
        )


def stated_bytes(catalogue: Catalogue) -> int:
    """Memory of a tuning beside activations, float32: model and base, a task vector of every member (of a LoRA member
    of the base its factors), and the largest tensor's gradient."""
    assert catalogue.base is not None
    specs = read_headers(catalogue.base)
    sizes = [int(np.prod(spec.shape)) for spec in specs.values()]
    dense = sum(not _is_low_rank(ref, catalogue.base) for ref in catalogue.checkpoints)
    return 4 * (sum(sizes) * (2 + dense) + max(sizes))


def prepare_tuning(
    catalogue: Catalogue, batches: Mapping[str, Sequence[TokenBatch]], config: TuneConfig, device: str = "cpu"
) -> Tuning:
    """Answers of every member of the catalogue, then the model that its coefficients are tuned in.

    Args:
        batches: micro-batches of the probes of every member's own task.

    Raises:
        ProbeError: a member's answers are all empty. CheckpointError: a checkpoint cannot be loaded.
    """
    base = catalogue.base
    assert base is not None, "checked by the caller"
    spec, runner = AnswerSpec(config.max_tokens), ProbeModel(device=device)
    tuning_batches: list[TuningBatch] = []
    for member in catalogue.checkpoints:
        task = catalogue.own_task[member.id]
        assert task is not None
        answers = answers_of(runner, member, task, batches[task], spec)
        limit = round(answers.num_answers * (1.0 - config.held_out))
        held_out = np.random.default_rng(0).permutation(answers.num_answers) >= limit
        shares = {out: max(1, int((held_out[answers.answer] == out).sum())) for out in (False, True)}
        for batch in answers.batches:
            with torch.no_grad():
                logits = answer_logits(runner.load(member), batch).cpu()
            kept = kept_tokens(logits, None, spec.num_kept)
            own, rest = kept_log_probabilities(logits, kept)
            out = torch.from_numpy(held_out)[batch.answer]
            weight = torch.where(out, 1.0 / shares[True], 1.0 / shares[False]) / len(catalogue.checkpoints)
            on_device = [torch.from_numpy(array).to(device) for array in (kept, own, rest)]
            tuning_batches.append(
                TuningBatch(batch, on_device[0], on_device[1], on_device[2], weight.float().to(device), out)
            )
    base_weights = _parameters(base, runner)
    vectors = [_vectors(member, base, base_weights, runner) for member in catalogue.checkpoints]
    specs = read_headers(base)
    prefix = f"{getattr(runner.load(base), 'base_model_prefix', '')}."
    stored = {name: name if name in specs else name.removeprefix(prefix) for name in base_weights}
    by_stored = groups_of(stored.values(), config.groups)
    del runner
    model = CoefficientModel(
        load_model(base, device=device), base_weights, vectors, {name: by_stored[of] for name, of in stored.items()}
    )
    start = 1.0 / len(vectors) if config.start is None else config.start
    shape = (len(vectors), len(model.group_names))
    return Tuning(model, tuple(tuning_batches), tuple(catalogue.ids), np.full(shape, start))


def _parameters(ref: CheckpointRef, runner: ProbeModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in runner.load(ref).named_parameters()}


def _is_low_rank(ref: CheckpointRef, base: CheckpointRef) -> bool:
    return ref.adapter is not None and str(ref.path) == str(base.path) and base.adapter is None


def _vectors(
    member: CheckpointRef, base: CheckpointRef, base_weights: Mapping[str, torch.Tensor], runner: ProbeModel
) -> dict[str, TaskVector]:
    found: dict[str, TaskVector] = {}
    if _is_low_rank(member, base):
        adapter = LoraAdapter(member, read_headers(member))
        prefix = f"{getattr(runner.load(base), 'base_model_prefix', '')}."
        for name, weight in base_weights.items():
            stored = next((one for one in (name, name.removeprefix(prefix)) if adapter.changes(one)), None)
            if stored is not None:
                up, down, scale = adapter.factors(stored)
                left, right = (torch.from_numpy(np.ascontiguousarray(one)).to(weight) for one in (up, down))
                found[name] = LowRankVector(left, right, scale)
        return found
    for name, weight in _parameters(member, runner).items():
        weight.sub_(base_weights[name])
        if bool(weight.any()):
            found[name] = DenseVector(weight)
    return found
