"""The merge engine: plans and mergekit files, tensor by tensor, into a checkpoint directory or a live engine."""

from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.stream import FiniteStream, merged_tensors
from simmerge_ray.merging.write import MAX_THREADS, MergeResult, write_graph, write_merge

__all__ = ["MAX_THREADS", "FiniteStream", "MergeResult", "compile_plan", "merged_tensors", "write_graph", "write_merge"]
