"""Gram matrices of the inputs of linear layers, `X^T X / n`, of a checkpoint on its own task: the data of `regmean`.

X are the inputs of a layer at all n tokens of the probes and of the checkpoint's own answers to them. Sums are float64
in the order of the micro-batches. Kept beside signatures, one directory for each checkpoint and task, written once
under the digest of what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simmerge_ray.base.storage import Place, digest_json, write_atomically
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef, gram_name
from simmerge_ray.signals.candidates.answers import AnswerBatch, AnswerSpec, answer_logits
from simmerge_ray.signals.candidates.retention import answers_of
from simmerge_ray.signals.collect import ProbeModel
from simmerge_ray.signals.tuning.prepare import stored_names

_FILE = "model.safetensors"  # what headers are read from


@dataclass(frozen=True)
class GramJob:
    """One checkpoint on the probes of its task, small enough to send anywhere. out: directory of its matrices."""

    ref: CheckpointRef
    task: str
    batches: tuple[TokenBatch, ...]
    max_tokens: int
    out: Place


def gram_jobs(
    catalogue: Catalogue, batches: Mapping[str, Sequence[TokenBatch]], max_tokens: int, store: Place
) -> list[GramJob]:
    """One for each checkpoint of a catalogue, whose tasks are checked (`retention.check_members`).

    Args:
        batches: micro-batches of every task. max_tokens: of an answer. store: directory of all matrices.
    """
    store, digests, jobs = store.resolve(), catalogue.digests(), []
    for ref in catalogue.checkpoints:
        task = catalogue.own_task[ref.id]
        assert task is not None, "checked by the caller"
        tokens = [[b.input_ids.tolist(), b.attention_mask.tolist()] for b in batches[task]]
        digest = digest_json([1, digests[ref.id], tokens, max_tokens])[:16]
        jobs.append(GramJob(ref, task, tuple(batches[task]), max_tokens, store / f"{ref.id}-{task}-{digest}"))
    return jobs


def with_grams(catalogue: Catalogue, jobs: Sequence[GramJob]) -> Catalogue:
    """The catalogue whose checkpoints name their matrices."""
    places = {job.ref.id: job.out for job in jobs}
    refs = (replace(ref, grams=places.get(ref.id, ref.grams)) for ref in catalogue.checkpoints)
    return replace(catalogue, checkpoints=tuple(refs))


def write_grams(job: GramJob, device: str = "cpu") -> None:
    """Compute the matrices of one checkpoint, if they are not there.

    Raises:
        ProbeError: its answers are all empty. CheckpointError: it cannot be loaded.
    """
    from safetensors.numpy import save

    if (job.out / _FILE).exists():
        return
    runner = ProbeModel(device=device)
    answers = answers_of(runner, job.ref, job.task, job.batches, AnswerSpec(job.max_tokens))
    stored = stored_names(job.ref, runner)
    found = gram_matrices(runner.load(job.ref), answers.batches)
    named = {gram_name(stored[name], axis): matrix for (name, axis), matrix in found.items()}
    write_atomically(job.out / _FILE, save(named))


@torch.no_grad()
def gram_matrices(model: Any, batches: Sequence[AnswerBatch]) -> dict[tuple[str, int], np.ndarray]:
    """`X^T X / n` of every linear layer, (D, D) float32, by the name of its weight and the axis of it that stands for
    the inputs: 1 of a `Linear`, 0 of GPT-2's `Conv1D`. Layers that share an input share its sums.

    A weight that is no layer's alone (tied to the embedding) is left out.
    """
    layers = _linear_layers(model)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    owner: dict[str, str] = {}  # the first layer of those with the same input
    mask = torch.empty(0)
    seen: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            states: Tensor = args[0]
            first = next((other for tensor, other in seen if tensor is states), None)
            owner[name] = first or name
            if first is not None:
                return
            seen.append((states, name))
            flat = states.reshape(-1, states.shape[-1])
            rows = (flat[mask.reshape(-1)] if states.shape[:-1] == mask.shape else flat).double()
            sums[name] = sums[name] + rows.T @ rows if name in sums else rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return take

    handles = [module.register_forward_pre_hook(hook(name)) for name, (module, _) in layers.items()]
    try:
        for batch in batches:
            mask = batch.attention_mask.bool().to(model.device)
            answer_logits(model, batch)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    means = {name: (total / counts[name]).float().cpu().numpy() for name, total in sums.items()}
    return {(name, axis): means[owner[name]] for name, (_, axis) in layers.items() if name in owner}


def _linear_layers(model: Any) -> dict[str, tuple[nn.Module, int]]:
    """Linear layers by the parameter name of their weight, with the axis of their inputs."""
    from transformers.pytorch_utils import Conv1D

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        names[id(module.weight)]: (module, 1 if isinstance(module, nn.Linear) else 0)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in embeddings
    }
