"""What the plan scorer reads and writes: the two selectors, the parents' utilities, and the plans it has ranked."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmerge_ray.base.storage import Place, read_json, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.plan import resolve_plan, write_plan

if TYPE_CHECKING:
    from simmerge_ray.selector.data.dataset import SelectionDataset
    from simmerge_ray.selector.models.model import Selector
    from simmerge_ray.selector.planning.scorer import RankedPlan, Ranking

SHORTLIST = "shortlist"  # in a selector's directory: a second artifact, on the features of propagator `second_order`
PARENTS = "parents.json"  # beside it: measured utilities of the checkpoints as they are, task -> id -> utility


def default_selector() -> Path:
    """The selector that comes with the package, trained on the labels of docs/study.md."""
    return Path(str(files("simmerge_ray.selector"))) / "default"


def speaker(path: Place | None, selector: Selector) -> str:
    """Which selector speaks, and from how much. path: of one's own; None for the packaged one."""
    about = selector.provenance
    name = "the packaged selector" if path is None else f"the selector {path}"
    count, checkpoints = about.get("num_contexts", "an unknown number of"), len(about.get("checkpoints", ()))
    text = f"{name} speaks, trained on {count} contexts (a pair of checkpoints on a task) of {checkpoints} checkpoints"
    return text + (", none of them of this catalogue" if path is None else "")


def write_selectors(out: Place, selector: Selector, shortlist: Selector, dataset: SelectionDataset) -> None:
    """What `simmerge plan` and the service read: a selector, and beside it the shortlist's and the parents."""
    from simmerge_ray.selector.data.dataset import parent_utilities

    selector.write(out)
    shortlist.write(out / SHORTLIST)
    write_json(out / PARENTS, parent_utilities(dataset))


def read_parents(selector: Place) -> dict[str, dict[str, float]]:
    """Measured utilities of the checkpoints as they are; empty if the selector has none beside it."""
    return read_json(selector / PARENTS) if (selector / PARENTS).exists() else {}


def write_plans(directory: Place, ranking: Ranking, catalogue: Catalogue) -> list[Place]:
    """`plan-1.json`, ... from best to worst, for `simmerge merge`, and `ranking.json` with their predictions."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"plan-{number}.json" for number in range(1, len(ranking.plans) + 1)]
    for path, one in zip(paths, ranking.plans, strict=True):
        write_plan(path, resolve_plan(one.plan, catalogue), one.predicted)
    write_json(directory / "ranking.json", ranking_json(ranking))
    return paths


def ranking_json(ranking: Ranking) -> dict[str, Any]:
    """JSON value of a ranking."""
    counts = {"num_scored": ranking.num_scored, "beam_width": ranking.width, "num_reranked": ranking.num_reranked}
    plans, fixed = [ranked_json(one) for one in ranking.plans], ranked_json(ranking.best_fixed)
    return {"plans": plans, "best_fixed": fixed, **counts}


def ranked_json(one: RankedPlan) -> dict[str, Any]:
    """JSON value of a ranked plan; without numbers where its checkpoints are unlike those of the training."""
    return {
        "plan": one.plan.to_json(),
        "label": one.plan.label,
        "unlike": one.unlike,
        "propagator": one.propagator,
        **{name: None if one.unlike else getattr(one, name) for name in ("utility", "sd", "score")},
        "interval": None if one.unlike else list(one.interval),
        "by_task": one.predicted,
        "why": {} if one.unlike else dict(one.why),
        "approximate": list(one.approximate),
    }
