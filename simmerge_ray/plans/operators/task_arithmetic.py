"""Sum of task vectors. Ilharco et al. 2023, arXiv:2212.04089."""

from __future__ import annotations

from simmerge_ray.plans.operators.consensus import sparse_sum

# The usual weights are 1 for each source; with weights that sum to 1 it is Linear.
task_arithmetic = sparse_sum("task_arithmetic", lambda _, vectors: vectors, election=False)
