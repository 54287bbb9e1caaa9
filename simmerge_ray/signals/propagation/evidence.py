"""What propagators work from, and reading it for a catalogue whose signatures are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import ProbeSet
from simmerge_ray.signals.compute import Signatures, local_executor
from simmerge_ray.signals.propagation.halfway import halfway_outputs
from simmerge_ray.signals.queue import Executor, WorkQueue
from simmerge_ray.signals.signature import (
    SignatureSpec,
    SignatureStore,
    TaskOutputs,
    Weights,
    outputs_key,
    weights_key,
)
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.signals.tokens import ProbeTokens, tokenize_probes
from simmerge_ray.signals.weights import BLOCK_ELEMENTS, WeightSums

_KEPT_OUTPUTS, _KEPT_WEIGHTS = 32, 128  # checkpoints' outputs on a task, and samples of weights, in memory


@dataclass(frozen=True)
class Evidence:
    """The pair table and the signatures it was made from.

    tokens: of every task. outputs: of a checkpoint on a task. weights: the samples, by id. sums: by tensor over all
    coordinates of [base, checkpoints...], where the table's weights are exact. digests: of the checkpoints. halfway:
    outputs half of the way from the base, None without one.
    """

    table: SignalTable
    catalogue: Catalogue
    tokens: Mapping[str, ProbeTokens]
    outputs: Callable[[str, str], TaskOutputs]
    weights: Mapping[str, Weights]
    sums: Mapping[str, WeightSums] | None
    digests: Mapping[str, str]
    halfway: Callable[[str, str], TaskOutputs] | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the base, if any, then of the checkpoints, in the order of `sums`."""
        return tuple(ref.id for ref in self.catalogue.all_refs)


def stored_evidence(table: SignalTable, catalogue: Catalogue, store: SignatureStore) -> Evidence:
    """Evidence from what `simmerge signals` has stored, for `virtual`: nothing is run and no weights are read.

    The probes are not needed: the table knows the digests of their tokens.

    Raises:
        ConfigError: a signature is not in the store, or the catalogue is not the table's.
    """
    known: Mapping[str, str] = table.provenance["checkpoints"]
    spec, tokens = SignatureSpec(**table.provenance["spec"]), table.provenance["tokens"]
    if differing := sorted(set(known) ^ {ref.id for ref in catalogue.all_refs}):
        raise ConfigError(
            f"the signal table and the catalogue have different checkpoints, e.g. {differing[0]!r}; "
            "run `simmerge signals` on this catalogue"
        )
    # In the table's order, which the sums have, whatever the catalogue's is now.
    ordered = replace(catalogue, checkpoints=tuple(catalogue.ref(i) for i in known if i != table.provenance["base"]))

    def missing(queue: WorkQueue) -> Iterator[tuple[int, Any]]:
        raise ConfigError(
            f"{store.uri} lacks signatures of this table; `simmerge signals` with the same --signatures makes them"
        )

    signatures = Signatures(ordered, known, spec, store, missing)
    for ref in ordered.all_refs:
        keys = [("outputs", outputs_key(known[ref.id], digest)) for digest in tokens.values()]
        base_digest = known[ordered.base.id] if ordered.base else None
        for kind, key in (*keys, ("weights", weights_key(known[ref.id], base_digest, spec))):
            if not store.has(kind, key):
                missing(WorkQueue())

    return _evidence(table, ordered, signatures, store, known, {}, tokens)


def read_evidence(
    table: SignalTable,
    catalogue: Catalogue,
    probe_sets: Mapping[str, ProbeSet],
    store: SignatureStore,
    executor: Executor | None = None,
) -> Evidence:
    """Evidence from a store of signatures; what is missing there is computed by `executor` (None: here), and kept.

    Raises:
        CheckpointError, ProbeError: see `compute_signals`.
    """
    spec = SignatureSpec(**table.provenance["spec"])
    digests = catalogue.digests()
    signatures = Signatures(catalogue, digests, spec, store, executor or local_executor(catalogue))
    tokens = signatures.tokens(tokenize_probes(catalogue, probe_sets, spec))
    signatures.complete(tokens)
    token_digests = {task: one.digest for task, one in tokens.items()}
    evidence = _evidence(table, catalogue, signatures, store, digests, tokens, token_digests)
    return replace(evidence, halfway=halfway_outputs(catalogue, digests, tokens, store) if catalogue.base else None)


class _StoredWeights(Mapping[str, Weights]):
    """The samples of checkpoints by id, read when they are asked for."""

    def __init__(self, signatures: Signatures, ids: Sequence[str]) -> None:
        self._ids, self._read = tuple(ids), lru_cache(_KEPT_WEIGHTS)(signatures.weights)

    def __getitem__(self, name: str) -> Weights:
        if name not in self._ids:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def _evidence(
    table: SignalTable,
    catalogue: Catalogue,
    signatures: Signatures,
    store: SignatureStore,
    digests: Mapping[str, str],
    tokens: Mapping[str, ProbeTokens],
    token_digests: Mapping[str, str],
) -> Evidence:
    def outputs(checkpoint: str, task: str) -> TaskOutputs:
        return store.read_outputs(outputs_key(digests[checkpoint], token_digests[task]))

    return Evidence(
        table,
        catalogue,
        tokens,
        lru_cache(_KEPT_OUTPUTS)(outputs),
        _StoredWeights(signatures, [ref.id for ref in catalogue.all_refs]),
        signatures.weight_sums("exact", BLOCK_ELEMENTS) if table.provenance["weights"] == "exact" else None,
        digests,
    )
