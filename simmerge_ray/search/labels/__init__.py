"""Labels: the measured utility of a plan on a task, in append-only Parquet files under a URI.

Every flush is one file, named by the digest of its rows and written once, so several writers never collide, a kill
loses at most the trial in flight, and object stores without rename serve. A key is what the utility depends on: plan,
contents of the checkpoints, task, evaluation settings. `read` keeps one label per key, by an order over what the rows
say: a measured one, then a stopped one of most items, then an infeasible one. Names of files do not count, so readers
find the same labels before, during and after `compact` folds files into one.

A row is one (plan, task). Parents and base are labels of their own (a plan with a `source` and no operators), so that
what a merge gains over them is a join on task. For people with pandas, polars or DuckDB: `operators` and `members` are
the plan in flat columns, all parameters stand in the JSON of `plan`; where `stopped` is true, `utility` is that of a
part of the items and not comparable. Older files lack the last columns until they are compacted.
"""

from simmerge_ray.search.labels.contexts import measures_arm, pair_contexts, single_items
from simmerge_ray.search.labels.outcomes import (
    EvaluationSettings,
    Infeasible,
    LabeledPlan,
    Measured,
    Outcome,
    Stopped,
    check_comparable,
    label_key,
    used_digests,
)
from simmerge_ray.search.labels.store import LabelStore

__all__ = [
    "EvaluationSettings", "Infeasible", "LabelStore", "LabeledPlan", "Measured", "Outcome", "Stopped",
    "check_comparable", "label_key", "measures_arm", "pair_contexts", "single_items", "used_digests",
]  # fmt: skip
