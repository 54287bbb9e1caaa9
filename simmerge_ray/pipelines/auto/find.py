"""From answers to the merge that keeps most of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.pipelines.auto.request import AutoRun, LabelFree, Tuned
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe, recipe_of
from simmerge_ray.selector.finding.choice import Finding, choose
from simmerge_ray.selector.finding.probed import Prober
from simmerge_ray.selector.finding.sources import FindSources, find_sources

if TYPE_CHECKING:
    from simmerge_ray.on_ray.finding import ClusterOnDemand


def find_stages(run: AutoRun, narrator: Narrator) -> LabelFree:
    """Answers, the choice among recipes, and tuning of the best few.

    Raises:
        ProbeError, CheckpointError: checkpoints or probes that cannot be used. ConfigError: nothing could be run.
        EngineError: no evaluator started.
    """
    from simmerge_ray.on_ray.finding import ClusterOnDemand
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
