"""What is checked before anything runs, and the answer as files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simmerge_ray.base.config import EngineConfig, SearchConfig
from simmerge_ray.base.errors import ConfigError, TaskError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, Output, Place, as_place, check_outputs, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.merging.write.output import PLAN_FILE, merge_output
from simmerge_ray.on_ray.digests import digest_on_nodes
from simmerge_ray.pipelines.auto.expected import expect
from simmerge_ray.pipelines.auto.measure import prepare_measuring
from simmerge_ray.pipelines.auto.request import AutoRun, LabelFree
from simmerge_ray.pipelines.dataset import load_search_tasks
from simmerge_ray.plans.plan import MergePlan, read_plan, resolve_plan, write_plan
from simmerge_ray.reports.found import write_auto_report
from simmerge_ray.search.evaluation import EvaluationTask
from simmerge_ray.selector.finding.probed import ProbedPlan
from simmerge_ray.selector.finding.sources import FindRequest
from simmerge_ray.selector.predictor.model import read_predictor

MERGED, ANSWER, PLAN, MANIFEST = "merged", "auto.json", "plan.json", "manifest.json"
SIGNATURES = "signatures"


def auto_run(
    request: FindRequest,
    engine: EngineConfig,
    out: Path,
    signatures: Place | None,
    tasks: Place | None,
    evaluate: int,
    write: bool = True,
    predictor: Place | None = None,
) -> AutoRun:
    """What is asked. signatures: None puts them into `out`. tasks: directory of labels, of which `evaluate` merges are
    measured. predictor: of one's own labels; None for none.

    Raises:
        ConfigError: one of `tasks` and `evaluate` without the other. TaskError: a task that cannot be used or lacks.
        SelectorError: no predictor there, or a damaged one.
    """
    check_evaluation(evaluate, tasks is not None or bool(engine.lm_eval))
    search = SearchConfig(**engine.model_dump(), pairs="all")
    labels = own_labels(load_search_tasks(tasks, search), request.catalogue) if evaluate else {}
    where = str(signatures) if signatures is not None else str((out / SIGNATURES).resolve())
    expecting = None if predictor is None else read_predictor(predictor)
    return AutoRun(request, search, out, where, labels, evaluate, write, predictor=expecting)


def auto_outputs(out: Path, signatures: Place | None, write: bool) -> list[Output]:
    """What an answer writes; arguments as of `auto_run`."""
    kept = Output(out / SIGNATURES if signatures is None else signatures, "--signatures")
    return [Output(out), kept, *([merge_output(out / MERGED, "the merge")] if write else [])]


def check_auto(run: AutoRun) -> None:
    """What can be checked before anything is computed; InputError says what cannot be used."""
    check_outputs(auto_outputs(run.out, as_place(run.signatures), run.write))
    digest_on_nodes(run.request.catalogue)
    prepare_measuring(run)


def write_stage(
    run: AutoRun, best: MergePlan, content: Mapping[str, Any], manifest: Manifest, started: float, narrator: Narrator
) -> dict[str, Any]:
    """Write the answer, and (a merge, `write`) the merged checkpoint; errors as `write_merge`. Returns the answer:
    `merge` or `keep`, what wins, and where the merge is.

    Args:
        content: of `auto.json`, beside the answer. manifest: of all that the answer depends on. started:
            `time.monotonic()` of the whole run.
    """
    keeps = {owner: {"retention": share} for owner, share in kept_by(best, content).items()}
    merged = _write_best(run, best, keeps | _measured(best, content), manifest, narrator)
    answer = {
        "answer": "merge" if best.is_merge else "keep",
        "winner": best.label,
        "merged": str(merged) if merged else None,
    }
    whole = answer | {"plan": best.to_json()} | dict(content)
    write_json(run.out / ANSWER, whole)
    report = write_auto_report(whole, run.out)
    narrator.print_lines([f"report: {report.with_suffix('.html')}"])
    manifest.write(run.out / MANIFEST, time.monotonic() - started, {"answer": best.label})
    return answer


def kept_by(plan: MergePlan, content: Mapping[str, Any]) -> dict[str, float]:
    """Retention by owner of a plan in the content of `auto.json`; empty where it was not run over the probes."""
    known = {json.dumps(one["plan"]): one["retention"] for one in (content["best"], *content["candidates"])}
    return dict(known.get(json.dumps(plan.to_json()), {}))


def _measured(best: MergePlan, content: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of the answer on the items that had no part in the choice, by task, for its card."""
    rows = content.get("measured", {}).get("candidates", ())
    by_task: dict[str, Any] = next((row["reporting"]["by_task"] for row in rows if row["plan"] == best.to_json()), {})
    return {task: {"measured": one["value"], "se": one["se"]} for task, one in by_task.items()}


