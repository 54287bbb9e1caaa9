"""A report as a page of its own: the content of report.md, figures in it, and nothing from anywhere else."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from simmerge_ray.reports.figures import new_figure, save_figure
from simmerge_ray.reports.found import write_auto_report, write_search_report
from simmerge_ray.reports.page import table_block, write_page


class Reader(HTMLParser):
    """Texts of cells and headings, and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.texts.append(data.strip())


def read(path) -> tuple[str, Reader]:
    page = path.with_suffix(".html").read_text()
    (reader := Reader()).feed(page)
    return page, reader


@pytest.fixture
def path(tmp_path):
    figure, ((axis,),) = new_figure(2, 1)
    axis.plot([0, 1])
    save_figure(figure, tmp_path / "figures", "a.png")
    rows = [["ties: <a> & b", 0.5, "+0.100 [-0.1, 0.3]"], ["**linear**", None, "-"]]
    blocks = ["# What & <why>", "Text with `code` and GapClosed of an arm.", "", "![It rises](figures/a.png)",
              table_block(["merge", "utility", "gain"], rows)]  # fmt: skip
    return write_page(tmp_path, blocks)


def test_the_page_holds_its_figures_and_names_no_host(path):
    page, reader = read(path)
    assert reader.fetched and all(one.startswith("data:") for one in reader.fetched)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_page_and_the_text_say_the_same(path):
    text, (page, reader) = path.read_text(), read(path)
    for said in ("ties: <a> & b", "linear", "0.500", "+0.100 [-0.1, 0.3]", "It rises"):
        assert said in text and (said in reader.texts or said in page)
    assert "<a>" not in page and "<title>What &amp; &lt;why&gt;</title>" in page
    assert page.count("<table>") == 1 and page.count("<tr>") == 3


def test_the_words_that_a_report_uses_are_explained(path):
    words = path.read_text().split("## Words")[1]
    assert "- **arm**:" in words and "- **GapClosed**:" in words and "headroom" not in words


ESTIMATE = {"value": 0.6, "se": 0.02}
PLAN = {"operator": "linear", "members": []}


def row(label: str, plan: dict, value: float) -> dict:
    half = {"value": value, "se": 0.02, "by_task": {"add": {"value": value, "se": 0.02}}}
    return {"label": label, "plan": plan, "score": 0.5, "choosing": half, "reporting": half}


def test_the_report_of_auto_begins_with_the_verdict_and_shows_what_was_measured_and_kept(tmp_path):
    kept = {"score": 0.7, "num_probes": 20, "retention": {"m0 on add": 0.9, "m1 on copy": 0.0}, "nll": {}}
    best, base = {"label": "linear: m0 + m1", "plan": PLAN} | kept, {"label": "base", "plan": {"source": "base"}} | kept
    content = {
        "answer": "keep", "winner": "base", "plan": {"source": "base"}, "objective": "mean", "score": "share",
        "keeps": best["retention"], "num_scored": 200, "best": best, "candidates": [best, base], "tuned": [],
    }  # fmt: skip
    without = write_auto_report(content, tmp_path / "without").read_text()
    assert without.startswith("# Keep base") and "| **linear: m0 + m1** | 0.700 | 90 % | 0 % |" in without
    measured = {
        "answer": "do not merge: keep the base, base, as it is", "lines": ["answer: do not merge"],
        "num_items": {"add": 40}, "best_merge": "linear: m0 + m1", "best_single": "base",
        "merge_minus_single": {"reporting": {"value": -0.2, "se": 0.03}},
        "candidates": [row("base", {"source": "base"}, 0.8), row("linear: m0 + m1", PLAN, 0.6),
                       {"label": "ties", "plan": PLAN, "score": None, "infeasible": "holds NaN"}],
    }  # fmt: skip
    text = write_auto_report(content | {"measured": measured}, tmp_path / "with").read_text()
    assert text.startswith("# Do not merge: keep the base, base, as it is\n\n- answer: do not merge")
    assert "The best merge is worse than the best checkpoint, base: -0.200 ± 0.030" in text
    assert "| **base** | 0.800 | 0.020 | 0.800 | 0.500 |" in text and "not measured: ties: holds NaN" in text
    assert (tmp_path / "with" / "figures" / "measured.png").exists() and "\nfigure" not in text


def test_the_report_of_a_search_has_a_part_for_each_set_of_tasks(tmp_path):
    def found(label: str, plan: dict, **tasks: float) -> dict:
        told = {task: {"utility": value, "se": 0.02} for task, value in tasks.items()}
        return {"label": label, "plan": plan, "objectives": [0.5], "utilities": told, "best": False}

    verdict = {"tasks": ["add"], "objective": "mean", "answer": "merge linear: m0 + m2", "winner": "linear: m0 + m2",
               "lines": ["answer: merge linear: m0 + m2"], "utility": ESTIMATE, "best_merge": "linear: m0 + m2",
               "best_single": "m0", "merge_minus_single": {"value": 0.01, "se": 0.02}}  # fmt: skip
    few = {"tasks": ["copy"], "objective": "mean", "answer": None}
    content = {
        "verdicts": [verdict, few],
        "merges": [found("linear: m0 + m2", PLAN, add=0.6)],
        "singles": [found("m0", {"source": "m0"}, add=0.59, copy=0.1)],
    }
    text = write_search_report(content, tmp_path).read_text()
    assert "## mean of add\n\n- answer: merge linear: m0 + m2" in text and "Too few items" in text
    assert "These items do not tell the best merge from the best checkpoint, m0: +0.010 ± 0.020" in text
    assert "| **linear: m0 + m2** | 0.600 | 0.020 | 0.600 |" in text and "| m0 | 0.590 | 0.020 | 0.590 |" in text
