"""From a catalogue and probes to the table of pair signals: which units are missing, run, keep, join.

The unit of work is fixed (one micro-batch of one checkpoint; the blocks of a tensor), results are joined in the units'
order, and every checkpoint's signature is written as soon as it is complete. So the table has the same bits for any
number of workers and after any interruption, and a checkpoint that cannot be used costs the others nothing.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import torch

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import digest_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.probes import ProbeSet, TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.signals.bounds import stages_for
from simmerge_ray.signals.features import feature_columns
from simmerge_ray.signals.pairs import output_matrices
from simmerge_ray.signals.pipeline import StageOutputs, join_stages
from simmerge_ray.signals.queue import Executor, Unit, WorkQueue, checked_results, group_tensors
from simmerge_ray.signals.samples import float_tensors_of, sampled_weight_sums, trim_thresholds
from simmerge_ray.signals.signature import (
    NUM_GREEDY_TOKENS,
    SignatureSpec,
    SignatureStore,
    TaskOutputs,
    TensorSample,
    outputs_key,
    weights_key,
)
from simmerge_ray.signals.stages import LayerRange
from simmerge_ray.signals.table import PairSignals, SignalTable
from simmerge_ray.signals.tokens import (
    Place,
    ProbeTokens,
    continuation_key,
    continued_batches,
    greedy_places,
    probe_tokens,
    tokenize_probes,
)
from simmerge_ray.signals.weights import BLOCK_ELEMENTS, WeightSums, weight_matrices
from simmerge_ray.signals.worker import SignalWorker, as_arrays

WEIGHT_MODES = ("exact", "sampled")


def compute_signals(
    catalogue: Catalogue,
    probe_sets: Mapping[str, ProbeSet],
    spec: SignatureSpec | None = None,
    weights: str = "exact",
    store: SignatureStore | None = None,
    executor: Executor | None = None,
    block: int = BLOCK_ELEMENTS,
    memory_per_worker: float | None = None,
) -> SignalTable:
    """Signals of all ordered pairs of a catalogue on every probe set.

    Args:
        weights: `exact` reads the weights of all checkpoints once more; `sampled` takes the signatures' sample, so that
            a new checkpoint in the catalogue costs only its own signature. No table mixes the two.
        store: where signatures lie and are put; None forgets them.
        executor: where units run; None runs them here, one after the other. The result has the same bits either way.
        memory_per_worker: GB for weights and activations; a checkpoint that needs more is run in stages of layers, to
            the same bits.

    Raises:
        CheckpointError: checkpoints that cannot be used, each named; the signatures of the others are in the store.
        ProbeError: a probe that cannot be used.
        ConfigError: fewer than two checkpoints, no probes, an unknown mode, too little memory for a worker.
    """
    if len(catalogue.checkpoints) < 2:
        raise ConfigError(f"signals need at least two checkpoints, the catalogue has {len(catalogue.checkpoints)}")
    if not probe_sets:
        raise ConfigError("signals need at least one probe set")
    if weights not in WEIGHT_MODES:
        raise ConfigError(f"weights must be one of {', '.join(WEIGHT_MODES)}, got {weights!r}")
    spec, digests = spec or SignatureSpec(), catalogue.digests()
    with_base = catalogue.base is not None
    with tempfile.TemporaryDirectory(prefix="simmerge-signatures-") as scratch:
        store = store or SignatureStore(scratch)
        stages = {ref.id: stages_for(ref, spec, memory_per_worker) for ref in catalogue.all_refs}
        signatures = Signatures(catalogue, digests, spec, store, executor or local_executor(catalogue), stages)
        tokens = signatures.tokens(tokenize_probes(catalogue, probe_sets, spec))
        signatures.complete(tokens)
        sums = signatures.weight_sums(weights, block)
        provenance = {
            "checkpoints": digests,
            "base": catalogue.base.id if catalogue.base else None,
            "own_task": dict(catalogue.own_task),
            "probes": {task: probes.digest for task, probes in sorted(probe_sets.items())},
            "tokens": {task: one.digest for task, one in sorted(tokens.items())},
            "spec": vars(spec),
            "weights": weights,
        }
        matrices = weight_matrices(sums, with_base)
        rows: dict[tuple[str, str, str], PairSignals] = {}
        for task in sorted(tokens):
            outputs = [signatures.outputs(ref.id, tokens[task]) for ref in catalogue.all_refs]
            rows |= pair_rows(catalogue, task, matrices | output_matrices(outputs, with_base))
        return SignalTable(feature_columns(with_base), rows, provenance)


class Signatures:
    """The signatures of a catalogue: what is there, what is missing, and running the missing units."""

    def __init__(
        self,
        catalogue: Catalogue,
        digests: Mapping[str, str],
        spec: SignatureSpec,
        store: SignatureStore,
        run: Executor,
        stages: Mapping[str, Sequence[LayerRange] | None] | None = None,
    ) -> None:
        self._catalogue, self._digests, self._spec, self._store, self._run = catalogue, digests, spec, store, run
        self._stages = stages or {}
        self._base_digest = digests[catalogue.base.id] if catalogue.base else None

    def tokens(self, batches: Mapping[str, Sequence[TokenBatch]]) -> dict[str, ProbeTokens]:
        """The tokens of every task, with the base's greedy continuation where there is a base."""
        spec, base = self._spec, self._catalogue.base
        places: dict[str, list[Place]] = {task: [] for task in sorted(batches)}
        written = {task: torch.zeros((0, NUM_GREEDY_TOKENS), dtype=torch.int64) for task in places}
        if base is not None:
            assert self._base_digest is not None
            continued = {}
            for task in places:
                places[task] = greedy_places(task, batches[task], spec.num_positions, NUM_GREEDY_TOKENS)
                continued[task] = continued_batches(batches[task], places[task], spec.batch_size)
            flat = [batch for task in places for batch in continued[task]]
            keys = [continuation_key(self._base_digest, batch, NUM_GREEDY_TOKENS) for batch in flat]
            missing = [number for number, key in enumerate(keys) if not self._store.has("continuation", key)]
            stages = self._stages.get(base.id)
            queue = WorkQueue(
                Unit("continuation", base.id, (flat[number], NUM_GREEDY_TOKENS, stages)) for number in missing
            )
            for index, result in checked_results(self._run, queue):
                about = {"base": self._base_digest}
                self._store.write("continuation", keys[missing[index]], {"tokens": result.numpy()}, about)
            found = iter([torch.from_numpy(self._store.read("continuation", key)["tokens"]) for key in keys])
            written = {task: torch.cat([next(found) for _ in continued[task]]) for task in places}
        return {
            task: probe_tokens(
                task, batches[task], places[task], written[task], spec.num_positions, spec.num_attention_positions
            )
            for task in places
        }

    def complete(self, tokens: Mapping[str, ProbeTokens]) -> None:
        """Compute and keep the signatures that are missing.

        Raises:
            CheckpointError: with every checkpoint that cannot be used; the others' signatures are kept.
        """
        queue = WorkQueue()
        owners: dict[int, tuple[_Job, int]] = {}

        def add(job: _Job, number: int, unit: Unit) -> None:
            owners[queue.add(unit)] = (job, number)

        for ref in self._catalogue.all_refs:
            for task in sorted(tokens):
                if not self._store.has("outputs", self._outputs_key(ref.id, tokens[task])):
                    job = _Job(ref.id, task, len(tokens[task].batches))
                    stages = self._stages.get(ref.id)
                    for number, batch in enumerate(tokens[task].batches):
                        first = ("stage", (stages[0], batch, None)) if stages else ("outputs", (batch,))
                        add(job, number, Unit(first[0], ref.id, first[1]))
            if not self._store.has("weights", self._weights_key(ref.id)):
                groups = tensor_groups(ref)
                job = _Job(ref.id, None, len(groups))
                for number, names in enumerate(groups):
                    add(job, number, Unit("sample", ref.id, (names, self._spec.num_coordinates)))
        for index, result in checked_results(self._run, queue):
            job, number = owners.pop(index)
            unit = queue.units[index]
            if unit.kind == "stage":
                stages = self._stages[job.checkpoint]
                assert stages is not None
                queue.forget(index)
                parts = job.parts.setdefault(number, [])
                parts.append(result)
                if len(parts) < len(stages):
                    following = (stages[len(parts)], unit.payload[1], result.states)
                    parts[-1] = replace(result, states=None)
                    add(job, number, Unit("stage", job.checkpoint, following))
                    continue
                result = as_arrays(join_stages(job.parts.pop(number)))
            job.results[number] = result
            if len(job.results) == job.count:
                self._keep(job, [job.results[part] for part in range(job.count)], tokens)
                job.results.clear()

    def _keep(self, job: _Job, results: list[Any], tokens: Mapping[str, ProbeTokens]) -> None:
        about = {"checkpoint": job.checkpoint, "digest": self._digests[job.checkpoint], "spec": vars(self._spec)}
        if job.task is None:
            samples = {name: sample for part in results for name, sample in part.items()}
            self._store.write_parts("weights", self._weights_key(job.checkpoint), samples, about)
        else:
            one = tokens[job.task]
            key = self._outputs_key(job.checkpoint, one)
            self._store.write("outputs", key, vars(join_outputs(results, one)), about | {"task": job.task})

    def outputs(self, checkpoint_id: str, tokens: ProbeTokens) -> TaskOutputs:
        """Outputs of one checkpoint, from the store."""
        return self._store.read_outputs(self._outputs_key(checkpoint_id, tokens))

    def weights(self, checkpoint_id: str) -> dict[str, TensorSample]:
        """The weight sample of one checkpoint, from the store."""
        return self._store.read_weights(self._weights_key(checkpoint_id))

    def weight_sums(self, mode: str, block: int) -> dict[str, WeightSums]:
        """Sums of every tensor over all checkpoints, the base first among them where there is one."""
        refs, base = self._catalogue.all_refs, self._catalogue.base
        samples = [self.weights(ref.id) for ref in refs]
        if mode == "sampled":
            return sampled_weight_sums(samples, samples[0] if base else None)
        key = digest_json(["sums", 1, [self._digests[ref.id] for ref in refs], self._base_digest, block])
        if not self._store.has("sums", key):
            units = [
                Unit("sums", None, ({name: trim_thresholds([one[name] for one in samples]) for name in names}, block))
                for names in tensor_groups(refs[0])
            ]
            sums = {name: one for _, part in checked_results(self._run, WorkQueue(units)) for name, one in part.items()}
            self._store.write_parts("sums", key, sums, {"checkpoints": [ref.id for ref in refs]})
        return {name: WeightSums(**fields) for name, fields in self._store.read_parts("sums", key).items()}

    def _outputs_key(self, checkpoint_id: str, tokens: ProbeTokens) -> str:
        return outputs_key(self._digests[checkpoint_id], tokens.digest)

    def _weights_key(self, checkpoint_id: str) -> str:
        return weights_key(self._digests[checkpoint_id], self._base_digest, self._spec)


