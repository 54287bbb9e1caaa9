"""What `import simmerge_ray as sm` offers: the commands as functions, for notebooks and programs.

    catalogue = sm.Catalogue.load("catalogue.yaml")
    best = sm.auto(catalogue, probes="probes")
    best.retention, best.write("merged")

Each calls what its command calls, prints nothing, raises what the command says in one line (`sm.SimmergeError`), and
runs in this process unless it says otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from simmerge_ray.base.config import EngineConfig, RankingConfig, RankingFiles, SignalsConfig
from simmerge_ray.base.errors import ConfigError, PlanError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Place, as_place
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import GENERAL, ProbeSet, general_probe_set, load_probe_sets
from simmerge_ray.plans.plan import MergePlan, resolve_plan

if TYPE_CHECKING:
    from simmerge_ray.merging.write.output import MergeResult
    from simmerge_ray.selector.planning.scorer import Ranking
    from simmerge_ray.signals.table import SignalTable

PathLike: TypeAlias = str | Place
Probes: TypeAlias = PathLike | Mapping[str, ProbeSet]
_TRANSFORMERS = EngineConfig(evaluator="transformers")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers in what calls these functions."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


@dataclass(frozen=True, repr=False)
class Best:
    """The answer of `sm.auto`: a merge, or the checkpoint to keep.

    plan: how it is made; `plan.is_merge` is false where a checkpoint as it is keeps more than any merge.
    content: everything that `simmerge auto` writes to auto.json, as JSON values.
    """

    catalogue: Catalogue
    plan: MergePlan
    content: Mapping[str, Any]

    @property
    def label(self) -> str:
        return self.plan.label

    @property
    def is_merge(self) -> bool:
        return self.plan.is_merge

    @property
    def retention(self) -> dict[str, float]:
        """Share of each member's own answers that the answer gives as well, in [0, 1], by `MEMBER on TASK`. Empty for a
        merge that only labels have found."""
        from simmerge_ray.pipelines.auto.answer import kept_by

        return kept_by(self.plan, self.content)

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """What was run over all probes, best first: label, plan, score, retention, nll; rows of a data frame."""
        return list(self.content["candidates"])

    def write(self, out: PathLike) -> MergeResult:
        """Write the merge, a Hugging Face checkpoint directory with a model card.

        Raises PlanError: the answer is to keep a checkpoint. Otherwise as `write_merge`.
        """
        from simmerge_ray.merging.write.directory import write_merge

        if not self.is_merge:
            raise PlanError(f"the answer is to keep {self.label!r} as it is: there is no merge to write")
        keeps = {owner: {"retention": share} for owner, share in self.retention.items()}
        return write_merge(resolve_plan(self.plan, self.catalogue), as_place(out), keeps)

    def __repr__(self) -> str:
        kept = ", ".join(f"{owner} {100 * share:.0f} %" for owner, share in self.retention.items())
        return f"<{'merge' if self.is_merge else 'keep'} {self.label}; keeps {kept}>"


@_quiet()
def find_merge(
    catalogue: Catalogue,
    probes: Probes,
    config: FindConfig | None = None,
    engine: EngineConfig | None = None,
    out: str | Path | None = None,
    tasks: PathLike | None = None,
    evaluate: int = 0,
    on_ray: bool = False,
) -> Best:
    """Find the merge that keeps most of what its members answer to unlabeled probes: `simmerge auto`.

    Args:
        probes: directory of `<task>.jsonl` files, or probe sets by task.
        config: which merges, by what objective. engine: what runs candidates; by default transformers.
        out: directory for signatures and labels, from which a later call goes on; None forgets them.
        tasks, evaluate: directory of labels, and how many merges are measured on them, which then decide; `on_ray`.
        on_ray: on actors, as the command does, of a cluster that runs or that is started for the time of the call.

    Raises:
        InputError: what does not fit, before anything runs. EngineError: no evaluator started.
    """
    from simmerge_ray.pipelines.auto.answer import auto_run, check_auto, label_free_json
    from simmerge_ray.pipelines.auto.find import find_stages
    from simmerge_ray.selector.finding.sources import find_request

    if evaluate and not on_ray:
        raise ConfigError("measuring on labels runs on actors: give on_ray=True with tasks and evaluate")
    request, narrator = find_request(catalogue, _probe_sets(probes), config or FindConfig()), Narrator.silent()
    with _directory(out) as directory:
        labels = None if tasks is None else as_place(tasks)
        run = auto_run(request, engine or _TRANSFORMERS, directory, None, labels, evaluate, write=False)
        run = replace(run, here=not on_ray)
        check_auto(run)
        found = find_stages(run, narrator)
        plan, content = found.best.plan, label_free_json(run, found)
        if evaluate:
            from simmerge_ray.pipelines.auto.measure import measure_stage, measured_json

            measurement = measure_stage(run, found, narrator)
            plan, content = measurement.verdict.winner.plan, content | measured_json(run, measurement)
    return Best(request.catalogue, plan, content)


def make_merge(
    plan: PathLike,
    out: PathLike,
    strict: bool = False,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Make the merge of a plan file, mergekit's YAML or plan JSON: `simmerge merge`.

    Args:
        strict: refuse keys without effect, and NaN or infinity. progress: called with (bytes done, bytes in all).

    Raises InputError: with every problem, before a weight is read.
    """
    from simmerge_ray.merging.request import read_request
    from simmerge_ray.merging.write.output import WriteOptions

    request = read_request(as_place(plan), as_place(out), strict)
    return request.write(WriteOptions(progress=progress, num_threads=num_threads, strict=strict))


