"""From a catalogue and probes to the table of pair signals: which units are missing, run, keep, join.

The unit of work is fixed (one micro-batch of one checkpoint; the blocks of a tensor), results are joined in the units'
order, and every checkpoint's signature is written as soon as it is complete. So the table has the same bits for any
number of workers and after any interruption, and a checkpoint that cannot be used costs the others nothing.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import Place as StoragePlace
from simmerge_ray.base.storage import digest_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.probes import ProbeSet, TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.signals.bounds import first_points, signature_bytes, stages_for
from simmerge_ray.signals.features import feature_columns
from simmerge_ray.signals.new_pairs import new_block
from simmerge_ray.signals.pair_blocks import MemoryBlock, PairColumns, block_pairs
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
from simmerge_ray.signals.table import SignalTable, read_signal_table
from simmerge_ray.signals.table_files import append_block, read_table_files
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
# Of a part of a table: rows for each task; and bytes of the new signatures, which become two or three times as much.
_PART_ROWS, _NEW_BYTES = 1 << 14, 100_000_000


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
    with tempfile.TemporaryDirectory(prefix="simmerge-signatures-") as scratch:
        where = store or SignatureStore(scratch)
        run = _complete(catalogue, probe_sets, spec or SignatureSpec(), weights, where, executor, memory_per_worker)
        return run.whole(catalogue, block)


def signals_into(
    out: StoragePlace,
    catalogue: Catalogue,
    probe_sets: Mapping[str, ProbeSet],
    spec: SignatureSpec,
    weights: str,
    store: SignatureStore,
    executor: Executor | None = None,
    memory_per_worker: float | None = None,
) -> SignalTable:
    """`compute_signals` into the table at `out`. With a base and sampled weights, what the table there has is kept
    where it was made from the same, and checkpoints that it lacks are appended; else it is replaced.

    A table of many is made so from its beginning, part by part: memory is bounded, and a run that was interrupted goes
    on after the last part. Errors as there.
    """
    run = _complete(catalogue, probe_sets, spec, weights, store, executor, memory_per_worker)
    if catalogue.base is None or weights != "sampled":
        table = run.whole(catalogue)
        table.write(out)
        return table
    known = run.known_points(out)
    size = signature_bytes(catalogue.base, spec, len(probe_sets))
    if not known:
        some = replace(catalogue, checkpoints=catalogue.checkpoints[: first_points(size) - 1])
        table = run.whole(some)
        table.write(out)
        known = table.by_columns.points
        if some.checkpoints == catalogue.checkpoints:
            return table
    order = [*known, *(name for name in catalogue.ids if name not in set(known))]
    start = len(known)
    while start < len(order):
        stop = min(len(order), start + max(1, min(_PART_ROWS // (2 * start), _NEW_BYTES // size)))
        run.append(out, order, start, stop)
        start = stop
    return read_signal_table(out)


def _complete(
    catalogue: Catalogue,
    probe_sets: Mapping[str, ProbeSet],
    spec: SignatureSpec,
    weights: str,
    store: SignatureStore,
    executor: Executor | None,
    memory_per_worker: float | None,
) -> _Run:
    """All signatures computed and kept."""
    if len(catalogue.checkpoints) < 2:
        raise ConfigError(f"signals need at least two checkpoints, the catalogue has {len(catalogue.checkpoints)}")
    if not probe_sets:
        raise ConfigError("signals need at least one probe set")
    if weights not in WEIGHT_MODES:
        raise ConfigError(f"weights must be one of {', '.join(WEIGHT_MODES)}, got {weights!r}")
    digests, run = catalogue.digests(), executor or local_executor(catalogue)
    stages = {ref.id: stages_for(ref, spec, memory_per_worker) for ref in catalogue.all_refs}
    signatures = Signatures(catalogue, digests, spec, store, run, stages)
    tokens = signatures.tokens(tokenize_probes(catalogue, probe_sets, spec))
    signatures.complete(tokens)
    provenance = {
        "checkpoints": digests,
        "base": catalogue.base.id if catalogue.base else None,
        "own_task": dict(catalogue.own_task),
        "probes": {task: probes.digest for task, probes in sorted(probe_sets.items())},
        "tokens": {task: one.digest for task, one in sorted(tokens.items())},
        "spec": vars(spec),
        "weights": weights,
    }
    return _Run(signatures, tokens, provenance)


@dataclass(frozen=True)
class _Run:
    """Complete signatures, the tokens of every task, and the provenance of a table of all checkpoints."""

    signatures: Signatures
    tokens: Mapping[str, ProbeTokens]
    provenance: Mapping[str, Any]

    def whole(self, catalogue: Catalogue, block: int = BLOCK_ELEMENTS) -> SignalTable:
        """The table of a catalogue, or of a part of it, at once."""
        with_base, points = catalogue.base is not None, [ref.id for ref in catalogue.all_refs]
        matrices = weight_matrices(
            self.signatures.weight_sums(self.provenance["weights"], block, catalogue.all_refs), with_base
        )
        by_task = {}
        for task, tokens in sorted(self.tokens.items()):
            outputs = [self.signatures.outputs(name, tokens) for name in points]
            by_task[task] = matrices | output_matrices(outputs, with_base)
        columns = feature_columns(with_base)
        rows = PairColumns(points, sorted(self.tokens), columns, [whole_block(columns, with_base, by_task)])
        return SignalTable(columns, rows, {**self.provenance, **self._of(points)})

    def append(self, out: StoragePlace, order: Sequence[str], start: int, stop: int) -> None:
        """The pairs of the points [start, stop) of `order` with each other and with those before."""
        weights = lru_cache(1)(lambda place: self.signatures.weights(order[place]))
        block = new_block(
            start,
            stop,
            sorted(self.tokens),
            weights,
            lambda place, task: self.signatures.outputs(order[place], self.tokens[task]),
        )
        append_block(out, order, block, self._of(order[start:stop]))

    def _of(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What the provenance says of single checkpoints."""
        own = self.provenance["own_task"]
        return {
            "checkpoints": {name: self.provenance["checkpoints"][name] for name in names},
            "own_task": {name: own[name] for name in names if name in own},
        }

    def known_points(self, out: StoragePlace) -> tuple[str, ...]:
        """Of the table at `out`, where all of it was made from what the present run has; else none."""
        try:
            columns, rows, found = read_table_files(out)
        except ConfigError:
            return ()
        named = ("base", "probes", "tokens", "spec", "weights")
        points, catalogue = rows.points, self.provenance["checkpoints"]
        same = (
            columns == feature_columns(True)
            and all(found.get(name) == self.provenance[name] for name in named)
            and points[:1] == (found["base"],)
            and set(points) <= set(catalogue)
            and {name: found[name] for name in ("checkpoints", "own_task")} == self._of(points)
        )
        return points if same else ()


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

    def weight_sums(self, mode: str, block: int, refs: Sequence[CheckpointRef] | None = None) -> dict[str, WeightSums]:
        """Sums of every tensor over all checkpoints, or some, the base first among them where there is one."""
        refs, base = refs or self._catalogue.all_refs, self._catalogue.base
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


