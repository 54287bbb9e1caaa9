"""A ranking of plans from a catalogue, signals, selectors and options: what `plan`, `auto` and the service ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations

import numpy as np

from simmerge_ray.base.config import RankingConfig, RankingFiles
from simmerge_ray.base.errors import ConfigError, PlanError, SelectorError
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.digests import cached_digest
from simmerge_ray.search.objectives import MEAN, WORST
from simmerge_ray.selector.models.model import Selector, read_selector
from simmerge_ray.selector.planning.files import SHORTLIST, default_selector
from simmerge_ray.selector.planning.scorer import PlanScorer, Ranking
from simmerge_ray.selector.planning.space import PlanSpace, plan_space, scorable_arms
from simmerge_ray.selector.planning.tasks import TaskPool, task_pool
from simmerge_ray.signals.features import both_orders
from simmerge_ray.signals.propagation.bound import Bound
from simmerge_ray.signals.propagation.interface import Propagator
from simmerge_ray.signals.propagation.second_order import SecondOrder
from simmerge_ray.signals.table import SignalTable, read_signal_table

# Propagators that need nothing but the signal table, and those that run the probes.
_FROM_TABLE: Mapping[str, type[Bound] | type[SecondOrder]] = {"bound": Bound, "second_order": SecondOrder}
_FROM_PROBES = ("curved", "exact")
_MAX_LOOKED_AT = 2048  # pairs; a share of them is known to 2 %


@dataclass(frozen=True)
class RankingSources:
    """What plans are ranked with.

    selector: ranks the shortlist on the features of the propagator. shortlist: makes it on those of `second_order`.
    ids: checkpoints that may be merged. own_task: of each. propagator: makes it, once, when plans are scored.
    """

    selector: Selector
    shortlist: Selector
    table: SignalTable
    ids: tuple[str, ...]
    own_task: Mapping[str, str | None]
    propagator: Callable[[], Propagator]

    @cached_property
    def scorer(self) -> PlanScorer:
        return PlanScorer(self.table, self.propagator(), self.selector, self.shortlist)

    def request(self, config: RankingConfig) -> PlanRequest:
        """Check the options against the sources, before anything is computed. Raises InputError: a name is unknown, or
        no plan meets the constraints."""
        arms = scorable_arms(config.arms, self.selector.arms, self.table.provenance.get("base") is not None)
        space = plan_space(self.ids, arms, config.ways, config.weighting, config.must_contain, config.exclude)
        pool = task_pool(config.objective, config.tasks, self.table.tasks, self.table.checkpoint_ids, self.own_task)
        return PlanRequest(self, config, space, pool)


@dataclass(frozen=True)
class PlanRequest:
    """Plans to be ranked, and the tasks that count."""

    sources: RankingSources
    config: RankingConfig
    space: PlanSpace
    pool: TaskPool

    def rank(self, top: int, report: Callable[[int, int], None] = lambda done, total: None) -> Ranking:
        """The best plans; those of checkpoints that the selector does not know come last. Raises InputError: the
        propagator lacks something, or does not deliver what the selector was trained with."""
        return self.sources.scorer.rank(self.space, self.pool, top, self.config, self.are_unlike, report)

    @cached_property
    def looked_at(self) -> list[tuple[str, str]]:
        """Pairs that `unlike_pairs` looks at: all, or so many of them, evenly spread."""
        pairs = list(combinations(self.space.ids, 2))
        return pairs[:: max(1, -(-len(pairs) // _MAX_LOOKED_AT))]

    @cached_property
    def unlike_pairs(self) -> list[tuple[str, str]]:
        """Those of the pairs that were looked at which the selector does not know."""
        far = self.are_unlike(self.looked_at)
        return [pair for pair, is_far in zip(self.looked_at, far, strict=True) if is_far]

    def are_unlike(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """(N,) bool: which pairs are unlike the training data of the selector on a task that counts for them."""
        selector, table = self.sources.selector, self.sources.table
        place = {name: number for number, name in enumerate(table.checkpoint_ids)}
        counted = self.pool.counted(np.array([[place[name] for name in pair] for pair in pairs]))
        far: np.ndarray = np.zeros(len(pairs), dtype=bool)
        for number, task in enumerate(self.pool.tasks):
            if len(rows := np.flatnonzero(counted[:, number])):
                values = table.values_of([pairs[row] for row in rows], task, selector.columns)
                far[rows] |= selector.distances(both_orders(values, selector.columns)) > selector.novelty.limit
        return far


def read_sources(files: RankingFiles, catalogue: Catalogue, propagator: str) -> RankingSources:
    """Read what a ranking needs, from small to large. Raises InputError: an artifact is missing, or two do not fit each
    other."""
    if propagator in _FROM_PROBES and files.probes is None:
        raise ConfigError(f"propagator {propagator!r} runs the probes; give --probes, the directory of the signals'")
    directory = files.selector or default_selector()
    if not (directory / SHORTLIST).exists() and directory.exists():
        raise SelectorError(
            f"no selector of the shortlist at {directory / SHORTLIST}; `simmerge train` writes one with the selector: "
            "train again"
        )
    selector = read_selector(directory)
    shortlist = read_selector(directory / SHORTLIST)
    table = read_signal_table(files.signals)
    selector.check_weights(table)
    check_unchanged(catalogue, table)
    return RankingSources(
        shortlist if propagator == SecondOrder.name else selector, shortlist, table, catalogue.ids, catalogue.own_task,
        partial(_propagator, propagator, table, catalogue, files),
    )  # fmt: skip


def _propagator(name: str, table: SignalTable, catalogue: Catalogue, files: RankingFiles) -> Propagator:
    if name in _FROM_TABLE:
        return _FROM_TABLE[name](table)
    from simmerge_ray.signals.propagation.evidence import read_evidence, stored_evidence
    from simmerge_ray.signals.propagation.table import PROPAGATORS
    from simmerge_ray.signals.signature import SignatureStore

    store = SignatureStore(files.signatures or files.signals.parent / "signatures")
    if files.probes is None:
        return PROPAGATORS[name](stored_evidence(table, catalogue, store))
    from simmerge_ray.checkpoints.probes import load_probe_sets

    return PROPAGATORS[name](read_evidence(table, catalogue, load_probe_sets(files.probes), store))


def check_unchanged(catalogue: Catalogue, table: SignalTable, ids: Sequence[str] | None = None) -> None:
    """Refuse a table of other checkpoints, or of other contents under their names. ids: whom to look at; None takes
    the whole catalogue. Raises PlanError: naming a checkpoint. ConfigError: the table does not say of which it is."""
    known = table.provenance.get("checkpoints")
    if not isinstance(known, dict):
        raise ConfigError("the signal table does not say of which checkpoints it is; compute it again")
    refs = catalogue.all_refs if ids is None else [catalogue.ref(name) for name in ids]
    for ref in refs:
        if ref.id not in known:
            raise PlanError(f"checkpoint {ref.id!r} is not in the signal table; `simmerge signals` on this catalogue")
    for ref in refs:
        if known[ref.id] != cached_digest(ref):
            raise PlanError(f"checkpoint {ref.id!r} has changed since its signals; run `simmerge signals` again")


def on_fixed_tasks(config: RankingConfig, catalogue: Catalogue) -> RankingConfig:
    """The same ranking on one set of tasks for all plans: those named, those of the objective, or all own tasks.

    Measured merges are compared with each other and with checkpoints, so each cannot count on its members' own tasks.
    Raises ConfigError: no checkpoint has a task of its own."""
    if config.tasks or config.objective not in (MEAN, WORST):
        return config
    own = sorted({name for name in catalogue.own_task.values() if name})
    if not own:
        raise ConfigError("the checkpoints of the catalogue have no 'task'; name the tasks that count with --task")
    return config.model_copy(update={"tasks": tuple(own)})
