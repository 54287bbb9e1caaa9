"""How long a study takes on a cluster, and what it costs: the scheduler's arithmetic on unit costs, no Ray."""

from simmerge_ray.capacity.simulation.costs import UnitCosts, load_costs
from simmerge_ray.capacity.simulation.study import Simulated, simulate
from simmerge_ray.capacity.simulation.workload import Pool, Workload, make_pool

__all__ = ["UnitCosts", "Pool", "Simulated", "Workload", "load_costs", "make_pool", "simulate"]
