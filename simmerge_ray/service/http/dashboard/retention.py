"""What the page `/retention` shows: the share of every member's answers that the best recipes keep, and the curve over
the weight of two members. Drawn here, as SVG; the page needs no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.datastructures import QueryParams

from simmerge_ray.base.errors import InputError, StoreError
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.recipe_schemas import MAX_COMPARED
from simmerge_ray.service.retention import RetentionCurve
from simmerge_ray.service.schemas import PlansRequest, Refused

WIDTH, HEIGHT = 760, 340  # of the drawing, without a unit
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 190, 14, 46
_LABEL_STEP = 18  # between the names at the ends of lines
_TOP_RECIPES = 10
_SCALES = (0.2, 2.0)


@dataclass(frozen=True)
class Line:
    """name: of what; kind: class of its style; points: of an SVG polyline; label_y: where the name stands."""

    name: str
    kind: str
    points: str
    label_y: float


@dataclass(frozen=True)
class Chart:
    """best: weight of the best score, and where that is. rows: weight and the three values, for the table."""

    lines: list[Line]
    best: float
    best_x: float
    best_score: float
    columns: tuple[str, str, str]
    rows: list[tuple[float, list[float]]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class CurveQuery:
    """What the form says; what does not fit is replaced by what does."""

    members: tuple[str, ...]
    left: str
    right: str
    scale: float


def asked_of(query: QueryParams, known: Sequence[str]) -> CurveQuery:
    """Args: known: ids of at least two checkpoints."""
    members = tuple(name for name in known if name in query.getlist("member"))[:MAX_COMPARED]
    members = members if len(members) > 1 else tuple(known)[:MAX_COMPARED]
    left = query.get("left", "") if query.get("left") in known else members[0]
    others = [name for name in (query.get("right", ""), *members) if name in known and name != left]
    try:
        scale = float(query.get("scale", "1"))
    except ValueError:
        scale = 1.0
    low, high = _SCALES
    return CurveQuery(members, left, others[0], min(high, max(low, scale)) if np.isfinite(scale) else 1.0)


async def retention_view(learner: Learner, query: QueryParams, may_ask: bool) -> dict[str, Any]:
    """For the template; `trouble` says why there is nothing to see."""
    known = learner.answering
    view: dict[str, Any] = {"known": known, "may_ask": may_ask, "trouble": "", "asked": None, "ranking": None,
                            "chart": None, "scales": _SCALES, "max_compared": MAX_COMPARED}  # fmt: skip
    if not may_ask:
        return view
    try:
        if len(known) < 2:
            await learner.best_recipes(PlansRequest(by="retention"))  # which says what is missing
            raise Refused(409, "there is one checkpoint whose task has probes; a merge needs two")
        asked = asked_of(query, known)
        ways = f"2-{min(4, len(asked.members))}"
        request = PlansRequest(checkpoints=list(asked.members), ways=ways, top=_TOP_RECIPES, by="retention")
        curve = await learner.retention_curve(asked.left, asked.right, asked.scale)
        chart = chart_of(curve, asked.left, asked.right)
        return view | {"asked": asked, "ranking": await learner.best_recipes(request), "chart": chart}
    except (Refused, InputError, StoreError) as error:
        return view | {"trouble": str(error)}


def chart_of(curve: RetentionCurve, left: str, right: str) -> Chart:
    """Lines of what is kept of both, and of the score, over the weight of the left one."""
    values = {left: curve.retention[:, 0], right: curve.retention[:, 1], "score": curve.scores}
    xs = [_x(weight) for weight in curve.weights.tolist()]
    ends = _apart([_y(float(column[-1])) for column in values.values()])
    kinds = ("left", "right", "score")
    lines = []
    for (name, column), kind, end in zip(values.items(), kinds, ends, strict=True):
        points = " ".join(f"{x:.1f},{_y(y):.1f}" for x, y in zip(xs, column.tolist(), strict=True))
        lines.append(Line(name, kind, points, end))
    best = int(np.argmax(curve.scores))
    weight = float(curve.weights[best])
    rows = np.stack([curve.weights, *values.values()], 1)[::2].tolist()
    return Chart(
        lines=lines,
        best=weight,
        best_x=_x(weight),
        best_score=float(curve.scores[best]),
        columns=(left, right, "score"),
        rows=[(row[0], row[1:]) for row in rows],
        x_ticks=[(_x(n / 4), f"{n / 4:g}") for n in range(5)],
        y_ticks=[(_y(n / 5), f"{20 * n} %") for n in range(6)],
    )


def _x(weight: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * weight


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share


def _apart(places: Sequence[float]) -> list[float]:
    """The same places moved so far that names do not cover each other, inside the drawing."""
    order = sorted(range(len(places)), key=places.__getitem__)
    lowest = HEIGHT - _BOTTOM - _LABEL_STEP * (len(places) - 1)
    found, last = list(places), -np.inf
    for rank, index in enumerate(order):
        last = max(min(places[index], lowest + _LABEL_STEP * rank), last + _LABEL_STEP)
        found[index] = float(last)
    return found
