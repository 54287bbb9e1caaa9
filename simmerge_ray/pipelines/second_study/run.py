"""What all stages of the second study have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import write_json
from simmerge_ray.research.second_study.results import LabelledZoos, MadeZoo, publish_results, read_results

Part = TypeVar("Part")


@dataclass(frozen=True)
class StudyRun:
    """root: `real/` and `small/` lie in it. tasks: directory of the real tasks. base: the pretrained checkpoint. share:
    (i, n) takes every n-th expert, pair and checkpoint from the i-th on, so that n processes do the work of one.
    num_pairs: of every base, the first of their order (all of the real zoo, `NUM_SMALL_PAIRS` of a small one).
    num_bases: the first small ones; a share is of these, since a base's pairs stay together. num_members: of each set
    of the real zoo's experts. published: a directory like docs/study/second, from which labels and choices go on.
    """

    root: Path
    tasks: Path | None
    base: Path | None
    narrator: Narrator
    share: tuple[int, int] = (0, 1)
    num_pairs: int | None = None
    num_bases: int | None = None
    num_members: int = 4
    published: Path | None = None

    def published_of(self, kind: str) -> Path | None:
        """Of `real`, `small` or `sets`, if there is any."""
        place = None if self.published is None else (self.published / kind).resolve()
        return place if place is not None and place.exists() else None

    def mine(self, every: Sequence[Part]) -> list[Part]:
        """This process's share."""
        first, step = self.share
        return list(every[first::step])


def publish(
    run: StudyRun,
    kind: str,
    zoos: Sequence[MadeZoo],
    figures: Callable[[LabelledZoos], Mapping[str, Any]],
    read: Callable[[Path], LabelledZoos] = read_results,
) -> None:
    """Labels and choices of a kind of zoo as docs/study/second has them, with the figures of the plan's hypotheses."""
    out = (run.root / kind / "results").resolve()
    with run.narrator.stage(f"{kind.replace('/', '-')}-results") as stage:
        num_labels = publish_results(out, zoos)
        write_json(out / "figures.json", figures(read(out)))
        stage.result = f"{num_labels} labels, {sum(len(zoo.choices) for zoo in zoos)} choices -> {out}"
