"""What a merge is worth on a task: tasks and their files, metrics, and the interface of what runs a model. No torch."""

from simmerge_ray.search.evaluation.evaluator import EvaluationTask, Evaluator, LogLikelihood, TokenPair, cut
from simmerge_ray.search.evaluation.files import load_task, load_tasks
from simmerge_ray.search.evaluation.metrics import CHOICE_METRICS, METRICS, TEXT_METRICS
from simmerge_ray.search.evaluation.tasks import Item, Task, shards

__all__ = [
    "CHOICE_METRICS", "METRICS", "TEXT_METRICS", "EvaluationTask", "Evaluator", "Item", "LogLikelihood", "Task",
    "TokenPair", "cut", "load_task", "load_tasks", "shards",
]  # fmt: skip
