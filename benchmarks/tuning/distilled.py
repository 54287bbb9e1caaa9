"""The sceptic's baseline of tuning: all weights of the merge are free.

The plain average is trained on the same probes and answers by the same KL for as many steps as the coefficients, with
the same early stop on the probes held out. Adam's learning rate is the one that ends lowest on these; no label and no
item of an evaluation is seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import ProbeSet
from simmerge_ray.signals.candidates.answers import answer_logits
from simmerge_ray.signals.collect import ProbeModel
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.tokens import tokenize_probes
from simmerge_ray.signals.tuning.objective import answer_loss
from simmerge_ray.signals.tuning.prepare import stored_names, tuning_batches_of
from simmerge_ray.signals.tuning.tuner import TuningBatch

LEARNING_RATES = (3e-5, 1e-4, 3e-4)


def distilled(
    catalogue: Catalogue, members: Sequence[str], probe_sets: Mapping[str, ProbeSet], config: TuneConfig
) -> dict[str, Tensor]:
    """The merge with all weights trained, by the names of the base's files (tied tensors once), float32.

    Args:
        config: `objective`, `num_steps`, `held_out`, `patience` and `max_tokens` count as for coefficients.
    """
    chosen = replace(catalogue, checkpoints=tuple(catalogue.ref(member) for member in members))
    base, runner = chosen.base, ProbeModel()
    assert base is not None, "tuning needs a base"
    used = {task: probe_sets[task] for member in members if (task := chosen.own_task[member])}
    token_batches = tokenize_probes(chosen, used, SignatureSpec(), config.max_tokens)
    batches = tuning_batches_of(runner, chosen, token_batches, config)
    average: dict[str, Tensor] = {}
    for ref in chosen.checkpoints:
        for name, parameter in runner.load(ref).named_parameters():
            part = parameter.detach() / len(members)
            average[name] = average[name] + part if name in average else part
    stored, model = stored_names(base, runner), runner.load(base)
    results = [_trained(model, average, batches, config, rate) for rate in LEARNING_RATES]
    best = min(results, key=lambda result: result[0])[1]
    return {stored[name]: tensor for name, tensor in best.items()}


def _trained(
    model: torch.nn.Module,
    start: Mapping[str, Tensor],
    batches: Sequence[TuningBatch],
    config: TuneConfig,
    learning_rate: float,
) -> tuple[float, dict[str, Tensor]]:
    """(lowest held-out objective, the weights that have it)."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    optimizer = torch.optim.Adam(parameters.values(), lr=learning_rate)
    best, best_step, kept = math.inf, 0, {name: tensor.clone() for name, tensor in start.items()}
    any_held_out = any(bool(one.held_out.any()) for one in batches)
    for step in range(config.num_steps):
        if step - best_step >= config.patience:
            break
        optimizer.zero_grad()
        watched = 0.0
        for one in batches:
            losses = answer_loss(answer_logits(model, one.batch), one.kept, one.own, one.own_rest, config.objective)
            weighted = one.weight * losses
            of_tuning = weighted[~one.held_out].sum()
            of_tuning.backward()
            watched += float((weighted.detach()[one.held_out] if any_held_out else weighted.detach()).sum())
        if watched < best:
            best, best_step = watched, step
            kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        optimizer.step()
    return best, kept
