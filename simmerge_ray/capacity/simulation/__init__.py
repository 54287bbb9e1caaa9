"""How long a study takes on a cluster, and what it costs: the scheduler's arithmetic on unit costs, no Ray."""

from simmerge_ray.capacity.simulation.costs import UnitCosts, load_costs
from simmerge_ray.capacity.simulation.study import Phase, Pool, Simulated, Workload, make_pool, simulate

__all__ = ["UnitCosts", "Phase", "Pool", "Simulated", "Workload", "load_costs", "make_pool", "simulate"]
