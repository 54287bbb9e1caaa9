"""The signals of a catalogue: digests, the base's continuations, signatures, exact sums, pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.capacity.placement import how_many_fit, signal_worker_needs
from simmerge_ray.capacity.simulation.costs import UnitCosts
from simmerge_ray.capacity.simulation.workers import Node, Worker, drain, total_seconds
from simmerge_ray.capacity.size import ModelSize
from simmerge_ray.search.estimate import PROCESS_BYTES
from simmerge_ray.signals.bounds import driver_bytes
from simmerge_ray.signals.queue import Unit, WorkQueue, group_tensors
from simmerge_ray.signals.signature import (
    GREEDY_SHARE,
    NUM_GREEDY_TOKENS,
    SignatureSpec,
    outputs_bytes,
    weights_bytes,
)
from simmerge_ray.signals.stages import LayerRange, cut_stages


@dataclass(frozen=True)
class Placed:
    """How signal workers lie on nodes: stages of a checkpoint, bytes of a worker (libraries included), workers."""

    stages: tuple[LayerRange, ...]
    worker_bytes: float
    per_node: int


def place_workers(model: ModelSize, resources: Mapping[str, float]) -> Placed:
    """As many workers on a node as it has cores, each with as few stages of layers as then fit; fewer workers where
    not even one layer would.

    Raises:
        ConfigError: the node does not hold a worker with one layer.
    """
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
    """Seconds of each part in order, the workers' seconds by what for, and bytes over the network."""

    seconds: Mapping[str, float]
    causes: Mapping[str, Mapping[str, float]]
    units: Mapping[str, int]
    network_bytes: Mapping[str, float]
    driver_bytes: float
    signature_bytes: float


