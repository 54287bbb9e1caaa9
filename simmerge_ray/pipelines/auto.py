"""`simmerge auto`: from a catalogue and probes to one merge or to "keep this checkpoint"; labels, where there are any.

The directory gets `signatures` and `labels` (the only state: a run that was stopped goes on), `tuned-*` (the same for
tuning), `auto.json` (the answer and every figure), and where a merge is the answer its plan file `plan.json` and the
merge itself, `merged`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmerge_ray.base.config import SearchConfig, TuneConfig
from simmerge_ray.base.errors import ConfigError, OutputError, TaskError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.merging.write.output import PLAN_FILE, check_target
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, read_plan, resolve_plan, write_plan
from simmerge_ray.plans.recipe import Recipe, recipe_of
from simmerge_ray.search.evaluation import EvaluationTask, Task
from simmerge_ray.selector.finding.probed import ProbedPlan, Prober
from simmerge_ray.selector.finding.sources import FindRequest, FindSources, find_sources

if TYPE_CHECKING:
    from simmerge_ray.on_ray.finding import ClusterOnDemand
    from simmerge_ray.selector.finding.choice import Finding

SIGNATURES, LABELS, MERGED = "signatures", "labels", "merged"
ANSWER, PLAN, MANIFEST = "auto.json", "plan.json", "manifest.json"


@dataclass(frozen=True)
class AutoRun:
    """What is asked, and where the answer goes.

    engine: what runs candidates. tasks, evaluate: labels, and how many merges are measured by them; 0 for none.
    signatures: URI of their store. write: whether a merge that is the answer is made.
    """

    request: FindRequest
    engine: SearchConfig
    out: Path
    signatures: str
    tasks: Mapping[str, EvaluationTask]
    evaluate: int = 0
    write: bool = True

    @property
    def labels(self) -> str:
        return str((self.out / LABELS).resolve())


@dataclass(frozen=True)
class Tuned:
    """A merge whose coefficients were tuned, beside the best that was not, on the probes that only decided when to
    stop. whole: what it keeps of all probes; those that it was tuned on are among them."""

    whole: ProbedPlan
    held_out: ProbedPlan
    rival: ProbedPlan

    @property
    def is_better(self) -> bool:
        return self.held_out.score > self.rival.score


@dataclass(frozen=True)
class LabelFree:
    """The answer without labels, and what it was chosen from. tuned: the best first."""

    best: ProbedPlan
    finding: Finding
    tuned: tuple[Tuned, ...]

    @property
    def lines(self) -> list[ProbedPlan]:
        """The answer, the best merge that was not tuned, the plain average, the checkpoints as they are; each once."""
        average = [one for one in self.finding.ranked if one.plan == self.finding.average]
        found = [self.best, *self.finding.merges[:1], *average, *self.finding.checkpoints]
        return list({one.plan.id: one for one in found}.values())

    @property
    def ranking(self) -> list[MergePlan]:
        """Merges in the order in which they are worth measuring: the tuned ones that are better, then the others."""
        tuned = [one.whole.plan for one in self.tuned if one.is_better]
        return [*tuned, *(one.plan for one in self.finding.merges)]


def check_auto(run: AutoRun) -> None:
    """What can be checked before anything is computed; InputError says what cannot be used."""
    if run.out.exists() and not run.out.is_dir():
        raise OutputError(f"--out {run.out} is a file; signatures, labels and the merge go into a directory")
    if run.write:
        check_target(run.out / MERGED)
    if run.evaluate:
        from simmerge_ray.pipelines.measured import prepare_measuring

        prepare_measuring(run)


def find_stages(run: AutoRun, narrator: Narrator) -> LabelFree:
    """Answers, the choice among recipes, and tuning of the best few.

    Raises:
        ProbeError, CheckpointError: checkpoints or probes that cannot be used. ConfigError: nothing could be run.
        EngineError: no evaluator started.
    """
    from simmerge_ray.on_ray.finding import ClusterOnDemand
    from simmerge_ray.selector.finding.choice import choose
    from simmerge_ray.signals.signature import SignatureStore

    request = run.request
    with ClusterOnDemand() as cluster:
        with narrator.stage("answers") as stage, narrator.bar("units of work") as report:
            workers = (run.engine.concurrency or 2, run.engine.gpus_per_trial)
            executor = cluster.executor(request.catalogue, *workers, report)
            sources = find_sources(request, SignatureStore(run.signatures), executor)
            count = sum(one.answers.num_answers for one in sources.answers)
            stage.result = f"{count} answers of {', '.join(request.catalogue.ids)} -> {run.signatures}"
        trials = cluster.trials(run.engine, run.labels, partial(_bar, narrator))
        with narrator.stage("choose") as stage:
            finding = choose(request, sources, trials, lambda line: narrator.say(f"           {line}"))
            stage.result = f"{len(finding.virtual.scores)} merges scored, best: {finding.best.plan.label}"
        prober = Prober(request.catalogue, sources.answers, sources.aim, trials)
        return _tuned(run, sources, finding, prober, cluster, narrator)


def _tuned(
    run: AutoRun,
    sources: FindSources,
    finding: Finding,
    prober: Prober,
    cluster: ClusterOnDemand,
    narrator: Narrator,
) -> LabelFree:
    """The answer with the best few tuned. A merge that is tuned has seen its probes, so it is compared with the best
    one on those that were held out."""
    config = run.request.config
    if config.tune == "none" or len(run.request.catalogue.ids) < 2:
        return LabelFree(finding.best, finding, ())
    from simmerge_ray.on_ray.tuning_tasks import run_tunings
    from simmerge_ray.pipelines.tune import tuning_job
    from simmerge_ray.signals.tuning.prepare import held_out_answers

    tune = TuneConfig(groups=config.tune, max_tokens=config.max_tokens)
    with narrator.stage("tune") as stage:
        starts = [_start(sources, one.plan) for one in finding.ranked[: config.num_tuned]]
        probes = {task: probes for task, probes in run.request.probe_sets.items() if task in sources.aim.tasks}
        jobs = [tuning_job(run.request.catalogue, probes, tune, run.out / "tuned", start) for start in starts]
        cluster.start()
        plans = [MergePlan(recipe=tuned.recipe) for tuned in run_tunings(jobs, run.engine.gpus_per_trial)]
        whole = prober.probe(plans, [prober.num_probes])
        part = prober.only(partial(held_out_answers, share=tune.held_out))
        compared = {one.plan.id: one for one in part.probe([*plans, finding.best.plan], [part.num_probes])}
        rival = compared[finding.best.plan.id]
        found = sorted((Tuned(one, compared[one.plan.id], rival) for one in whole), key=lambda one: -one.held_out.score)
        best = found[0].whole if found and found[0].is_better else finding.best
        word = "better" if best is not finding.best else "not better"
        if found:
            stage.result = f"{word} on the probes held out: {found[0].held_out.score:.3f} against {rival.score:.3f}"
    return LabelFree(best, finding, tuple(found))


def _start(sources: FindSources, plan: MergePlan) -> Recipe:
    """The sum of task vectors that is nearest to a plan."""
    coefficients = sources.scorer.coefficients_of(plan)
    return recipe_of(make_arm("task_arithmetic"), coefficients)


@contextmanager
def _bar(narrator: Narrator) -> Iterator[Any]:
    with narrator.status_bar("candidates run") as report:
        yield lambda status: report(status.done, status.total, status.line)


def write_stage(
    run: AutoRun, best: MergePlan, content: Mapping[str, Any], manifest: Manifest, started: float, narrator: Narrator
) -> None:
    """Write the answer, and (a merge, `write`) the merged checkpoint; errors as `write_merge`.

    Args:
        content: of `auto.json`, beside the answer. manifest: of all that the answer depends on. started:
            `time.monotonic()` of the whole run.
    """
    keeps = {owner: {"retention": share} for owner, share in content["keeps"].items()}
    merged = _write_best(run, best, keeps, manifest, narrator)
    answer = {
        "answer": "merge" if best.is_merge else "keep",
        "winner": best.label,
        "plan": best.to_json(),
        "merged": str(merged) if merged else None,
    }
    write_json(run.out / ANSWER, answer | dict(content))
    manifest.write(run.out / MANIFEST, time.monotonic() - started, {"answer": best.label})


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

    return {
        "objective": run.request.config.objective,
        "score": "(retention + exp(-nll)) / 2, by task; nll in nats a token of the members' own answers",
        "keeps": dict(zip(owners, found.best.retention.tolist(), strict=True)),
        "num_scored": len(found.finding.virtual.scores),
        "best": row(found.best),
        "candidates": [row(one) for one in found.finding.ranked],
        "tuned": [
            row(one.whole) | {"held_out": one.held_out.score, "held_out_of_the_best": one.rival.score}
            for one in found.tuned
        ],
    }


def check_evaluation(evaluate: int, has_tasks: bool) -> None:
    """Raises ConfigError: only one of the two is given."""
    if bool(evaluate) != has_tasks:
        raise ConfigError("--tasks has the items and --evaluate says how many merges are measured on them: give both")


def own_labels(known: Mapping[str, Task], catalogue: Catalogue, where: str) -> dict[str, Task]:
    """The tasks that the members were made for. Raises TaskError: the directory `where` lacks one."""
    wanted = sorted({task for task in catalogue.own_task.values() if task})
    if absent := [name for name in wanted if name not in known]:
        raise TaskError(
            f"{where} has no {absent[0]}.jsonl, which says what is measured on {absent[0]!r}; known: "
            f"{', '.join(sorted(known))}"
        )
    return {name: known[name] for name in wanted}
