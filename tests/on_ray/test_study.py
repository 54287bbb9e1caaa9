"""The study's stages on a tiny scale: every stage, and the same command again."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from simmerge_ray.base.config import StudyConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.pipelines.study import run_study
from simmerge_ray.research.study.exact_sample import RecordedExact, sampled_plans
from simmerge_ray.research.study.layout import StudyLayout, load_part
from simmerge_ray.search.labels import LabelStore, Measured
from simmerge_ray.signals.table import read_signal_table

# Without `probes`, which is `signals` three times more.
STAGES = ("zoo", "signals", "pairs", "plans", "exact", "analysis")
TINY = StudyConfig(
    num_bases=1,
    num_per_domain=1,
    num_large_per_domain=0,
    num_items=6,
    num_probes=4,
    num_subsets={3: 1},
    num_mixed=1,
    num_full=3,
    step_share=0.005,
    concurrency=1,
    evaluator="transformers",
)


def told(layout: StudyLayout) -> str:
    console = Console(file=io.StringIO(), width=300)
    run_study(layout.root, TINY, Narrator(console), STAGES)
    return console.file.getvalue()


@pytest.mark.usefixtures("ray_cluster")
def test_a_study_makes_zoo_signals_and_labels_once(tmp_path):
    layout = StudyLayout(tmp_path)
    assert "5 checkpoints trained" in told(layout)
    catalogue = load_catalogue(layout.catalogue("s1"))
    assert catalogue.base is not None and catalogue.base.id == "s1-base"
    assert set(read_signal_table(layout.signals("s1")).checkpoint_ids) == set(catalogue.ids)
    labels = LabelStore(layout.labels("s1")).read()
    assert all(isinstance(label.outcome, Measured) for label in labels)
    singles = {(label.plan.source, label.task) for label in labels if label.plan.source}
    assert len(singles) == 5 * 4
    assert sum(len(label.plan.steps) == 1 for label in labels) >= 6 * 6 * 2
    assert sum(len(label.plan.steps) == 2 for label in labels) > 0
    names = [path.name for path in layout.labels("s1").iterdir()]
    assert len([name for name in names if name.endswith(".parquet")]) == 1
    assert (layout.results / "labels.parquet").exists() and (layout.results / "signals" / "s1.parquet").exists()
    results = (layout.results / "results.md").read_text()
    assert "one base" in results  # one base cannot be left out, and the page says so
    recorded = RecordedExact(part := load_part(layout, "s1").table, layout.exact("s1"))
    plan = sampled_plans(load_part(layout, "s1"))[0]
    task = load_catalogue(layout.catalogue("s1")).own_task[plan.members[0]]
    first, last = recorded.steps(plan, task)
    assert first.features == part.get(plan.steps[0].left, plan.steps[0].right, task).features
    assert set(last.features) == set(recorded.columns)
    again = told(layout)
    assert "0 checkpoints trained" in again and again.count("unchanged") == 6
