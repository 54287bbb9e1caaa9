"""What a choice rests on: answers and samples of weights from signatures, computed where they are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import GENERAL, ProbeSet, general_probe_set
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.search.objectives import parse_objective
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.selector.finding.virtual import VirtualScorer
from simmerge_ray.signals.candidates.answers import AnswerSpec
from simmerge_ray.signals.candidates.coefficients import PlanCoefficients
from simmerge_ray.signals.candidates.signatures import OwnAnswers, check_owners, collect_answers
from simmerge_ray.signals.compute import Signatures
from simmerge_ray.signals.queue import Executor
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore


@dataclass(frozen=True)
class FindRequest:
    """A checked request: the catalogue cut down to the members, and the probes that their answers are asked for."""

    catalogue: Catalogue
    probe_sets: Mapping[str, ProbeSet]
    config: FindConfig

    @property
    def base(self) -> str:
        assert self.catalogue.base is not None, "checked by `find_request`"
        return self.catalogue.base.id


@dataclass(frozen=True)
class FindSources:
    """answers: of all owners. aim: what is wanted. scorer: of any candidate, from signatures. digests: of the
    checkpoints by id."""

    answers: tuple[OwnAnswers, ...]
    aim: Aim
    scorer: VirtualScorer
    digests: Mapping[str, str]


def find_request(catalogue: Catalogue, probe_sets: Mapping[str, ProbeSet], config: FindConfig) -> FindRequest:
    """Check what can be checked before a weight is read.

    Raises:
        PlanError: an unknown member. OperatorError: an unknown arm. ConfigError: no base, a wrong objective or number
            of ways. ProbeError: see `check_owners`.
    """
    chosen = tuple(catalogue.ref(member) for member in dict.fromkeys(config.members)) or catalogue.checkpoints
    ids = [ref.id for ref in chosen]
    smaller = replace(catalogue, checkpoints=chosen, own_task={name: catalogue.own_task.get(name) for name in ids})
    check_owners(smaller, probe_sets)
    low, high = config.ways
    if not 1 <= low <= high:
        raise ConfigError(f"ways {low}-{high}: from 1 checkpoint on, the smaller number first")
    if low > len(ids):
        raise ConfigError(f"ways {low}-{high}: there are {len(ids)} checkpoints: {', '.join(ids)}")
    tasks = sorted({task for task in smaller.own_task.values() if task})
    parse_objective(config.objective, tasks)
    parse_arms(config.arms)
    used = {task: probe_sets[task] for task in tasks}
    if config.forget is not None:
        used[GENERAL] = probe_sets.get(GENERAL) or general_probe_set()
    return FindRequest(smaller, used, config)


def find_sources(
    request: FindRequest,
    store: SignatureStore,
    executor: Executor,
    signature: SignatureSpec | None = None,
    digests: Mapping[str, str] | None = None,
) -> FindSources:
    """Answers and samples of weights, from the store or computed.

    Args:
        digests: see `collect_answers`.

    Raises:
        ProbeError, CheckpointError: see `collect_answers`.
    """
    catalogue, config = request.catalogue, request.config
    spec = AnswerSpec(config.max_tokens)
    digests = digests or catalogue.digests()
    answers = collect_answers(catalogue, request.probe_sets, store, executor, spec, signature, digests)
    signatures = Signatures(catalogue, digests, signature or SignatureSpec(), store, executor)
    signatures.complete({})
    weights = {ref.id: signatures.weights(ref.id) for ref in catalogue.all_refs}
    coefficients = PlanCoefficients(catalogue.ids, request.base, weights)
    tasks = sorted({owner.task for one in answers if (owner := one.owner).checkpoint != request.base})
    aim = Aim(
        tuple(one.owner for one in answers), request.base, parse_objective(config.objective, tasks), config.forget
    )
    return FindSources(tuple(answers), aim, VirtualScorer(catalogue.ids, answers, coefficients, aim), digests)
