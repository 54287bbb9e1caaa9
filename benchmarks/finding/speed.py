"""Seconds of a choice without labels beside one full evaluation of one merge, in alternation, one thread."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.finding.choices import in_one_process, sources_of
from benchmarks.finding.utilities import Bench
from benchmarks.measuring import Seconds, alternate, timed
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.selector.finding.choice import choose
from simmerge_ray.signals.signature import SignatureStore

_ROUNDS = 3


def seconds_of_choices(bench: Bench, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """By pair: medians of wall and processor seconds of both sides, and their ratios. Signatures are read, not made.

    The evaluation generates answers to all items of both tasks with an evaluator that is there already.
    """
    assert bench.catalogue.base is not None
    evaluator, found = TransformersEvaluator(bench.catalogue.base), {}
    for pair in pairs:
        sources_of(bench, pair)  # makes the signatures

        def choice(pair: tuple[str, str] = pair) -> Seconds:
            with tempfile.TemporaryDirectory() as labels:
                run, average = in_one_process(labels), SignatureStore(f"{labels}/average")
                return timed(lambda: choose(*sources_of(bench, pair, average=average), run))[1]

        def evaluation(pair: tuple[str, str] = pair) -> Seconds:
            def evaluate() -> None:
                evaluator.load(resolve_plan(MergePlan(recipe=plain_average(pair)), bench.catalogue))
                for task in bench.tasks_of(pair):
                    bench.tasks[task].evaluate(evaluator)

            return timed(evaluate)[1]

        sides: dict[str, Callable[[], Seconds]] = {"choice": choice, "evaluation": evaluation}
        rounds = alternate(sides, _ROUNDS)
        row: dict[str, Any] = {
            name: {"wall": median(one.wall for one in each), "cpu": median(one.cpu for one in each)}
            for name, each in rounds.items()
        }
        row["ratio"] = {kind: row["choice"][kind] / row["evaluation"][kind] for kind in ("wall", "cpu")}
        found["+".join(pair)] = row
        bench.report(f"seconds: {'+'.join(pair)} {row['ratio']}")
    ratios = {kind: median(one["ratio"][kind] for one in found.values()) for kind in ("wall", "cpu")}
    return {"median_ratio": ratios, "pairs": found}
