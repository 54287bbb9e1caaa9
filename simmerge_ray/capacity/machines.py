"""The machines of the clouds that this package knows: one table, for the check of cluster files and for simulations.

Prices, networks and disks, which users change, stand in `unit_costs.yaml`.
"""

from __future__ import annotations

from typing import NamedTuple


class MachineSize(NamedTuple):
    """As the clouds say. gpu_gb: memory of one GPU, as it is sold."""

    cpus: int
    memory_gb: float
    gpus: int = 0
    gpu_gb: int = 0


MACHINES = {
    "m7i.xlarge": MachineSize(4, 16),
    "m7i.2xlarge": MachineSize(8, 32),
    "r7i.2xlarge": MachineSize(8, 64),
    "r7i.4xlarge": MachineSize(16, 128),
    "r7i.8xlarge": MachineSize(32, 256),
    "g6.4xlarge": MachineSize(16, 64, 1, 24),
    "g6e.4xlarge": MachineSize(16, 128, 1, 48),
    "p4d.24xlarge": MachineSize(96, 1152, 8, 40),
    "p5.48xlarge": MachineSize(192, 2048, 8, 80),
    "n2-standard-4": MachineSize(4, 16),
    "n2-highmem-8": MachineSize(8, 64),
    "n2-highmem-16": MachineSize(16, 128),
    "n2-highmem-32": MachineSize(32, 256),
    "g2-standard-16": MachineSize(16, 64, 1, 24),
    "a2-highgpu-1g": MachineSize(12, 85, 1, 40),
    "a3-highgpu-8g": MachineSize(208, 1872, 8, 80),
}
