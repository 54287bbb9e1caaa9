"""The service without HTTP: decides by a selector and a bandit, and keeps what it acknowledged in the event log.

One `Learner` is one replica. It has no state of its own that matters: before every decision it folds the tail of the
log (requests that arrive while the log is read or written share the next read), and a decision or reward is
acknowledged when its transaction is committed. Pairs are decided in the log's own thread (see `follower`); plans are
ranked in another, which also serves the dashboard's reads.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from simmerge_ray.base.config import ServiceConfig
from simmerge_ray.base.errors import SimmergeError, StoreError
from simmerge_ray.base.storage import Place
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.selector.data.orders import heads_of
from simmerge_ray.service import answers, deciding, schemas
from simmerge_ray.service.context import Contexts
from simmerge_ray.service.follower import Follower
from simmerge_ray.service.log.events import DecisionClosed, DecisionMade, Discounted, RewardGiven, RewardVoided
from simmerge_ray.service.log.fold import EXPIRED, View
from simmerge_ray.service.log.ledger import answer_of, decision_record, former_versions, recent_decisions
from simmerge_ray.service.log.outcomes import Status
from simmerge_ray.service.metrics import PrometheusMetrics
from simmerge_ray.service.planning import PlanRanker, plan_prediction
from simmerge_ray.service.recipe_schemas import RecipesRequest, RetentionRanking
from simmerge_ray.service.registry import Published, Registry
from simmerge_ray.service.retention import RetentionCurve, RetentionRanker
from simmerge_ray.service.schemas import Refused
from simmerge_ray.signals.table import SignalTable, read_signal_table

_log = logging.getLogger("simmerge.service")
_RETRY_S = 5.0  # between attempts of what runs in the background
_EXPIRE_S = 30.0
_MAX_EXPIRED = 1000  # closed in one go
T = TypeVar("T")


class Learner:
    """See the module. `start` it in the event loop that it serves in, and `stop` it there.

    clock: seconds since 1970.

    Raises InputError: the signal table, the catalogue, the probes or the selector cannot be read, or do not fit each
    other.
    """

    def __init__(self, settings: ServiceConfig, clock: Callable[[], float] = time.time) -> None:
        self.settings, self._clock = settings, clock
        self.observer = PrometheusMetrics()
        self.registry = Registry(settings.registry)
        self._table: SignalTable = read_signal_table(settings.signals)
        self._catalogue: Catalogue | None = load_catalogue(settings.catalogue) if settings.catalogue else None
        self._given = self.registry.publish(settings.selector) if settings.selector else None
        if self._given is not None:
            first = self.registry.load(self._given)
            first.selector.check_table(self._table)
            Contexts(first, self._table)  # it raises for a selector without an encoder
        self._follower = Follower(settings, self.registry, self._table, self._given, clock)
        self._policies = deciding.PolicyCache(settings.floor)
        self._rankers: dict[str, PlanRanker] = {}
        probe_sets = load_probe_sets(settings.probes) if settings.probes else None
        self._retention = RetentionRanker(self._table, self._catalogue, probe_sets, settings.signature_store)
        self._others = ThreadPoolExecutor(1, "simmerge-read")
        self._background: list[asyncio.Task[None]] = []
        # Seeded by the system once. To ask it for every id gives the interpreter lock away, and waits to have it back.
        self._ids = random.Random()

    async def start(self) -> None:
        """Start serving. If the database is unreachable, each request tries it again."""
        try:
            await self.ready()
        except StoreError as error:
            _log.warning("the event log is not ready: %s", error)
        self._background = [asyncio.create_task(self._close_expired()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Commit what was accepted, and end all threads."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._others.shutdown(wait=True)
        await self._follower.stop()

    async def ready(self) -> int:
        """Number of the last event that was folded. Raises StoreError: not ready, and why."""
        view = await self._follower.view()
        self.registry.load(view.model_version or "")
        return view.seq

    # Calls that change the log.

    async def decide(self, request: schemas.DecisionRequest, key: str | None = None) -> tuple[int, schemas.Decision]:
        """Status 201 or 200 (a retry with the same key), and what was decided the first time.
        Raises InputError, Refused (409), StoreError.
        """
        decision_id = f"{self._ids.getrandbits(128):032x}"
        payload = request.model_dump(mode="json")
        told: list[schemas.Decision] = []
        if request.checkpoints is None:

            def make(view: View) -> DecisionMade:
                event, answer = self._decide_pair(view, request, decision_id)
                told.append(answer)
                return event

            outcome = await (await self._follower.opened()).append_made(make, key, payload)
        else:
            view = await self._follower.view()
            event, answer = await self._in_other(lambda: self._decide_plan(view, request, decision_id))
            told.append(answer)
            outcome = await self._follower.append(event, key, payload)
        row = answers.accepted(outcome)
        decision = told[0] if outcome.status == Status.CREATED else answer_of(row)
        if outcome.status == Status.CREATED:
            self.observer.decided(decision)
        return int(outcome.status), decision

    async def reward(
        self, decision_id: str, request: schemas.RewardRequest, key: str | None = None
    ) -> tuple[int, schemas.RewardAnswer]:
        """Raises Refused (404, 409, 410, 422), StoreError."""
        outcome = await self._follower.append(RewardGiven(decision_id, request.utility), key)
        self.observer.rewarded(outcome.status.name.lower())
        return answers.reward_answer(decision_id, outcome, utility=request.utility)

    async def void(
        self, decision_id: str, request: schemas.ReasonRequest, key: str | None = None
    ) -> tuple[int, schemas.RewardAnswer]:
        """Take a reward back. Raises Refused, StoreError."""
        outcome = await self._follower.append(RewardVoided(decision_id, request.reason), key)
        return answers.reward_answer(decision_id, outcome, reason=request.reason)

    async def close(
        self, decision_id: str, request: schemas.ReasonRequest, key: str | None = None
    ) -> tuple[int, schemas.RewardAnswer]:
        """No reward will come. Raises Refused, StoreError."""
        outcome = await self._follower.append(DecisionClosed(decision_id, request.reason), key)
        return answers.reward_answer(decision_id, outcome, reason=request.reason)

    async def add_arm(self, request: schemas.ArmRequest, key: str | None = None) -> tuple[int, schemas.EventSummary]:
        """Add an arm with an uninformative prior or a sibling's. Raises InputError, Refused."""
        view = await self._follower.view()
        arm, log = deciding.start_of(request, view), await self._follower.opened()
        # An arm that a request added is left to the log, which tells a retry from a conflict.
        if arm.arm in view.posteriors and not await self._in_other(lambda: log.history(arm.arm)):
            raise Refused(409, f"arm {arm.arm!r} exists already")
        return answers.event_summary(await self._follower.append(arm, key, request.model_dump(mode="json")))

    async def discount(
        self, request: schemas.DiscountRequest, key: str | None = None
    ) -> tuple[int, schemas.EventSummary]:
        """Give past observations less weight. Raises Refused, StoreError."""
        return answers.event_summary(await self._follower.append(Discounted(request.factor, request.reason), key))

    async def publish(self, selector: Place, only_new: bool = False) -> str:
        """Let another selector answer from now on, here and on every replica; its version.

        Nothing happens where it is in force already. A long log is folded anew for it, which this waits for; decisions
        and rewards go on meanwhile, by the former selector.

        only_new: do nothing if it was ever in force, so that an option of the start undoes no later promotion.

        Raises InputError: it cannot be read, or does not fit the signal table. StoreError.
        """
        version = await self._in_other(lambda: self.registry.publish(selector))
        log = await self._follower.opened()
        while True:
            view = await self._follower.settled()
            if version == view.model_version:
                return version
            if only_new and version in await self._in_other(lambda: former_versions(log)):
                _log.warning("selector %s was replaced by %s, which stays in force", version, view.model_version)
                return version
            published = self.registry.load(version)
            published.selector.check_table(self._table)
            event = deciding.new_epoch_of(Contexts(published, self._table), view)
            outcome = await self._follower.append(event, f"publish-{version}-{view.epoch}")
            now = await self._follower.settled()
            if outcome.status in (Status.CREATED, Status.REPLAYED):
                return version
            if view.epoch == now.epoch:  # else another one was published meanwhile
                raise Refused(409, outcome.reason)

    # Read-only calls.

    async def get(self, decision_id: str) -> schemas.DecisionRecord:
        """Raises Refused (404), StoreError."""
        log = await self._follower.opened()
        return await self._in_other(lambda: decision_record(log, decision_id, self._clock()))

    async def recent(self, limit: int = 50, before: int | None = None) -> schemas.DecisionList:
        """Decisions, newest first. Raises StoreError."""
        log = await self._follower.opened()
        return await self._in_other(lambda: recent_decisions(log, limit, before, self._clock()))

    async def policy(self) -> schemas.PolicyAnswer:
        """The state of the policy and its performance so far. Raises StoreError."""
        view = await self._follower.view()
        published, ledger = self._follower.published(view), await self._follower.ledger()
        (regret, alarm), context = await self._in_other(lambda: (ledger.regret(), ledger.mean_context(view.epoch)))
        noise_sd = math.sqrt(deciding.noise_of(view).variance)
        return schemas.PolicyAnswer(
            namespace=self.settings.namespace,
            epoch=view.epoch,
            seq=view.seq,
            model_version=published.version,
            noise_sd=noise_sd,
            num_decisions=view.num_decisions,
            num_rewards=view.num_rewards,
            num_closed=view.num_closed,
            num_open=view.num_open,
            safe=answers.safe_policy(published),
            floor=self.settings.floor,
            arms=[answers.arm_state(arm, one, context, noise_sd) for arm, one in view.posteriors.items()],
            regret=regret,
            alarm=alarm,
        )

    async def curve(self, points: int = 300) -> schemas.CurveAnswer:
        """Cumulative reward beside the best fixed arm. Raises StoreError."""
        ledger = await self._follower.ledger()
        return await self._in_other(lambda: ledger.curve(points))

    async def catalogue(self) -> schemas.CatalogueAnswer:
        """What may be asked for. Without a database it lists the arms of the configured selector."""
        try:
            view = await self._follower.view()
            arms, published = list(view.posteriors), self._follower.published(view)
        except StoreError:
            if self._given is None:
                raise
            published = self.registry.load(self._given)
            arms = list(heads_of(published.selector.arms))
        return answers.catalogue_answer(self._table, published, arms)

    async def signals(
        self, signal: str, task: str | None = None, part: str = "", offset: int = 0, limit: int = 200
    ) -> schemas.SignalMatrix:
        """A signal of all pairs of some checkpoints, see `answers.signal_matrix`. Raises Refused (404)."""
        return await self._in_other(lambda: answers.signal_matrix(self._table, signal, task, part, offset, limit))

    async def rank(self, request: schemas.RankRequest) -> schemas.Ranked:
        """All arms for a pair, without a decision. Raises InputError, StoreError."""
        view = await self._follower.view()
        return deciding.ranked(self._follower.contexts_of(view), view, request)

    async def plans(self, request: schemas.PlansRequest) -> schemas.PlansAnswer:
        """The best plans, without a decision. Raises InputError, StoreError."""
        published = self._follower.published(await self._follower.view())
        return await self._in_other(lambda: self._rank_plans(published, request))

    async def best_recipes(self, request: schemas.PlansRequest) -> RetentionRanking:
        """The best recipes by what they keep of their members. Raises Refused (409), InputError, StoreError."""
        return await self._in_other(lambda: self._retention.best(request))

    async def score_recipes(self, request: RecipesRequest) -> RetentionRanking:
        """What recipes keep of their members. Raises Refused (409), InputError, StoreError."""
        return await self._in_other(lambda: self._retention.scored(request))

    async def retention_curve(self, left: str, right: str, scale: float) -> RetentionCurve:
        """What is kept along the line between two checkpoints. Raises Refused (409), InputError, StoreError."""
        return await self._in_other(lambda: self._retention.curve(left, right, scale))

    @property
    def answering(self) -> tuple[str, ...]:
        """Ids of the checkpoints whose own answers may be asked for."""
        return self._retention.checkpoints

    # Internals.

    def _decide_pair(
        self, view: View, request: schemas.DecisionRequest, decision_id: str
    ) -> tuple[DecisionMade, schemas.Decision]:
        """In the log's thread."""
        assert request.left is not None and request.right is not None
        contexts = self._follower.contexts_of(view)
        context = contexts.of(request.left, request.right, request.task)
        policy = self._policies.of(view, contexts.published.selector, context.novel)
        return deciding.pair_decision(view, contexts, policy, context, self._asked(request, decision_id))

    def _decide_plan(
        self, view: View, request: schemas.DecisionRequest, decision_id: str
    ) -> tuple[DecisionMade, schemas.Decision]:
        contexts, asked = self._follower.contexts_of(view), self._asked(request, decision_id)
        drawn = self._ranker(contexts.published).draw(request, decision_id, self.settings.floor)
        return deciding.plan_decision(view, contexts, drawn, request, asked)

    def _rank_plans(self, published: Published, request: schemas.PlansRequest) -> schemas.PlansAnswer:
        ranking = self._ranker(published).rank(request, request.top)
        plans: list[schemas.PlanPrediction] = [plan_prediction(one) for one in ranking.plans]
        return schemas.PlansAnswer(plans=plans, num_considered=ranking.num_scored, exhaustive=ranking.width is None)

    def _ranker(self, published: Published) -> PlanRanker:
        """One for each version; in the thread of `_others` alone."""
        if published.version not in self._rankers:
            signatures = self.settings.signature_store
            self._rankers = {published.version: PlanRanker(published, self._table, self._catalogue, signatures)}
        return self._rankers[published.version]

    def _asked(self, request: schemas.DecisionRequest, decision_id: str) -> deciding.Asked:
        seconds = request.ttl_seconds if request.ttl_seconds is not None else self.settings.ttl_seconds
        return deciding.Asked(decision_id, request.explore, None if seconds is None else self._clock() + seconds)

    async def _in_other(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._others, call)

    async def _close_expired(self) -> None:
        """Close expired decisions in the log; another replica may be first."""
        while True:
            await asyncio.sleep(_EXPIRE_S)
            try:
                over = (await self._follower.expired())[:_MAX_EXPIRED]
                await asyncio.gather(*(self._follower.append(DecisionClosed(one, EXPIRED), None) for one in over))
            except (SimmergeError, OSError) as error:
                _log.warning("expired decisions are not closed: %s", error)

    async def _watch(self) -> None:
        """Report the state to the observer."""
        while True:
            try:
                view = await self._follower.view()
                noise_sd = math.sqrt(deciding.noise_of(view).variance)
                entropies = {arm: answers.entropy(one, noise_sd) for arm, one in view.posteriors.items()}
                self.observer.state(view, entropies)
            except (SimmergeError, OSError) as error:
                _log.warning("the state is not known: %s", error)
            await asyncio.sleep(_RETRY_S)