@_quiet()
def pair_signals(
    catalogue: Catalogue,
    probes: Probes | None = None,
    config: SignalsConfig | None = None,
    out: PathLike | None = None,
) -> SignalTable:
    """Similarity signals of all ordered pairs, on every task of the probes: `simmerge signals`.

    Args:
        probes: as of `auto`; None takes the general probe set. out: Parquet file for the table; signatures are kept in
            `signatures` beside it. None forgets both.

    Raises CheckpointError, ProbeError, ConfigError: what cannot be used.
    """
    from simmerge_ray.signals.compute import compute_signals, signals_into
    from simmerge_ray.signals.signature import SignatureSpec, SignatureStore

    config, place = config or SignalsConfig(), None if out is None else as_place(out)
    sets = {GENERAL: general_probe_set()} if probes is None else _probe_sets(probes)
    made_with, memory = (catalogue, sets, SignatureSpec.of(config), config.weights), config.memory_per_worker
    if place is None:
        return compute_signals(*made_with, memory_per_worker=memory)
    store = SignatureStore(place.parent / "signatures")
    return signals_into(place, *made_with, store, memory_per_worker=memory)


def rank_merges(
    catalogue: Catalogue, files: RankingFiles | PathLike, config: RankingConfig | None = None, top: int = 10
) -> Ranking:
    """The best merges by a selector's prediction, without making any: `simmerge plan`.

    Args:
        files: a signal table as `signals` or `pair_signals(out=...)` writes it, with `signatures` beside it; or all
            files, a selector of one's own too.

    Raises InputError: an artifact is missing, two do not fit each other, or no plan meets the constraints.
    """
    from simmerge_ray.selector.planning.request import read_sources

    config = config or RankingConfig()
    files = files if isinstance(files, RankingFiles) else RankingFiles(signals=as_place(files))
    return read_sources(files, catalogue, config.propagator).request(config).rank(top)


@_quiet()
def report_card(
    model: str | Path,
    catalogue: Catalogue,
    probes: Probes,
    max_tokens: int = 16,
    num_examples: int = 0,
    signatures: PathLike | None = None,
) -> list[dict[str, Any]]:
    """What any model keeps of every member: `simmerge retention`. A row each: member, task, num_answers, retention in
    [0, 1], nll, kl and entropy in nats a token, repetition, the base's retention and KL, examples.

    Args:
        model: id of a checkpoint of the catalogue; else a directory, URI or hub id.
        signatures: directory of members' answers, of `auto`'s `out` for one, which are then not written again.
    """
    from simmerge_ray.pipelines.retention import checked_sources, retention_stage

    sources = checked_sources(str(model), catalogue, _probe_sets(probes))
    place = None if signatures is None else as_place(signatures)
    return retention_stage(*sources, Narrator.silent(), max_tokens, num_examples, place)


def _probe_sets(probes: Probes) -> dict[str, ProbeSet]:
    return dict(probes) if isinstance(probes, Mapping) else load_probe_sets(as_place(probes))


@contextmanager
def _directory(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="simmerge-auto-") as directory:
        yield Path(directory)
