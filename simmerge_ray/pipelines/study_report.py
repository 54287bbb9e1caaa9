"""Reports of studies, computed again from what is published, beside what their pages say.

A page is a row of `PAGES`: its sections are functions of the published files, each computed in a process of its own and
kept until the files or this package change; its statements are made of them. `make study-report` checks all pages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from simmerge_ray.base.errors import ConfigError, unknown_name
from simmerge_ray.base.storage import Manifest, digest_bytes, digest_file, read_json, write_atomically, write_json
from simmerge_ray.research.made_blocks import Blocks, check_blocks, filled_page
from simmerge_ray.research.said import Checked, Said, check_page
from simmerge_ray.research.second_study.analysis import real_section, small_section
from simmerge_ray.research.second_study.page import study_2_blocks
from simmerge_ray.research.second_study.results import PublishedResults
from simmerge_ray.research.second_study.sets import set_section
from simmerge_ray.research.second_study.transfer import transfer_section
from simmerge_ray.research.study import published, statements

_THREADS = "OMP_NUM_THREADS"
_PACKAGE = Path(__file__).resolve().parents[1]
# What a section computes does not depend on how it is told.
_TELLING = (
    "pipelines/study_report.py",
    "research/made_blocks.py",
    "research/said.py",
    "research/second_study/page.py",
    "research/study/statements.py",
)


class Sources(Protocol):
    """Published files, and what is read from them."""

    def inputs(self) -> dict[str, str]:
        """Digests by name."""


@dataclass(frozen=True)
class ReportedPage:
    """sources: makes them from their directory, which lies beside the page. sections: by name, to JSON values. told: of
    all of these: passages that stand on the page, or blocks that are made (`made_blocks`)."""

    directory: str
    sources: Callable[[Path], Sources]
    sections: Mapping[str, Callable[[Any], Any]]
    told: Callable[[Mapping[str, Any]], list[Said] | Blocks]


_SECOND = {"real": real_section, "small": small_section, "sets": set_section, "transfer": transfer_section}
PAGES: Mapping[str, ReportedPage] = {
    "study.md": ReportedPage("study", published.PublishedStudy, published.SECTIONS, statements.statements),
    "study-2.md": ReportedPage("study/second", PublishedResults, _SECOND, study_2_blocks),
}


def check_pages(
    docs: Path,
    names: Sequence[str],
    cache: Path,
    tell: Callable[[str], None],
    num_processes: int | None = None,
    fill: bool = False,
) -> dict[str, Checked]:
    """What pages of `docs` say beside what is computed.

    Args:
        names: of `PAGES`, none for all. fill: make the blocks of pages that have some anew, before they are checked.

    Raises:
        ConfigError: an unknown page, or one that is not there.
    """
    for name in names:
        if name not in PAGES:
            raise ConfigError(unknown_name("page", name, PAGES))
    found = {}
    for name in names or tuple(PAGES):
        if not (docs / name).is_file():
            raise ConfigError(f"there is no page {docs / name}; call this in the directory of the repository")
        sections = computed(name, docs, cache / Path(name).stem, tell, num_processes)
        told, text = PAGES[name].told(sections), (docs / name).read_text()
        if isinstance(told, Mapping) and fill:
            text = filled_page(text, told)
            write_atomically(docs / name, text.encode())
        found[name] = check_blocks(text, told) if isinstance(told, Mapping) else check_page(text, told)
    return found


def computed(
    name: str, docs: Path, cache: Path, tell: Callable[[str], None], num_processes: int | None = None
) -> dict[str, Any]:
    """The sections of a page; those that are current in `cache` are read."""
    page, inputs = PAGES[name], {"code": code_digest()}
    inputs |= page.sources(docs / page.directory).inputs()
    missing = [one for one in page.sections if not _manifest(one, inputs).is_current(cache / f"{one}.manifest.json")]
    for one, (value, seconds) in _all(name, docs, missing, num_processes or os.cpu_count() or 1):
        write_json(cache / f"{one}.json", value)
        _manifest(one, inputs).write(cache / f"{one}.manifest.json", seconds, {})
        tell(f"{name}: {one} computed in {seconds:.0f} processor seconds")
    return {one: read_json(cache / f"{one}.json") for one in page.sections}


def _manifest(section: str, inputs: Mapping[str, str]) -> Manifest:
    return Manifest(section, {}, inputs)


def _all(name: str, docs: Path, sections: Sequence[str], num: int) -> Iterator[tuple[str, tuple[Any, float]]]:
    """Sections with their values and processor seconds, in as many processes; of one, in this one."""
    if min(num, len(sections)) < 2:
        for one in sections:
            yield one, _section(name, docs, one)
        return
    # A fresh interpreter for each: threads of BLAS do not survive a fork.
    with _one_thread_each(), ProcessPoolExecutor(min(num, len(sections)), get_context("spawn")) as pool:
        jobs = {one: pool.submit(_section, name, docs, one) for one in sections}
        for one, job in jobs.items():
            yield one, job.result()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """For processes that are started inside, unless the environment says otherwise: as many as there are cores, with as
    many threads of BLAS each, wait for each other by spinning, which takes several times as long."""
    given = os.environ.get(_THREADS)
    os.environ.setdefault(_THREADS, "1")
    try:
        yield
    finally:
        if given is None:
            del os.environ[_THREADS]


def _section(name: str, docs: Path, section: str) -> tuple[Any, float]:
    started = time.process_time()
    return PAGES[name].sections[section](_sources(name, docs)), time.process_time() - started


@lru_cache(1)
def _sources(name: str, docs: Path) -> Sources:
    page = PAGES[name]
    return page.sources(docs / page.directory)


def code_digest() -> str:
    """Digest of this package, but for what only tells."""
    files = sorted(path for path in _PACKAGE.rglob("*.py") if str(path.relative_to(_PACKAGE)) not in _TELLING)
    return digest_bytes(*(digest_file(path).encode() for path in files))
