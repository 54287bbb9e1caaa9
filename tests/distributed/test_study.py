"""The study's stages on a tiny scale: every stage, and the same command again."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from simmerge_ray.catalogue import load_catalogue
from simmerge_ray.config import ZooStudyConfig
from simmerge_ray.distributed.study import NUM_PROBES_TRIED, WRONG_DOMAIN, probe_variants, run_study
from simmerge_ray.labels import LabelStore, Measured
from simmerge_ray.progress import Narrator
from simmerge_ray.signals.table import read_signal_table
from simmerge_ray.study.layout import StudyLayout

TINY = ZooStudyConfig(
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
    run_study(layout.root, TINY, Narrator(console))
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
    wrong = read_signal_table(layout.signals("s1", "wrong"))
    assert wrong.rows.keys() == read_signal_table(layout.signals("s1")).rows.keys()
    names = [path.name for path in layout.labels("s1").iterdir()]
    assert len([name for name in names if name.endswith(".parquet")]) == 1
    again = told(layout)
    assert "0 checkpoints trained" in again and again.count("unchanged") == 6


def test_fewer_probes_and_those_of_another_task(tmp_path):
    for task in ("code", "math"):
        lines = [f'{{"text": "{task} {number}"}}\n' for number in range(20)]
        (tmp_path / f"{task}.jsonl").write_text("".join(lines))
    found = probe_variants(tmp_path)
    assert set(found) == {*map(str, NUM_PROBES_TRIED), WRONG_DOMAIN}
    assert found["4"]["math.jsonl"].count(b"\n") == 4 and b"math 3" in found["4"]["math.jsonl"]
    assert found[WRONG_DOMAIN]["code.jsonl"] == (tmp_path / "math.jsonl").read_bytes()
    assert found[WRONG_DOMAIN]["math.jsonl"] == (tmp_path / "code.jsonl").read_bytes()
