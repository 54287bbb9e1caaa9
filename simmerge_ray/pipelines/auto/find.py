"""From answers to the merge that keeps most of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from simmerge_ray.selector.finding.curve import curved_sources
from simmerge_ray.selector.finding.probed import Prober, in_this_process
from simmerge_ray.selector.finding.sources import FindRequest, FindSources, find_sources

if TYPE_CHECKING:
    from simmerge_ray.on_ray.finding import ClusterOnDemand
    from simmerge_ray.search.setup import PreparedSearch
    from simmerge_ray.signals.tuning.run import TuningJob


def find_stages(run: AutoRun, narrator: Narrator) -> LabelFree:
    """Answers, the choice among recipes, and tuning of the best few.

    Raises:
        ProbeError, CheckpointError: checkpoints or probes that cannot be used. ConfigError: nothing could be run.
        EngineError: no evaluator started.
    """
    if run.here:
        from simmerge_ray.on_ray.engines import start_evaluator

        with narrator.stage("choose") as stage:
            found = find_here(run, start_evaluator)
            stage.result = f"{len(found.finding.virtual.scores)} merges scored, best: {found.best.plan.label}"
        return found
    from simmerge_ray.on_ray.finding import ClusterOnDemand
    from simmerge_ray.signals.signature import SignatureStore

    request = run.request
    with ClusterOnDemand() as cluster:
        with narrator.stage("answers") as stage, narrator.bar("units of work") as report:
            workers = (run.engine.concurrency or 2, run.engine.gpus_per_trial)
            executor = cluster.executor(request.catalogue, *workers, report)
            store = SignatureStore(run.signatures)
            sources = curved_sources(request, find_sources(request, store, executor), store, executor)
            count = sum(one.answers.num_answers for one in sources.answers)
            stage.result = f"{count} answers of {', '.join(request.catalogue.ids)} -> {run.signatures}"
        trials = cluster.trials(run.engine, run.labels, partial(_bar, narrator))
        with narrator.stage("choose") as stage:
            is_exact = run.engine.dtype == "float32"
            finding = choose(request, sources, trials, lambda line: narrator.say(f"           {line}"), is_exact)
            stage.result = f"{len(finding.virtual.scores)} merges scored, best: {finding.best.plan.label}"
        prober = Prober(request.catalogue, sources.answers, sources.aim, trials)
        return _tuned(run, sources, finding, prober, cluster, narrator)


def find_here(run: AutoRun, start: Callable[[PreparedSearch], object]) -> LabelFree:
    """`find_stages` in this process, without Ray and in silence: for many choices among small checkpoints at once.

    Args:
        start: starts the evaluator that runs candidates.
    """
    from simmerge_ray.signals.compute import local_executor
    from simmerge_ray.signals.signature import SignatureStore
    from simmerge_ray.signals.tuning.run import run_tuning

    request = run.request
    store, executor = SignatureStore(run.signatures), local_executor(request.catalogue)
    sources = curved_sources(request, find_sources(request, store, executor), store, executor)
    trials = in_this_process(run.engine, run.labels, start)
    finding = choose(request, sources, trials, is_exact=run.engine.dtype == "float32")
    if (tune := _tune_config(request)) is None:
        return LabelFree(finding.best, finding, ())
    tuned = [run_tuning(job) for job in _tuning_jobs(run, sources, finding, tune)]
    prober = Prober(request.catalogue, sources.answers, sources.aim, trials)
    return _beside_tuned(prober, finding, [MergePlan(recipe=one.recipe) for one in tuned], tune)


def _tuned(
    run: AutoRun,
    sources: FindSources,
    finding: Finding,
    prober: Prober,
    cluster: ClusterOnDemand,
    narrator: Narrator,
) -> LabelFree:
    """The answer with the best few tuned, on the cluster."""
    if (tune := _tune_config(run.request)) is None:
        return LabelFree(finding.best, finding, ())
    from simmerge_ray.on_ray.tuning_tasks import run_tunings

    with narrator.stage("tune") as stage:
        jobs = _tuning_jobs(run, sources, finding, tune)
        cluster.start()
        plans = [MergePlan(recipe=tuned.recipe) for tuned in run_tunings(jobs, run.engine.gpus_per_trial)]
        found = _beside_tuned(prober, finding, plans, tune)
        if found.tuned:
            first = found.tuned[0]
            word = "better" if first.is_better else "not better"
            of_both = [f"score {one.score:.3f}, {one.kept:.3f} kept" for one in (first.held_out, first.rival)]
            stage.result = f"{word} on the probes held out: {' against '.join(of_both)}"
    return found


def _tune_config(request: FindRequest) -> TuneConfig | None:
    """How the best few are tuned; None where they are not."""
    if request.config.tune == "none" or len(request.catalogue.ids) < 2:
        return None
    return TuneConfig(groups=request.config.tune, max_tokens=request.config.max_tokens)


def _tuning_jobs(run: AutoRun, sources: FindSources, finding: Finding, tune: TuneConfig) -> list[TuningJob]:
    from simmerge_ray.pipelines.tune import tuning_job

    starts = [_start(sources, one.plan) for one in finding.ranked[: run.request.config.num_tuned]]
    probes = {task: probes for task, probes in run.request.probe_sets.items() if task in sources.aim.tasks}
    return [tuning_job(run.request.catalogue, probes, tune, run.out / "tuned", start) for start in starts]


def _beside_tuned(prober: Prober, finding: Finding, plans: Sequence[MergePlan], tune: TuneConfig) -> LabelFree:
    """The answer among what was found and what was tuned from it. A merge that is tuned has seen its probes, so it is
    compared with the best one on those that were held out."""
    from simmerge_ray.signals.tuning.prepare import held_out_answers

    whole, held_out = prober.probe(plans, prober.parts), partial(held_out_answers, share=tune.held_out)
    both = prober.probe([*plans, finding.best.plan], prober.parts, held_out)
    compared = {one.plan.id: one for one in both}
    rival = compared[finding.best.plan.id]
    every = (Tuned(one, compared[one.plan.id], rival) for one in whole)
    tuned = sorted(every, key=lambda one: (not one.is_better, -one.held_out.score))
    best = tuned[0].whole if tuned and tuned[0].is_better else finding.best
    return LabelFree(best, finding, tuple(tuned))


def _start(sources: FindSources, plan: MergePlan) -> Recipe:
    """The sum of task vectors that is nearest to a plan."""
    coefficients = sources.scorer.coefficients_of(plan)
    return recipe_of(make_arm("task_arithmetic"), coefficients)


@contextmanager
def _bar(narrator: Narrator) -> Iterator[Any]:
    with narrator.status_bar("candidates run") as report:
        yield lambda status: report(status.done, status.total, status.line)
