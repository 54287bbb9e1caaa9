"""What units of work take: measured figures with where they come from, and assumed ones, which say so."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from pydantic import Field

from simmerge_ray.base.config import FrozenConfig, load_yaml
from simmerge_ray.base.errors import ConfigError, unknown_name
from simmerge_ray.plans.operators.specs import Arm

_LINEAR = ("linear", "task_arithmetic", "scale_matched_linear", "passthrough")
_SPHERICAL = ("slerp", "nuslerp", "multislerp", "karcher")


class Figure(FrozenConfig):
    """One measured figure. arithmetic: gives the value from what stands in benchmarks/README.md, where `text` is."""

    value: float = Field(gt=0)
    arithmetic: str = ""
    text: str = ""


class MeasuredCosts(FrozenConfig):
    """Units are in the names; `unit_costs.yaml` says of what."""

    core_flops: Figure
    sampled_share: Figure
    build_bytes_per_s: Figure
    digest_bytes_per_s: Figure
    sample_ns: Figure
    sums_ns: Figure
    sums_pair_ns: Figure
    pair_s_per_value: Figure
    mixed_ns: Figure
    mixed_member_ns: Figure
    linear_ns: Figure
    slerp_ns: Figure
    ties_ns: Figure
    item_s: Figure
    trial_s: Figure
    cache_bytes_per_s: Figure
    engine_start_s: Figure


class Gpu(FrozenConfig):
    """tflops: of bfloat16, without sparsity; tflops32: of float32. tbytes_per_s: of its memory."""

    name: str
    tflops: float = Field(gt=0)
    tflops32: float = Field(gt=0)
    tbytes_per_s: float = Field(gt=0)


class MachineCosts(FrozenConfig):
    """cloud: whose. dollars: an hour at list price. cache_gb, disk_gb_per_s: of the disk for the cache."""

    cloud: str
    network_gbps: float = Field(gt=0)
    dollars: float = Field(ge=0)
    cache_gb: float = Field(ge=0)
    disk_gb_per_s: float = Field(gt=0)


class AssumedCosts(FrozenConfig):
    """Shares are of what the vendor names. gpus: by GB of memory, as sold."""

    prefill_utilisation: float = Field(gt=0, le=1)
    decode_utilisation: float = Field(gt=0, le=1)
    batch_size: int = Field(ge=1)
    link_share: float = Field(gt=0, le=1)
    swap_bytes_per_s: float = Field(gt=0)
    heads: Mapping[str, str]
    spot_share: float = Field(gt=0, le=1)
    gpus: Mapping[int, Gpu]
    machines: Mapping[str, MachineCosts]


class UnitCosts(FrozenConfig):
    """All that a simulation computes with."""

    measured: MeasuredCosts
    assumed: AssumedCosts

    def of(self, name: str) -> float:
        """A measured figure."""
        return float(getattr(self.measured, name).value)

    def merge_ns(self, arm: Arm, ways: int) -> float:
        """Of one core for an element of a merge; measured for two checkpoints, taken as linear in their number."""
        kind = "linear_ns" if arm.operator in _LINEAR else "slerp_ns" if arm.operator in _SPHERICAL else "ties_ns"
        return self.of(kind) * ways / 2

    def head_beside(self, name: str) -> str:
        """The machine for a head in the cloud of another one. Raises ConfigError: nothing is said of it, or of a head
        there."""
        cloud = self.machine(name).cloud
        if cloud not in self.assumed.heads:
            raise ConfigError(unknown_name("cloud with a head", cloud, self.assumed.heads))
        return self.assumed.heads[cloud]

    def machine(self, name: str) -> MachineCosts:
        """A machine's price, network and disk. Raises ConfigError: nothing is said of it."""
        if name not in self.assumed.machines:
            raise ConfigError(unknown_name("machine", name, self.assumed.machines))
        return self.assumed.machines[name]


def load_costs(path: Path | None = None) -> UnitCosts:
    """The figures of a file, or ours. Raises ConfigError: no such file, or it is malformed."""
    return load_yaml(path or Path(str(files("simmerge_ray.capacity") / "unit_costs.yaml")), UnitCosts)