class SignalSimulation:
    """The units of `signals.compute` on workers.

    Args:
        num_models: beside the base. tasks: probe sets of `probes` texts of `probe_tokens` tokens, padding included.
        cores: of a node.
    """

    def __init__(
        self,
        model: ModelSize,
        num_models: int,
        tasks: int,
        probes: int,
        probe_tokens: float,
        placed: Placed,
        nodes: Sequence[Node],
        cores: int,
        costs: UnitCosts,
    ) -> None:
        self._model, self._tasks, self._placed, self._costs, self._cores = model, tasks, placed, costs, cores
        self._names = ["base", *(f"m{number}" for number in range(num_models))]
        self._spec = SignatureSpec()
        self._batches = math.ceil(probes / self._spec.batch_size)
        self._probes, self._probe_tokens = probes, probe_tokens
        self._batch_tokens = probes * probe_tokens / self._batches
        self._nodes = nodes
        # SPREAD: one node after the other.
        self._workers = [Worker(n, nodes[n % len(nodes)]) for n in range(placed.per_node * len(nodes))]
        self._causes: dict[str, dict[str, float]] = {}
        self._groups = group_tensors(model.tensors)
        self._shares = self._group_shares()

    def run(self) -> SignalRun:
        """All parts, one after the other: each needs the one before."""
        costs, model = self._costs, self._model
        count = len(self._names)
        seconds: dict[str, float] = {}
        units: dict[str, int] = {}
        network: dict[str, float] = {}
        for name, part in (
            ("digests", self._digests),
            ("continuations", self._continuations),
            ("signatures", self._signatures),
            ("sums", self._sums),
        ):
            before = sum(node.network_bytes for node in self._nodes)
            for worker in self._workers:
                worker.seconds = {}
            start = sum(seconds.values())
            units[name], end = part(start)
            seconds[name] = end - start
            network[name] = sum(node.network_bytes for node in self._nodes) - before
            self._causes[name] = total_seconds(self._workers)
        one_task = outputs_bytes(self._spec, model.config, self._spec.max_tokens + NUM_GREEDY_TOKENS)
        sample = weights_bytes(self._spec, list(model.tensors.values()))
        pairs = count * (count - 1) / 2 * self._tasks
        seconds["pairs"] = pairs * one_task / 4 * costs.of("pair_s_per_value")
        self._causes["pairs"] = {"comparing signatures": seconds["pairs"]}
        units["pairs"], network["pairs"] = int(pairs), count * (self._tasks * one_task + sample)
        # Hidden states go from stage to stage through the driver.
        width = self._spec.max_tokens + NUM_GREEDY_TOKENS
        states = 4 * self._spec.batch_size * width * model.hidden_size * (len(self._placed.stages) - 1)
        network["signatures"] += 2 * states * count * self._tasks * self._batches
        signature = self._tasks * one_task + sample
        return SignalRun(seconds, self._causes, units, network, driver_bytes(count, one_task + sample), signature)

    def _forward(self, elements: float, tokens: float) -> float:
        return 2 * elements * tokens * self._costs.of("sampled_share") / self._costs.of("core_flops")

    def _load(self, worker: Worker, name: str, stage: LayerRange, at: float, sharers: int | None = None) -> float:
        """Read and convert the weights of a stage, unless the worker holds them.

        Args:
            sharers: of the node's link, where the read is one of many in a unit.
        """
        if worker.held == (name, stage):
            return 0.0
        worker.held = (name, stage)
        size, share = self._model.num_bytes, self._model.elements(stage) / self._model.parameters
        first = stage.first / self._model.layers
        last = min(1.0, first + share)
        disk = 0.0
        if sharers is None:
            link, disk = worker.node.read(name, size, at, first, last)
        else:
            link = worker.node.read_alone(name, size, first, last, sharers)
        # The measured rate of building includes reading from a disk, unless that is slower.
        built = share * size / self._costs.of("build_bytes_per_s")
        return worker.spend(**{"reading from the store": link, "building models": max(built, disk)})

    def _digests(self, start: float) -> tuple[int, float]:
        """Before there are actors, so a task on every core."""
        queue = WorkQueue(Unit("digest", name, ()) for name in self._names)
        tasks = [Worker(n, self._nodes[n % len(self._nodes)]) for n in range(self._cores * len(self._nodes))]

        def work(worker: Worker, unit: Unit, at: float) -> float:
            assert unit.checkpoint is not None
            link, disk = worker.node.read(unit.checkpoint, self._model.num_bytes, at)
            hashed = self._model.num_bytes / self._costs.of("digest_bytes_per_s")
            return worker.spend(**{"reading from the store": link, "reading from disks": disk, "hashing": hashed})

        end = drain(queue, tasks, work, start=start)
        self._workers[0].seconds = total_seconds(tasks)  # they are counted with the actors
        return len(self._names), end

    def _continuations(self, start: float) -> tuple[int, float]:
        rows = min(math.ceil(self._spec.num_positions / GREEDY_SHARE), self._probes, self._spec.batch_size)
        tokens, batches = rows * self._probe_tokens, self._tasks
        queue = WorkQueue(Unit("continuation", "base", (number,)) for number in range(batches))
        sharers = min(math.ceil(batches / len(self._nodes)), self._placed.per_node)

        def work(worker: Worker, unit: Unit, at: float) -> float:
            took = 0.0
            # A model that is whole keeps its keys and values; in stages every token runs all of the text.
            for _ in range(NUM_GREEDY_TOKENS if len(self._placed.stages) > 1 else 1):
                for stage in self._placed.stages:
                    took += self._load(worker, "base", stage, at, sharers)
                    took += worker.spend(arithmetic=self._forward(self._model.elements(stage), tokens))
            return took

        return batches, drain(queue, self._workers, work, start=start)

    def _signatures(self, start: float) -> tuple[int, float]:
        stages, queue = self._placed.stages, WorkQueue()
        for name in self._names:
            for _ in range(self._tasks * self._batches):
                queue.add(Unit("stage", name, (stages[0],)))
            for group in range(len(self._groups)):
                queue.add(Unit("sample", name, (group,)))

        def work(worker: Worker, unit: Unit, at: float) -> float:
            assert unit.checkpoint is not None
            if unit.kind == "sample":
                return self._sample(worker, unit.checkpoint, unit.payload[0], at)
            stage: LayerRange = unit.payload[0]
            took = self._load(worker, unit.checkpoint, stage, at)
            return took + worker.spend(arithmetic=self._forward(self._model.elements(stage), self._batch_tokens))

        def finished(index: int, unit: Unit) -> None:
            if unit.kind == "stage" and not unit.payload[0].is_last:
                queue.add(Unit("stage", unit.checkpoint, (stages[stages.index(unit.payload[0]) + 1],)))

        end = drain(queue, self._workers, work, finished, start)
        return len(queue), end

    def _sample(self, worker: Worker, name: str, group: int, at: float) -> float:
        first, last = self._shares[group]
        link = disk = 0.0
        for one in dict.fromkeys((name, "base")):  # in one order
            on_link, on_disk = worker.node.read(one, self._model.num_bytes, at + link + disk, first, last)
            link, disk = link + on_link, disk + on_disk
        own = (last - first) * self._model.parameters * self._costs.of("sample_ns") * 1e-9
        return worker.spend(**{"reading from the store": link, "reading from disks": disk, "sampling weights": own})

    def _sums(self, start: float) -> tuple[int, float]:
        queue = WorkQueue(Unit("sums", None, (group,)) for group in range(len(self._groups)))
        count = len(self._names) - 1  # the figures are of so many and their base
        per_element = count * (self._costs.of("sums_ns") + count * self._costs.of("sums_pair_ns")) * 1e-9

        def work(worker: Worker, unit: Unit, at: float) -> float:
            first, last = self._shares[unit.payload[0]]
            link = disk = 0.0
            for name in self._names:
                on_link, on_disk = worker.node.read(name, self._model.num_bytes, at + link + disk, first, last)
                link, disk = link + on_link, disk + on_disk
            own = (last - first) * self._model.parameters * per_element
            return worker.spend(**{"reading from the store": link, "reading from disks": disk, "summing weights": own})

        return len(self._groups), drain(queue, self._workers, work, start=start)

    def _group_shares(self) -> list[tuple[float, float]]:
        """Where each group of tensors begins and ends, as shares of a checkpoint."""
        sizes, done, found = self._model.tensors, 0, []
        total = sum(sizes.values())
        for names in self._groups:
            begin, done = done, done + sum(sizes[name] for name in names)
            found.append((begin / total, done / total))
        return found