class _Job:
    """The parts that make one file of the store: outputs on a task, or (no task) the weight sample."""

    def __init__(self, checkpoint: str, task: str | None, count: int) -> None:
        self.checkpoint, self.task, self.count = checkpoint, task, count
        self.results: dict[int, Any] = {}
        self.parts: dict[int, list[StageOutputs]] = {}  # by micro-batch, the stages that have run


def tensor_groups(ref: CheckpointRef) -> list[tuple[str, ...]]:
    """Names of the float tensors in order, cut into groups of about 2^25 elements."""
    specs = read_headers(ref)
    return group_tensors({name: math.prod(specs[name].shape) for name in float_tensors_of(specs)})


def join_outputs(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], tokens: ProbeTokens) -> TaskOutputs:
    """The micro-batches of one task, in order."""
    width = tokens.max_tokens
    logits, hidden, attention = zip(*parts, strict=True)
    padded = [np.pad(part, ((0, 0), (0, 0), (0, 0), (0, width - part.shape[3]))) for part in attention]
    with_attention = torch.cat([batch.with_attention for batch in tokens.batches])
    greedy, next_token, probe = (
        torch.cat([getattr(batch, name) for batch in tokens.batches]) for name in ("greedy", "next_token", "probe")
    )
    return TaskOutputs(
        logits=np.concatenate(logits),
        hidden=np.concatenate(hidden, axis=1),
        attention=np.concatenate(padded, axis=2),
        greedy=greedy.numpy(),
        next_token=next_token.numpy(),
        probe=probe.numpy(),
        attention_probe=probe[with_attention].numpy(),
    )


