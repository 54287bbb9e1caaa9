"""A whole study on two pools of nodes: signals on CPUs, labels on engines; hours, what holds them up, dollars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simmerge_ray.base.errors import ConfigError, unknown_name
from simmerge_ray.capacity.machines import MACHINES
from simmerge_ray.capacity.simulation.costs import UnitCosts
from simmerge_ray.capacity.simulation.labels import Engines, cache_holds, make_trials, place_engines, simulate_labels
from simmerge_ray.capacity.simulation.signals import Placed, SignalSimulation, place_workers
from simmerge_ray.capacity.simulation.workers import Node
from simmerge_ray.capacity.size import ModelSize
from simmerge_ray.plans.operators.specs import Arm

NODE_SHARE = (
    0.78  # of a node's memory, for actors: as in cluster/aws.yaml; the rest is Ray's, the cache's, the system's
)


@dataclass(frozen=True)
class Workload:
    """num_models: beside the base. tasks: with a probe set of `probes` texts of `probe_tokens` tokens and `items` items
    of `prompt_tokens` and `answer_tokens` each. max_merges: None takes every pair across tasks with every arm."""

    model: ModelSize
    num_models: int
    tasks: int
    arms: Sequence[Arm]
    ways: int = 2
    max_merges: int | None = None
    probes: int = 48
    probe_tokens: float = 99.0
    items: int = 400
    prompt_tokens: int = 300
    answer_tokens: int = 100


@dataclass(frozen=True)
class Pool:
    """Nodes of one kind. resources: as one offers them to Ray. link, disk: bytes a second. dollars: an hour of one."""

    machine: str
    nodes: int
    resources: Mapping[str, float]
    gpu_gb: int
    link: float
    disk: float
    cache_bytes: float
    dollars: float

    def make_nodes(self, costs: UnitCosts, pieces: int) -> list[Node]:
        """As they are when the study begins: nothing is in their caches."""
        one = costs.of("cache_bytes_per_s")
        return [Node(self.link, self.disk, self.cache_bytes, one, pieces) for _ in range(self.nodes)]


def make_pool(machine: str, nodes: int, costs: UnitCosts, spot: bool = False, cache_gb: float | None = None) -> Pool:
    """A pool of machines that the table of the cluster check and the costs know.

    Raises:
        ConfigError: one of them does not.
    """
    if machine not in MACHINES:
        raise ConfigError(unknown_name("machine", machine, MACHINES))
    cpus, memory, gpus, gpu_gb = MACHINES[machine]
    about, assumed = costs.machine(machine), costs.assumed
    if gpus and gpu_gb not in assumed.gpus:
        raise ConfigError(f"the costs say nothing of GPUs of {gpu_gb} GB ({machine})")
    return Pool(
        machine=machine,
        nodes=nodes,
        resources={"CPU": cpus, "memory": NODE_SHARE * memory * 1e9, "GPU": gpus},
        gpu_gb=gpu_gb,
        link=about.network_gbps / 8 * 1e9 * assumed.link_share,
        disk=1e9 * about.disk_gb_per_s,
        cache_bytes=1e9 * (about.cache_gb if cache_gb is None else cache_gb),
        dollars=about.dollars * (assumed.spot_share if spot else 1.0),
    )


@dataclass(frozen=True)
class Phase:
    """A part of the study. causes: seconds of all workers together, by what they were for, the longest first."""

    name: str
    place: str
    workers: int
    units: int
    seconds: float
    network_bytes: float
    causes: Mapping[str, float]

    @property
    def cause(self) -> str:
        """What most of its time is for."""
        return next(iter(self.causes))

    @property
    def share(self) -> float:
        """Of its workers' seconds that are for this."""
        return self.causes[self.cause] / sum(self.causes.values())


@dataclass(frozen=True)
class Simulated:
    """The plan and what it comes to.

    signature_bytes: of one checkpoint on all tasks. driver_bytes: what the driver holds; head_bytes: what it may, on
    the head, where a submitted job's driver runs.
    """

    placed: Placed
    engines: Engines
    phases: tuple[Phase, ...]
    signal_pool: Pool
    engine_pool: Pool
    head_dollars: float
    signature_bytes: float
    driver_bytes: float
    cache_holds: bool
    head_bytes: float

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def bottleneck(self) -> Phase:
        """The longest part."""
        return max(self.phases, key=lambda phase: phase.seconds)

    def node_hours(self, place: str) -> float:
        """Of the nodes for `signals` or `engines`: they are there for their own parts, idle minutes left out."""
        nodes = {"signals": self.signal_pool.nodes, "engines": self.engine_pool.nodes}[place]
        return nodes * sum(phase.seconds for phase in self.phases if phase.place == place) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.node_hours("engines") * self.engine_pool.resources["GPU"]

    @property
    def dollars(self) -> Mapping[str, float]:
        """Node hours times the price of each pool; the head as long as the study takes. Storage and its requests, and
        bytes that leave a region, are not in it."""
        return {
            "head": self.seconds / 3600 * self.head_dollars,
            "signals": self.node_hours("signals") * self.signal_pool.dollars,
            "engines": self.node_hours("engines") * self.engine_pool.dollars,
        }


def simulate(
    workload: Workload,
    signal_pool: Pool,
    engine_pool: Pool,
    costs: UnitCosts,
    head: str | None = None,
    cpus: float = 4.0,
) -> Simulated:
    """Run the arithmetic of a study.

    Args:
        head: the machine on which the driver runs; None takes that of the costs for the signals' cloud. cpus: cores of
            an engine on CPUs.

    Raises:
        ConfigError: a model fits no node.
    """
    model = workload.model
    placed = place_workers(model, signal_pool.resources)
    engines = place_engines(model, engine_pool.resources, engine_pool.gpu_gb, cpus)
    head_pool = make_pool(head or costs.head_beside(signal_pool.machine), 1, costs)
    signals = SignalSimulation(
        model,
        workload.num_models,
        workload.tasks,
        workload.probes,
        workload.probe_tokens,
        placed,
        signal_pool.make_nodes(costs, 4096),
        int(signal_pool.resources["CPU"]),
        costs,
    ).run()
    cores = int(signal_pool.resources["CPU"]) * signal_pool.nodes
    workers = {"digests": min(cores, workload.num_models + 1), "pairs": 1}
    phases = [
        Phase(
            name,
            "driver" if name == "pairs" else "signals",
            workers.get(name, placed.per_node * signal_pool.nodes),
            signals.units[name],
            seconds,
            signals.network_bytes[name],
            _ordered(signals.causes[name]),
        )
        for name, seconds in signals.seconds.items()
    ]
    trials = make_trials(workload.num_models, workload.tasks, workload.arms, workload.ways, workload.max_merges)
    gpu = costs.assumed.gpus[engine_pool.gpu_gb] if engines.ranks else None
    labels = simulate_labels(
        model,
        trials,
        engines,
        engine_pool.make_nodes(costs, 64),  # whole checkpoints
        gpu,
        workload.items,
        workload.prompt_tokens,
        workload.answer_tokens,
        costs,
    )
    phases.append(
        Phase("labels", "engines", labels.engines, labels.trials, labels.seconds, labels.network_bytes,
              _ordered(labels.causes))
    )  # fmt: skip
    return Simulated(
        placed,
        engines,
        tuple(phases),
        signal_pool,
        engine_pool,
        head_pool.dollars,
        signals.signature_bytes,
        signals.driver_bytes,
        cache_holds(engine_pool.cache_bytes, model, workload.ways),
        head_pool.resources["memory"],
    )


def _ordered(causes: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(causes.items(), key=lambda one: -one[1]))
