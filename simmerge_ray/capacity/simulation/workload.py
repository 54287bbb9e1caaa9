"""What is to be done, and the nodes that are there for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simmerge_ray.base.errors import ConfigError, unknown_name
from simmerge_ray.capacity.machines import MACHINES
from simmerge_ray.capacity.simulation.costs import UnitCosts
from simmerge_ray.capacity.simulation.workers import Node
from simmerge_ray.capacity.size import ModelSize
from simmerge_ray.plans.operators.specs import Arm

# Of a node's memory, for actors: as in cluster/aws.yaml; the rest is Ray's, the cache's, the system's.
NODE_SHARE = 0.78


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
    prompt_tokens: float = 300
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
    """A pool of machines that the table of machines and the costs know. Raises ConfigError: one of them does not."""
    if machine not in MACHINES:
        raise ConfigError(unknown_name("machine", machine, MACHINES))
    size, about, assumed = MACHINES[machine], costs.machine(machine), costs.assumed
    if size.gpus and size.gpu_gb not in assumed.gpus:
        raise ConfigError(f"the costs have no GPU of {size.gpu_gb} GB ({machine})")
    return Pool(
        machine=machine,
        nodes=nodes,
        resources={"CPU": size.cpus, "memory": NODE_SHARE * size.memory_gb * 1e9, "GPU": size.gpus},
        gpu_gb=size.gpu_gb,
        link=about.network_gbps / 8 * 1e9 * assumed.link_share,
        disk=1e9 * about.disk_gb_per_s,
        cache_bytes=1e9 * (about.cache_gb if cache_gb is None else cache_gb),
        dollars=about.dollars * (assumed.spot_share if spot else 1.0),
    )
