"""What an actor asks Ray for, from the bytes that it holds: plain arithmetic, no Ray.

On CPUs an actor asks for `memory`, so that Ray puts no more of them on a node than fit. GPUs have no such resource: Ray
counts them and does not know their size. So nodes say it: a node with GPUs of 24 GB offers, beside `GPU`, a `gpu_16gb`
and a `gpu_24gb` for each (`gpu_offer`), and a model that needs 20 GB asks for a `gpu_24gb` (`gpu_request`). A GPU of
80 GB has that, too, one of 16 GB does not, and an autoscaler starts a node that has it. Where such nodes start from
zero, the head offers one `gpu_sizes` to say that they will. Clusters without these are taken as they are: any GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from simmerge_ray.base.errors import ConfigError

GPU_SIZES = (16, 24, 32, 40, 48, 80, 141)  # GB, as they are sold
USABLE = 0.9  # of a GPU's memory; the rest is the driver's and the allocator's

Needs = Mapping[str, float]
"""Amounts by Ray's name of a resource: CPU, GPU, memory (bytes), gpu_24gb."""


def gpu_resource(size_gb: int) -> str:
    """The resource's name: a GPU of at least so many GB."""
    return f"gpu_{size_gb}gb"


GPU_RESOURCES = tuple(gpu_resource(size) for size in GPU_SIZES)
GPU_SIZES_MARK = "gpu_sizes"  # on the head: nodes with GPUs say how large these are


def gpu_offer(size_gb: float, num_gpus: int) -> dict[str, int]:
    """What a node offers beside `GPU`: for a node type's `resources` in a cluster file, or `ray start --resources`.
    size_gb: memory of one GPU, as it is sold."""
    return {gpu_resource(size): num_gpus for size in GPU_SIZES if size <= size_gb}


def gpu_request(num_bytes: float, gpus: float, offered: Collection[str]) -> dict[str, float]:
    """What an actor asks for beside `GPU`; nothing where the cluster's nodes do not say how large their GPUs are.
    num_bytes: held on one GPU. gpus: how many, or a share of one: the bytes must fit into that share. offered: names of
    the resources of the cluster. Raises ConfigError: no GPU is so large."""
    if gpus <= 0 or not set(offered) & {GPU_SIZES_MARK, *GPU_RESOURCES}:
        return {}
    wanted = num_bytes / (USABLE * min(1.0, gpus))
    for size in GPU_SIZES:
        if wanted <= size * 1e9:
            return {gpu_resource(size): gpus}
    share = f" in {gpus:g} of a GPU" if gpus < 1 else " on one GPU"
    raise ConfigError(
        f"{num_bytes / 1e9:.1f} GB do not fit{share}: the largest has {GPU_SIZES[-1]} GB; split the model "
        "(search: tensor_parallel; signals: memory_per_worker) or give it a larger share"
    )


def how_many_fit(needs: Needs, resources: Needs) -> int:
    """How many actors with these needs a node, or roughly a cluster, has room for. A resource that it does not name is
    not counted on CPUs' memory, and is missing else."""
    room = []
    for kind, need in needs.items():
        if need > 0 and not (kind == "memory" and kind not in resources):
            room.append(int(resources.get(kind, 0.0) / need + 1e-9))
    return min(room, default=0)


def missing_on(needs: Needs, nodes: Sequence[Needs]) -> str | None:
    """Why no node can hold one actor, for a person; None if one can."""
    if any(how_many_fit(needs, node) for node in nodes):
        return None
    most = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in needs}
    short = [kind for kind, need in needs.items() if need > most[kind]] or list(needs)
    told = [f"it needs {_shown(kind, needs[kind])}, a node has at most {_shown(kind, most[kind])}" for kind in short]
    return "; ".join(told)


def _shown(kind: str, amount: float) -> str:
    return f"{amount / 1e9:.1f} GB of memory" if kind == "memory" else f"{amount:g} {kind}"


def signal_worker_needs(worker_bytes: float, gpus: float, offered: Collection[str] = ()) -> dict[str, float]:
    """Of one signal actor. worker_bytes: weights and activations (`signals.bounds`), and on CPUs the libraries."""
    return engine_needs(worker_bytes, 1.0, gpus, offered=offered)


def engine_needs(
    engine_bytes: float, cpus: float, gpus: float, ranks: int = 1, offered: Collection[str] = ()
) -> dict[str, float]:
    """Of one rank of an engine. engine_bytes: of all ranks together (`search.estimate.engine_bytes`). cpus, gpus: of
    one rank."""
    share = engine_bytes / ranks
    if gpus > 0:
        return {**({"CPU": cpus} if cpus else {}), "GPU": gpus, **gpu_request(share, gpus, offered)}
    return {"CPU": cpus, "memory": float(share)}