def _write_best(
    run: AutoRun, best: MergePlan, keeps: Mapping[str, Any], manifest: Manifest, narrator: Narrator
) -> Path | None:
    """The plan file of a merge that is the answer, and the merge; the path of the merge if it is there."""
    target = run.out / MERGED
    if not best.is_merge:
        (run.out / PLAN).unlink(missing_ok=True)  # of an earlier answer
        if target.exists():
            narrator.console.print(f"{target} is the merge of an earlier answer, not of this one", soft_wrap=True)
        return None
    resolved = resolve_plan(best, run.request.catalogue)
    write_plan(run.out / PLAN, resolved, keeps)
    if not run.write:
        narrator.say(f"make it with: simmerge merge {run.out / PLAN} OUT")
        return None
    there = manifest.is_current(run.out / MANIFEST) and (target / PLAN_FILE).exists()
    with narrator.stage("merge") as stage:
        if there and read_plan(target / PLAN_FILE)[0].plan.id == best.id:
            stage.result = f"already there -> {target}"
            return target
        with narrator.byte_bar("bytes written") as report:
            merged = write_merge(resolved, target, keeps, report)
        stage.result = f"{merged.num_bytes / 1e9:.3g} GB -> {target}"
    return target


def label_free_json(run: AutoRun, found: LabelFree) -> dict[str, Any]:
    """JSON value of everything that was chosen without labels."""
    owners = [f"{owner.checkpoint} on {owner.task}" for owner in found.finding.aim.owners]

    def row(one: ProbedPlan) -> dict[str, Any]:
        return {
            "label": one.plan.label,
            "plan": one.plan.to_json(),
            "score": one.score,
            "num_probes": one.num_probes,
            "retention": dict(zip(owners, one.retention.tolist(), strict=True)),
            "nll": dict(zip(owners, one.nll.tolist(), strict=True)),
        }

    expected = expect(run, found)
    return {
        "objective": run.request.config.objective,
        "score": "(retention + exp(-nll)) / 2, by task; nll in nats a token of the members' own answers",
        "keeps": dict(zip(owners, found.best.retention.tolist(), strict=True)),
        "num_scored": len(found.finding.virtual.scores),
        "best": row(found.best),
        "candidates": [row(one) for one in found.finding.ranked],
        "tuned": [
            row(one.whole)
            | {"held_out": one.held_out.score, "held_out_of_the_best": one.rival.score}
            | {"held_out_kept": one.held_out.kept, "held_out_kept_of_the_best": one.rival.kept}
            for one in found.tuned
        ],
        "expected": expected.to_json() if expected else None,
    }


def check_evaluation(evaluate: int, has_tasks: bool) -> None:
    """Raises ConfigError: only one of the two is given."""
    if bool(evaluate) != has_tasks:
        raise ConfigError(
            "--tasks (or --lm-eval) has the items and --evaluate says how many merges are measured on them: give both"
        )


def own_labels(known: Mapping[str, EvaluationTask], catalogue: Catalogue) -> dict[str, EvaluationTask]:
    """The tasks that the members were made for. Raises TaskError: one is not known."""
    wanted = sorted({task for task in catalogue.own_task.values() if task})
    if absent := [name for name in wanted if name not in known]:
        raise TaskError(
            f"no task {absent[0]!r}, which a checkpoint was made for, is known by --tasks or --lm-eval: give "
            f"{absent[0]}.jsonl or --lm-eval {absent[0]}=NAME; known: {', '.join(sorted(known))}"
        )
    return {name: known[name] for name in wanted}
