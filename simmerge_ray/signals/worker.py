"""Units of signal work: one probe micro-batch, or one tensor, for all checkpoints of a catalogue.

A unit's result depends on nothing but the unit, and units are folded in their fixed order; so the table has the same
bits for any number of workers and after a restart. Weights never travel: a unit returns sums and (T, M, M) values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simmerge_ray.checkpoints import CheckpointRef, TensorReader
from simmerge_ray.errors import CheckpointError
from simmerge_ray.probes import TokenBatch
from simmerge_ray.signals.collect import load_model, probe_outputs
from simmerge_ray.signals.cosines import CosineMoments, pairwise_cosine
from simmerge_ray.signals.divergence import entropy, pairwise_kl
from simmerge_ray.signals.weights import WeightSums, weight_sums


@dataclass(frozen=True)
class ProbeUnit:
    """All-pairs values of one micro-batch of T valid tokens, for the M checkpoints.

    kl: (T, M, M) float64, nats. activation, attention: cosine moments. entropy: (M,) float64, summed over tokens.
    loss: (M,) float64, summed over the tokens that have a next token in the probe; num_losses of them.
    """

    kl: Tensor
    activation: CosineMoments
    attention: CosineMoments
    entropy: Tensor
    loss: Tensor
    num_losses: int


class SignalWorker:
    """Computes units for a fixed list of checkpoints; `base` (optional) is only a reference, never a row.

    Plain class: `distributed.signal_actors` makes it an actor. Models are loaded at the first probe unit and kept.
    """

    def __init__(
        self, checkpoints: Sequence[CheckpointRef], base: CheckpointRef | None, num_threads: int | None = None
    ):
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._checkpoints = tuple(checkpoints)
        self._base = base
        self._models: list[Any] | None = None
        self._readers: list[TensorReader] | None = None

    def run_unit(self, kind: str, payload: Any) -> ProbeUnit | WeightSums:
        """`("probe", TokenBatch)` or `("weight", tensor name)`."""
        return self.probe_unit(payload) if kind == "probe" else self.weight_unit(payload)

    def probe_unit(self, batch: TokenBatch) -> ProbeUnit:
        """Run all checkpoints over one micro-batch and reduce to all-pairs values."""
        if self._models is None:
            refs = (*self._checkpoints, *((self._base,) if self._base else ()))
            self._models = [load_model(ref) for ref in refs]
        outputs = [probe_outputs(model, batch) for model in self._models]
        shown = outputs[: len(self._checkpoints)]
        for ref, output in zip(self._checkpoints, shown, strict=True):
            if not bool(torch.isfinite(output.log_probs).all()):
                raise CheckpointError(f"checkpoint {ref.id!r}: its logits on the probes are not finite")
        log_probs = torch.stack([output.log_probs for output in shown])  # (M, T, V)
        reference = outputs[-1].log_probs if self._base else log_probs.mean(0)
        has_past = shown[0].has_past
        activation = pairwise_cosine(torch.stack([output.hidden for output in shown]))  # (L + 1, T, M, M)
        rows = torch.stack([output.attention[:, :, has_past] for output in shown])
        attention = pairwise_cosine(rows).flatten(1, 2)  # (L, H * T', M, M)
        labelled = shown[0].next_token >= 0
        targets = shown[0].next_token[labelled]
        loss = -log_probs[:, labelled].gather(-1, targets.expand(len(shown), -1)[..., None]).double().sum((1, 2))
        return ProbeUnit(
            kl=pairwise_kl(log_probs, reference),
            activation=CosineMoments.of(list(activation)),
            attention=CosineMoments.of(list(attention)),
            entropy=entropy(log_probs).sum(1),
            loss=loss,
            num_losses=int(labelled.sum()),
        )

    def weight_unit(self, name: str) -> WeightSums:
        """Read one tensor of every checkpoint and of the base, return the sums over its coordinates.

        Raises:
            CheckpointError: a checkpoint's tensor holds NaN or infinity.
        """
        if self._readers is None:
            self._readers = [TensorReader(ref) for ref in (*self._checkpoints, *((self._base,) if self._base else ()))]
        tensors = [reader.read(name) for reader in self._readers]
        for ref, tensor in zip((*self._checkpoints, self._base), tensors, strict=False):
            if ref is not None and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"checkpoint {ref.id!r}: tensor {name} holds NaN or infinity")
        base = tensors.pop() if self._base else None
        return weight_sums(tensors, base)
