"""The signals of a catalogue: digests, the base's continuations, signatures, exact sums, pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.capacity.placement import how_many_fit, signal_worker_needs
from simmerge_ray.capacity.simulation.costs import UnitCosts
from simmerge_ray.capacity.simulation.workers import Node, Phase, Worker, drain, make_workers
from simmerge_ray.capacity.simulation.workload import Workload
from simmerge_ray.capacity.size import ModelSize
from simmerge_ray.search.estimate import PROCESS_BYTES
from simmerge_ray.signals.bounds import driver_bytes
from simmerge_ray.signals.queue import Unit, WorkQueue, group_tensors
from simmerge_ray.signals.signature import GREEDY_SHARE, NUM_GREEDY_TOKENS, SignatureSpec, outputs_bytes, weights_bytes
from simmerge_ray.signals.stages import LayerRange, cut_stages


@dataclass(frozen=True)
class Placed:
    """How signal workers lie on nodes: stages of a checkpoint, bytes of a worker (libraries included), workers."""

    stages: tuple[LayerRange, ...]
    worker_bytes: float
    per_node: int


def place_workers(model: ModelSize, resources: Mapping[str, float]) -> Placed:
    """As many workers on a node as it has cores, each with as few stages of layers as then fit; fewer workers where not
    even one layer would. Raises ConfigError: the node does not hold a worker with one layer."""
    cores, memory = int(resources["CPU"]), resources["memory"]
    libraries = PROCESS_BYTES["transformers"]
    why: ConfigError | None = None
    for count in range(cores, 0, -1):
        held = int(memory / count - libraries)
        try:
            stages = cut_stages(model.elements, model.layers, held, model.working_bytes)
        except ConfigError as error:
            why = error
            continue
        largest = max(4 * model.elements(stage) for stage in stages) + model.working_bytes + libraries
        return Placed(tuple(stages), largest, how_many_fit(signal_worker_needs(largest, 0.0), resources))
    raise ConfigError(f"no node of {memory / 1e9:.0f} GB holds a signal worker: {why}")


@dataclass(frozen=True)
class SignalRun:
    """The parts in order. signature_bytes: of one checkpoint on all tasks. driver_bytes: what the driver holds."""

    phases: tuple[Phase, ...]
    driver_bytes: float
    signature_bytes: float


class SignalSimulation:
    """The units of `signals.compute` on workers. cores: of a node.

    names: of the checkpoints, the base first. groups: names of tensors that are sampled together.
    """

    def __init__(self, workload: Workload, placed: Placed, nodes: Sequence[Node], cores: int, costs: UnitCosts) -> None:
        self._workload, self._model, self._placed, self._costs = workload, workload.model, placed, costs
        self.names = ["base", *(f"m{number}" for number in range(workload.num_models))]
        self._spec = SignatureSpec()
        self._batches = math.ceil(workload.probes / self._spec.batch_size)
        self._nodes, self._cores = nodes, cores
        self.workers = make_workers(placed.per_node * len(nodes), nodes)
        self.groups = group_tensors(self._model.tensors)
        self._shares = self._group_shares()

    def run(self) -> SignalRun:
        """All parts, one after the other: each needs the one before."""
        phases: list[Phase] = []
        start = 0.0
        parts = {"digests": self.digests, "continuations": self._continuations}
        for name, part in (parts | {"signatures": self._signatures, "sums": self._sums}).items():
            before = sum(node.network_bytes for node in self._nodes)
            workers, units, end = part(start)
            network = sum(node.network_bytes for node in self._nodes) - before
            if name == "signatures":
                network += self._boundary_bytes()
            phases.append(Phase.of(name, "signals", workers, units, end - start, network))
            start = end
        width = self._spec.max_tokens + NUM_GREEDY_TOKENS
        one_task = outputs_bytes(self._spec, self._model.config, width)
        sample = weights_bytes(self._spec, list(self._model.tensors.values()))
        count, tasks = len(self.names), self._workload.tasks
        signature = tasks * one_task + sample
        pairs = count * (count - 1) // 2 * tasks
        seconds = pairs * one_task / 4 * self._costs.of("pair_s_per_value")
        comparing = {"comparing signatures": seconds}
        phases.append(Phase("pairs", "driver", 1, pairs, seconds, count * signature, comparing))
        return SignalRun(tuple(phases), driver_bytes(count, one_task + sample), signature)

    def _boundary_bytes(self) -> float:
        """Hidden states that go from stage to stage through the driver."""
        width = self._spec.max_tokens + NUM_GREEDY_TOKENS
        states = 4 * self._spec.batch_size * width * self._model.hidden_size * (len(self._placed.stages) - 1)
        return 2 * states * len(self.names) * self._workload.tasks * self._batches

    def _forward(self, elements: float, tokens: float) -> float:
        return 2 * elements * tokens * self._costs.of("sampled_share") / self._costs.of("core_flops")

    def load(self, worker: Worker, name: str, stage: LayerRange, at: float, sharers: int | None = None) -> float:
        """Read and convert the weights of a stage, unless the worker holds them. sharers: of the node's link, where the
        read is one of many in a unit."""
        if worker.held == (name, stage):
            return 0.0
        worker.held = (name, stage)
        size, share = self._model.num_bytes, self._model.elements(stage) / self._model.parameters
        first = stage.first / self._model.layers
        last = min(1.0, first + share)
        if sharers is None:
            link, disk = worker.node.read(name, size, at, first, last)
        else:
            link, disk = worker.node.read_alone(name, size, first, last, sharers), 0.0
        # The measured rate of building includes reading from a disk, unless that is slower.
        built = share * size / self._costs.of("build_bytes_per_s")
        return worker.spend(**{"reading from the store": link, "building models": max(built, disk)})

    def digests(self, start: float) -> tuple[Sequence[Worker], int, float]:
        """Before there are actors, so a task on every core."""
        queue = WorkQueue(Unit("digest", name, ()) for name in self.names)
        tasks = make_workers(self._cores * len(self._nodes), self._nodes)

        def work(worker: Worker, unit: Unit, at: float) -> float:
            assert unit.checkpoint is not None
            read = worker.node.read_all([unit.checkpoint], self._model.num_bytes, at)
            return worker.spend(**read, hashing=self._model.num_bytes / self._costs.of("digest_bytes_per_s"))

        return tasks[: len(queue)], len(queue), drain(queue, tasks, work, start=start)

    def _continuations(self, start: float) -> tuple[Sequence[Worker], int, float]:
        rows = min(math.ceil(self._spec.num_positions / GREEDY_SHARE), self._workload.probes, self._spec.batch_size)
        tokens, batches = rows * self._workload.probe_tokens, self._workload.tasks
        queue = WorkQueue(Unit("continuation", "base", (number,)) for number in range(batches))
        sharers = min(math.ceil(batches / len(self._nodes)), self._placed.per_node)

        def work(worker: Worker, unit: Unit, at: float) -> float:
            took = 0.0
            # A model that is whole keeps its keys and values; in stages every token runs all of the text.
            for _ in range(NUM_GREEDY_TOKENS if len(self._placed.stages) > 1 else 1):
                for stage in self._placed.stages:
                    took += self.load(worker, "base", stage, at, sharers)
                    took += worker.spend(arithmetic=self._forward(self._model.elements(stage), tokens))
            return took

        return self.workers, batches, drain(queue, self.workers, work, start=start)

    def _signatures(self, start: float) -> tuple[Sequence[Worker], int, float]:
        stages, queue = self._placed.stages, WorkQueue()
        tokens = self._workload.probes * self._workload.probe_tokens / self._batches
        for name in self.names:
            for _ in range(self._workload.tasks * self._batches):
                queue.add(Unit("stage", name, (stages[0],)))
            for group in range(len(self.groups)):
                queue.add(Unit("sample", name, (group,)))

        def work(worker: Worker, unit: Unit, at: float) -> float:
            assert unit.checkpoint is not None
            if unit.kind == "sample":
                return self.sample(worker, unit.checkpoint, unit.payload[0], at)
            stage: LayerRange = unit.payload[0]
            took = self.load(worker, unit.checkpoint, stage, at)
            return took + worker.spend(arithmetic=self._forward(self._model.elements(stage), tokens))

        def finished(index: int, unit: Unit) -> None:
            if unit.kind == "stage" and not unit.payload[0].is_last:
                queue.add(Unit("stage", unit.checkpoint, (stages[stages.index(unit.payload[0]) + 1],)))

        end = drain(queue, self.workers, work, finished, start)
        return self.workers, len(queue), end

    def sample(self, worker: Worker, name: str, group: int, at: float) -> float:
        """Seconds of the sample of weights of one group of a checkpoint's tensors."""
        first, last = self._shares[group]
        read = worker.node.read_all(dict.fromkeys((name, "base")), self._model.num_bytes, at, first, last)
        own = (last - first) * self._model.parameters * self._costs.of("sample_ns") * 1e-9
        return worker.spend(**read, **{"sampling weights": own})

    def _sums(self, start: float) -> tuple[Sequence[Worker], int, float]:
        queue = WorkQueue(Unit("sums", None, (group,)) for group in range(len(self.groups)))
        count = len(self.names) - 1  # the figures are of so many and their base
        per_element = count * (self._costs.of("sums_ns") + count * self._costs.of("sums_pair_ns")) * 1e-9

        def work(worker: Worker, unit: Unit, at: float) -> float:
            first, last = self._shares[unit.payload[0]]
            read = worker.node.read_all(self.names, self._model.num_bytes, at, first, last)
            own = (last - first) * self._model.parameters * per_element
            return worker.spend(**read, **{"summing weights": own})

        return self.workers, len(self.groups), drain(queue, self.workers, work, start=start)

    def _group_shares(self) -> list[tuple[float, float]]:
        """Where each group of tensors begins and ends, as shares of a checkpoint."""
        sizes = self._model.tensors
        done = list(accumulate((sum(sizes[name] for name in names) for names in self.groups), initial=0))
        return list(pairwise(elements / done[-1] for elements in done))
