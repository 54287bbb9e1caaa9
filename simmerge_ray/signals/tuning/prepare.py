"""From a catalogue and probes to what the tuner runs: task vectors, groups, and every member's answers."""

from __future__ import annotations

import math
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
from simmerge_ray.signals.tuning.memory import is_low_rank, recompute_layers, recomputes, rows_at_once
from simmerge_ray.signals.tuning.starts import norm_matched_weights, recipe_start
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


def prepare_tuning(
    catalogue: Catalogue,
    batches: Mapping[str, Sequence[TokenBatch]],
    config: TuneConfig,
    device: str = "cpu",
    start: Recipe | None = None,
) -> Tuning:
    """Answers of every member of the catalogue, then the model that its coefficients are tuned in.

    Args:
        batches: micro-batches of the probes of every member's own task.
        start: recipe whose weights are the start, instead of the config's.

    Raises:
        ProbeError: a member's answers are all empty. CheckpointError: a checkpoint cannot be loaded. ConfigError: see
            `starts.check_start`.
    """
    base = catalogue.base
    assert base is not None, "checked by the caller"
    runner = ProbeModel(device=device)
    tuning_batches = tuning_batches_of(runner, catalogue, batches, config, device)
    base_weights = _parameters(base, runner)
    vectors = [_vectors(member, base, base_weights, runner) for member in catalogue.checkpoints]
    stored = stored_names(base, runner)
    by_stored = groups_of(stored.values(), config.groups)
    loaded = runner.load(base)
    if recomputes(base, batches, config):
        recompute_layers(loaded)
    model = CoefficientModel(loaded, base_weights, vectors, {name: by_stored[of] for name, of in stored.items()})
    if start is not None:
        first = recipe_start(start, catalogue.ids, by_stored, model.group_names)
    else:
        first = np.repeat(_shares(vectors, config)[:, None], len(model.group_names), axis=1)
    return Tuning(model, tuple(tuning_batches), tuple(catalogue.ids), first)


def tuning_batches_of(
    runner: ProbeModel,
    catalogue: Catalogue,
    batches: Mapping[str, Sequence[TokenBatch]],
    config: TuneConfig,
    device: str = "cpu",
) -> list[TuningBatch]:
    """Every member's own answers with what it says there; a part of the probes is held out, the same in every run."""
    spec, found = AnswerSpec(config.max_tokens), []
    for member in catalogue.checkpoints:
        task = catalogue.own_task[member.id]
        assert task is not None, "checked by the caller"
        answers = answers_of(runner, member, task, batches[task], spec)
        width = max(batch.input_ids.shape[1] for batch in answers.batches)
        size = rows_at_once(member, width, config.max_tokens)
        held_out = held_out_answers(answers.num_answers, config.held_out)
        for is_out in (False, True):
            chosen = np.flatnonzero(held_out == is_out)
            num_tokens = int(np.isin(answers.answer, chosen).sum())
            for start in range(0, len(chosen), size):
                batch = answers.select(chosen[start : start + size].tolist())
                with torch.no_grad():
                    logits = answer_logits(runner.load(member), batch).cpu()
                kept = kept_tokens(logits, None, spec.num_kept)
                own, rest = kept_log_probabilities(logits, kept)
                share = 1.0 / num_tokens / len(catalogue.checkpoints)
                on_device = [torch.from_numpy(array).to(device) for array in (kept, own, rest)]
                weight = torch.full((len(logits),), share, device=device)
                out = torch.full((len(logits),), is_out)
                found.append(TuningBatch(batch, on_device[0], on_device[1], on_device[2], weight, out))
    return found


def stored_names(ref: CheckpointRef, runner: ProbeModel) -> dict[str, str]:
    """The name in the checkpoint's files of every parameter of its model, which may have a prefix more."""
    model, specs = runner.load(ref), read_headers(ref)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {name: name if name in specs else name.removeprefix(prefix) for name, _ in model.named_parameters()}


def _shares(vectors: Sequence[Mapping[str, TaskVector]], config: TuneConfig) -> np.ndarray:
    """Coefficients to start from, one for each member, with the config's mean."""
    mean = 1.0 / len(vectors) if config.start is None else config.start
    if config.start_from == "equal":
        return np.full(len(vectors), mean)
    norms = [math.sqrt(math.fsum(vector.square() for vector in of_member.values())) for of_member in vectors]
    return len(vectors) * mean * np.array(norm_matched_weights(norms))


def held_out_answers(num_answers: int, share: float) -> np.ndarray:
    """(num_answers,) bool: which answers of a member only decide when to stop; the same ones every time."""
    return np.asarray(np.random.default_rng(0).permutation(num_answers) >= round(num_answers * (1.0 - share)))


def _parameters(ref: CheckpointRef, runner: ProbeModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in runner.load(ref).named_parameters()}


def _vectors(
    member: CheckpointRef, base: CheckpointRef, base_weights: Mapping[str, torch.Tensor], runner: ProbeModel
) -> dict[str, TaskVector]:
    found: dict[str, TaskVector] = {}
    if is_low_rank(member, base):
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
