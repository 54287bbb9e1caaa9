"""Pages of studies beside what is computed from their published files: what is kept, and what is told."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.pipelines import study_report
from simmerge_ray.pipelines.study_report import PAGES, ReportedPage, check_pages
from simmerge_ray.research.said import Said


@dataclass(frozen=True)
class Numbers:
    """A published file with a number a line."""

    root: object

    def inputs(self):
        return {"numbers": (self.root / "numbers.txt").read_text()}

    def values(self):
        return [int(line) for line in (self.root / "numbers.txt").read_text().split()]


@pytest.fixture
def docs(tmp_path, monkeypatch):
    (tmp_path / "made-up").mkdir()
    (tmp_path / "made-up" / "numbers.txt").write_text("1\n2\n")
    (tmp_path / "made-up.md").write_text("# Made up\n\nThe sum of the numbers is 3, and there are 2 of them.\n")
    sections = {"sum": lambda one: sum(one.values()), "count": lambda one: len(one.values())}

    def statements(found):
        return [Said(f"{what} {{}}{end}", (str(found[name]),)) for name, what, end in
                (("sum", "the numbers is", ", and"), ("count", "there are", " of them"))]  # fmt: skip

    monkeypatch.setattr(study_report, "PAGES", {"made-up.md": ReportedPage("made-up", Numbers, sections, statements)})
    study_report._sources.cache_clear()
    yield tmp_path
    study_report._sources.cache_clear()


def checked(docs):
    told: list[str] = []
    found = check_pages(docs, (), docs / "cache", told.append, 1)["made-up.md"]
    return [str(one) for one in found.mismatches], len(told)


def test_sections_are_computed_once_until_the_data_change(docs):
    assert checked(docs) == ([], 2)
    assert checked(docs) == ([], 0)
    (docs / "made-up" / "numbers.txt").write_text("1\n2\n4\n")
    study_report._sources.cache_clear()  # as in the next process
    assert checked(docs) == (
        ["line 3: the page says 3, computed 7", "line 3: the page says 2, computed 3"], 2
    )  # fmt: skip


def test_another_page_is_an_error_that_names_those_there_are(docs):
    with pytest.raises(ConfigError, match=r"made-up\.md"):
        check_pages(docs, ["study-9.md"], docs / "cache", print)
    (docs / "made-up.md").unlink()
    with pytest.raises(ConfigError, match="in the directory of the repository"):
        check_pages(docs, (), docs / "cache", print)


def test_every_page_that_is_checked_is_published():
    docs = Path(__file__).parents[3] / "docs"
    for name, page in PAGES.items():
        assert (docs / name).is_file() and page.sources(docs / page.directory).inputs()


def test_processes_have_a_thread_each_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with study_report._one_thread_each():
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with study_report._one_thread_each():
        assert os.environ["OMP_NUM_THREADS"] == "4"
    assert os.environ["OMP_NUM_THREADS"] == "4"
