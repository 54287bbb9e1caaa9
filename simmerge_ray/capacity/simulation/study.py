"""A whole study on two pools of nodes: signals on CPUs, labels on engines; hours, what holds them up, dollars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simmerge_ray.capacity.simulation.costs import UnitCosts
from simmerge_ray.capacity.simulation.labels import Engines, cache_holds, make_trials, place_engines, simulate_labels
from simmerge_ray.capacity.simulation.signals import Placed, SignalRun, SignalSimulation, place_workers
from simmerge_ray.capacity.simulation.workers import Phase
from simmerge_ray.capacity.simulation.workload import Pool, Workload, make_pool


@dataclass(frozen=True)
class Simulated:
    """The plan and what it comes to.

    head: where a submitted job's driver runs.
    """

    placed: Placed
    engines: Engines
    signals: SignalRun
    labels: Phase
    signal_pool: Pool
    engine_pool: Pool
    head: Pool
    cache_holds: bool

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (*self.signals.phases, self.labels)

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
            "head": self.seconds / 3600 * self.head.dollars,
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
    """Run the arithmetic of a study. head: the machine on which the driver runs; None takes that of the costs for the
    signals' cloud. cpus: cores of an engine on CPUs. Raises ConfigError: a model fits no node."""
    model, cores = workload.model, int(signal_pool.resources["CPU"])
    placed = place_workers(model, signal_pool.resources)
    engines = place_engines(model, engine_pool.resources, engine_pool.gpu_gb, cpus)
    head_pool = make_pool(head or costs.head_beside(signal_pool.machine), 1, costs)
    signals = SignalSimulation(workload, placed, signal_pool.make_nodes(costs, 4096), cores, costs).run()
    nodes = engine_pool.make_nodes(costs, 64)  # whole checkpoints
    labels = simulate_labels(workload, make_trials(workload), engines, nodes, costs)
    kept = cache_holds(engine_pool.cache_bytes, model, workload.ways)
    return Simulated(placed, engines, signals, labels, signal_pool, engine_pool, head_pool, kept)