def local_executor(catalogue: Catalogue) -> Executor:
    """Runs units in this process."""
    worker = SignalWorker(catalogue.all_refs, catalogue.base)

    def run(queue: WorkQueue) -> Iterator[tuple[int, Any]]:
        while taken := queue.take():
            yield taken[0], worker.run_unit(taken[1])

    return run


def pair_rows(
    catalogue: Catalogue, task: str, matrices: Mapping[str, np.ndarray]
) -> dict[tuple[str, str, str], PairSignals]:
    """Rows of all ordered pairs, the base among the checkpoints, from the (M, M) matrices of one task."""
    columns = feature_columns(catalogue.base is not None)
    ids = [ref.id for ref in catalogue.all_refs]
    base = catalogue.base.id if catalogue.base else None
    rows = {}
    for (i, left), (j, right) in permutations(enumerate(ids), 2):
        kept = columns if base not in (left, right) else feature_columns(True, base_pair=True)
        features = {column: matrix_entry(matrices, column, i, j) for column in kept}
        rows[left, right, task] = PairSignals(left, right, task, features)
    return rows


def matrix_entry(matrices: Mapping[str, np.ndarray], column: str, i: int, j: int) -> float:
    """The value of a feature column for the ordered pair (i, j)."""
    if column in matrices:
        value = float(matrices[column][i, j])
    elif "_rl_" in column:
        value = float(matrices[column.replace("_rl_", "_lr_")][j, i])
    else:  # single-checkpoint values are kept once, in row i
        name, side = column.rsplit("_", 1)
        value = float(matrices[name][i if side == "left" else j, 0])
    assert math.isfinite(value), (column, i, j, value)
    return value