def column_matrix(matrices: Mapping[str, np.ndarray], column: str) -> np.ndarray:
    """(M, M) values of a feature column for all ordered pairs (i, j), from the matrices of one task."""
    if column in matrices:
        return matrices[column]
    if "_rl_" in column:
        return matrices[column.replace("_rl_", "_lr_")].T
    name, side = column.rsplit("_", 1)  # single-checkpoint values are kept once, in row i
    return matrices[name] if side == "left" else matrices[name].T


def matrix_entry(matrices: Mapping[str, np.ndarray], column: str, i: int, j: int) -> float:
    """The value of a feature column for the ordered pair (i, j)."""
    value = float(column_matrix(matrices, column)[i, j])
    assert math.isfinite(value), (column, i, j, value)
    return value


def whole_block(
    columns: Sequence[str], with_base: bool, by_task: Mapping[str, Mapping[str, np.ndarray]]
) -> MemoryBlock:
    """All pairs of some points from their (M, M) matrices; the base is the first point, and has no task vector."""
    lacking = set(columns) - set(feature_columns(with_base, base_pair=with_base))
    size = len(next(iter(next(iter(by_task.values())).values())))
    left, right = block_pairs(0, size)
    values = {}
    for task, matrices in by_task.items():
        values[task] = np.empty((len(columns), len(left)))
        for row, column in enumerate(columns):
            values[task][row] = column_matrix(matrices, column)[left, right]
            if column in lacking:
                values[task][row, (left == 0) | (right == 0)] = np.nan
    return MemoryBlock(0, size, tuple(columns), values)
