"""A choice without labels, as `simmerge auto` makes it, beside merges that are measured on the same engines.

Every part is the one of the real run: what signal actors compute comes from the same queue, the rounds over probes from
the same rule, and candidates are trials of a search. Derived from the unit costs, with S parameters, M members, P
probes each and L + A tokens of a probe with its answer:

- answers: every member writes its own (2 S (L + A) FLOPs a probe; on a GPU also A times the weights' bytes for each
  micro-batch) and is run over them, and so is the base;
- passes: every checkpoint over every member's answers, 2 S P (L + A) FLOPs for each of M (M + 1);
- ranking: recipes x M P A positions x (kept tokens + the rest) mixed log-probabilities;
- a candidate: a trial whose evaluation reads M P (L + A) prompt tokens and generates nothing;
- a step of tuning: 6 S M P (L + A) FLOPs forward and backward, 8 where layers are computed twice, and the members'
  weights read to set the model's and for the gradient of their coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.finding import FEW_MEMBERS, first_round, shortlist_of
from simmerge_ray.capacity.placement import USABLE, how_many_fit, signal_worker_needs
from simmerge_ray.capacity.simulation.costs import Gpu, UnitCosts
from simmerge_ray.capacity.simulation.labels import Engines, Merge, generation_seconds, place_engines, simulate_trials
from simmerge_ray.capacity.simulation.signals import Placed, SignalSimulation
from simmerge_ray.capacity.simulation.workers import Node, Phase, Worker, drain, make_workers
from simmerge_ray.capacity.simulation.workload import Pool, Workload, make_pool
from simmerge_ray.capacity.size import ModelSize
from simmerge_ray.checkpoints.size import model_shape
from simmerge_ray.merging.write.tensors import MAX_THREADS
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.search.estimate import PROCESS_BYTES
from simmerge_ray.signals.queue import Unit, WorkQueue
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.stages import LayerRange
from simmerge_ray.signals.tuning.memory import are_recomputed, rows_of, tuning_bytes

_KEPT = 32 + 1  # log-probabilities of a position in a signature: `AnswerSpec.num_kept`, and the rest
_FORWARD, _STEP, _RECOMPUTED = 1.0, 3.0, 4.0  # of 2 S FLOPs a token
_SUM = make_arm("task_arithmetic")

Ran = tuple[Sequence[Worker], int, float]
"""Workers of a part, its units, and when the last one ended."""


@dataclass(frozen=True)
class ChoiceWork:
    """What `simmerge auto` is asked for; the defaults are its own.

    answer_tokens: the longest answer to a probe. recipes: scored from signatures. shortlist: of them run over probes.
    tuned, steps: merges tuned, and by how many steps of gradient; no tuning with 0. adapters: members are LoRA adapters
    of the base, whose task vectors take no memory. most: members of a merge.
    """

    answer_tokens: int = 16
    recipes: int = 10_000
    shortlist: int = shortlist_of(6)  # of six members or more
    tuned: int = 1
    steps: int = 12
    adapters: bool = False
    most: int = 4


@dataclass(frozen=True)
class Holders:
    """Workers of a node that hold what they run whole, in float32. gpu: of each; None for a core of the CPU."""

    held_bytes: float
    per_node: int
    gpu: Gpu | None

    def seconds(self, model: ModelSize, tokens: float, costs: UnitCosts, passes: float = _FORWARD) -> float:
        """Of so many tokens through a model. passes: 1 for forward, 3 for forward and backward."""
        flops = 2 * model.parameters * tokens * passes
        if self.gpu is None:
            return flops / costs.of("core_flops")
        return flops / (1e12 * self.gpu.tflops32 * costs.assumed.prefill_utilisation)

    def reading(self, num_bytes: float, costs: UnitCosts) -> float:
        """Seconds to read bytes of weights from a GPU's memory; on the CPU they are hidden behind the arithmetic."""
        if self.gpu is None:
            return 0.0
        return num_bytes / (1e12 * self.gpu.tbytes_per_s * costs.assumed.decode_utilisation)


def place_whole(held: float, pool: Pool, costs: UnitCosts) -> Holders | None:
    """Workers on a GPU each, or, where none has the memory, on a core each; None where no node has it either. held:
    bytes of weights and activations."""
    gpus = int(pool.resources["GPU"])
    if gpus and held <= USABLE * 1e9 * pool.gpu_gb:
        return Holders(held, gpus, costs.assumed.gpus[pool.gpu_gb])
    held += PROCESS_BYTES["transformers"]
    fit = how_many_fit(signal_worker_needs(held, 0.0), {kind: pool.resources[kind] for kind in ("CPU", "memory")})
    return Holders(held, fit, None) if fit else None


@dataclass(frozen=True)
class SimulatedChoice:
    """The parts of a choice. measured: by the number of merges that are measured, the parts of that instead.

    tuner: None where no node holds a tuning, or none is asked for. tuning_bytes: of one.
    """

    holders: Holders
    tuner: Holders | None
    tuning_bytes: float
    engines: Engines
    pool: Pool
    head: Pool
    phases: tuple[Phase, ...]
    measured: Mapping[int, tuple[Phase, ...]]

    @staticmethod
    def seconds(phases: Sequence[Phase]) -> float:
        return sum(phase.seconds for phase in phases)

    def node_hours(self, phases: Sequence[Phase]) -> float:
        """Of the nodes that have work in each part, idle minutes left out."""
        used = ((min(self.pool.nodes, phase.workers), phase) for phase in phases if phase.place == "engines")
        return sum(nodes * phase.seconds for nodes, phase in used) / 3600

    def dollars(self, phases: Sequence[Phase]) -> float:
        """Node hours times the list price, and the head as long as it takes."""
        return self.node_hours(phases) * self.pool.dollars + self.seconds(phases) / 3600 * self.head.dollars


class ChoiceSimulation:
    """A choice among merges of a workload's models, every one of them the owner of answers to its own probes.

    Args:
        pool: nodes for all parts. head: where the driver runs, which ranks recipes and writes the merge.

    Raises:
        ConfigError: no node holds an engine, or a model whole in float32.
    """

    def __init__(self, workload: Workload, work: ChoiceWork, pool: Pool, head: Pool, costs: UnitCosts) -> None:
        self._workload, self._work, self._pool, self._head, self._costs = workload, work, pool, head, costs
        self._model = workload.model
        held = 4 * self._model.parameters + self._model.working_bytes
        holders = place_whole(held, pool, costs)
        if holders is None:
            raise ConfigError(f"a model whole in float32, {held / 1e9:.0f} GB, fits no node of {pool.machine}")
        self._holders = holders
        self._engines = place_engines(self._model, pool.resources, pool.gpu_gb, 1.0)
        self._whole = LayerRange(0, self._model.layers, self._model.layers)
        self._nodes = pool.make_nodes(costs, 4096)
        self._cores = int(pool.resources["CPU"])
        placed = Placed((self._whole,), holders.held_bytes, holders.per_node)
        self._signals = SignalSimulation(workload, placed, self._nodes, self._cores, costs)
        self._members = self._signals.names[1:]
        spec = SignatureSpec()
        self._batches = math.ceil(workload.probes / spec.batch_size)
        self._width = workload.probe_tokens + work.answer_tokens
        self._tuning_bytes = self._bytes_of_tuning()
        self._tuner = place_whole(self._tuning_bytes, pool, costs) if work.steps and work.tuned else None

    def run(self, evaluations: Sequence[int] = ()) -> SimulatedChoice:
        """Simulate. evaluations: numbers of merges that are measured instead."""
        digests = self._on_workers("digests", self._signals.digests)
        phases = [
            digests,
            self._on_workers("answers", self._answers),
            self._on_workers("passes", self._passes),
            self._on_workers("average", self._average),
            self._on_workers("weight samples", self._samples),
            self._ranking(),
            *self._probing(),
            *self._tuning(),
            self._writing(),
        ]
        measured = {count: (digests, self._measuring(count), self._writing()) for count in evaluations}
        return SimulatedChoice(self._holders, self._tuner, self._tuning_bytes, self._engines, self._pool, self._head,
                      tuple(phases), measured)  # fmt: skip

    def _bytes_of_tuning(self) -> float:
        model, width = self._model, math.ceil(self._width)
        dense = 0 if self._work.adapters else len(self._members)
        shape, largest = model_shape(model.config), max(model.tensors.values())
        rows = min(self._workload.probes, rows_of(shape, width, self._work.answer_tokens))
        self._recomputed = are_recomputed(shape, (rows, width))
        return tuning_bytes(model.parameters, largest, dense, shape, (rows, width), self._work.answer_tokens)

    @property
    def _sum(self) -> tuple[str, ...]:
        """What a sum of task vectors reads: the base and as many members as a merge has at the most."""
        return ("base", *self._members[: self._work.most])

    def _on_workers(self, name: str, part: Callable[[float], Ran]) -> Phase:
        before = sum(node.network_bytes for node in self._nodes)
        for node in self._nodes:
            node.begin()
        workers, units, end = part(0.0)
        network = sum(node.network_bytes for node in self._nodes) - before
        return Phase.of(name, "engines", workers[: max(1, units)], units, end, network)

    def _drained(self, queue: WorkQueue, passes: Mapping[str, float], start: float) -> float:
        """When all units have ended. passes: forward passes by the kind of unit; one that writes answers also reads the
        weights for every token."""
        tokens = self._workload.probes * self._width / self._batches
        for worker in self._signals.workers:  # every queue has actors of its own
            worker.held = None

        def work(worker: Worker, unit: Unit, at: float) -> float:
            assert unit.checkpoint is not None
            took = self._signals.load(worker, unit.checkpoint, self._whole, at)
            seconds = self._holders.seconds(self._model, passes[unit.kind] * tokens, self._costs)
            if unit.kind == "answers":
                seconds += self._holders.reading(4 * self._model.parameters * self._work.answer_tokens, self._costs)
            return took + worker.spend(arithmetic=seconds)

        return drain(queue, self._signals.workers, work, start=start)

    def _answers(self, start: float) -> Ran:
        """Members write and are run over what they wrote; then the base is."""
        batches = range(self._batches)
        own = WorkQueue(Unit("answers", name, (batch,)) for name in self._members for batch in batches)
        of_base = WorkQueue(Unit("likeliest", "base", (name, batch)) for name in self._members for batch in batches)
        written = self._drained(own, {"answers": 2 * _FORWARD}, start)
        end = self._drained(of_base, {"likeliest": _FORWARD}, written)
        return self._signals.workers, len(own) + len(of_base), end

    def _passes(self, start: float) -> Ran:
        queue = WorkQueue(
            Unit("kept", name, (owner, batch))
            for name in self._signals.names
            for owner in self._members
            for batch in range(self._batches)
        )
        return self._signals.workers, len(queue), self._drained(queue, {"kept": _FORWARD}, start)

    def _average(self, start: float) -> Ran:
        """The plain average of some members, made by one worker and run over all answers."""
        tokens = self._workload.probes * self._width * len(self._members)

        def work(worker: Worker, unit: Unit, at: float) -> float:
            took = 0.0
            for name in self._sum:
                took += self._signals.load(worker, name, self._whole, at + took)
            return took + worker.spend(arithmetic=self._holders.seconds(self._model, _FORWARD * tokens, self._costs))

        queue = WorkQueue([Unit("kept of merge", self._members[0], ())])
        return self._signals.workers, 1, drain(queue, self._signals.workers, work, start=start)

    def _samples(self, start: float) -> Ran:
        groups = range(len(self._signals.groups))
        queue = WorkQueue(Unit("sample", name, (group,)) for name in self._signals.names for group in groups)

        def work(worker: Worker, unit: Unit, at: float) -> float:
            assert unit.checkpoint is not None
            return self._signals.sample(worker, unit.checkpoint, unit.payload[0], at)

        return self._signals.workers, len(queue), drain(queue, self._signals.workers, work, start=start)

    def _ranking(self) -> Phase:
        """On the driver, a thread for each member's answers."""
        members, work = len(self._members), self._work
        values = work.recipes * members * self._workload.probes * work.answer_tokens * _KEPT
        each = (self._costs.of("mixed_ns") + members * self._costs.of("mixed_member_ns")) * 1e-9
        seconds = values * each / min(members, int(self._head.resources["CPU"]))
        return Phase("ranking", "driver", 1, work.recipes, seconds, 0.0, {"mixing log-probabilities": seconds})

    def _reading_probes(self, probes: float) -> float:
        """Seconds of an engine for so many probes of every member, with their answers."""
        as_prompts = replace(self._workload, prompt_tokens=self._width, answer_tokens=0)
        return generation_seconds(as_prompts, self._engines, math.ceil(probes * len(self._members)), self._costs)

    def _trials(self, name: str, trials: Sequence[tuple[Merge, float]]) -> Phase:
        return simulate_trials(name, self._model, trials, self._engines, self._nodes, self._costs)

    def _probing(self) -> Iterator[Phase]:
        """All candidates on some probes, the best on all. What checkpoints keep is known by then, and what the average
        of few members keeps."""
        probes, shortlist = self._workload.probes, self._work.shortlist
        first, survivors = first_round(probes, shortlist)
        candidate = Merge(self._sum, _SUM, len(self._members))
        if first:
            yield self._trials("candidates, some probes", [(candidate, self._reading_probes(first))] * shortlist)
        average = [(candidate, self._reading_probes(probes))] * (len(self._members) > FEW_MEMBERS)
        rest = [(candidate, self._reading_probes(probes - first))] * survivors
        yield self._trials("candidates, all probes", [*average, *rest])

    def _tuning(self) -> Iterator[Phase]:
        """Answers of the members again, the steps, and the tuned merges over the probes."""
        tuner, work, model, costs = self._tuner, self._work, self._model, self._costs
        if tuner is None:
            return
        workers = make_workers(min(work.tuned, tuner.per_node * len(self._nodes)), self._nodes)
        tokens = len(self._members) * self._workload.probes * self._width
        step = tuner.seconds(model, tokens, costs, _RECOMPUTED if self._recomputed else _STEP)
        if tuner.gpu is None:
            weights = model.parameters * 2 * costs.merge_ns(_SUM, len(self._members)) * 1e-9
        else:
            weights = tuner.reading(4 * model.parameters * (3 * len(self._members) + 2), costs)
        queue = WorkQueue(Unit("tuning", None, (number,)) for number in range(work.tuned))

        def run(worker: Worker, unit: Unit, at: float) -> float:
            took = 0.0
            for name in self._signals.names:
                took += self._signals.load(worker, name, self._whole, at + took)
            own = tuner.seconds(model, 2 * tokens, costs)
            batches = self._batches * len(self._members)
            own += batches * tuner.reading(4 * model.parameters * work.answer_tokens, costs)
            return took + worker.spend(
                **{"arithmetic": own + work.steps * step, "setting weights": work.steps * weights}
            )

        yield self._on_workers("tuning", lambda start: (workers, len(queue), drain(queue, workers, run, start=start)))
        merge, probes = Merge(self._sum, _SUM, len(self._members)), self._workload.probes
        yield self._trials("tuned, all probes", [(merge, self._reading_probes(probes))] * work.tuned)

    def _writing(self) -> Phase:
        """By the driver: its link brings what is merged and takes the merge."""
        model, head = self._model, self._head
        threads = min(MAX_THREADS, int(head.resources["CPU"]))
        read = len(self._sum) * model.num_bytes
        causes = {
            "reading from the store": read / head.link,
            "merging": model.parameters * self._costs.merge_ns(_SUM, len(self._sum)) * 1e-9 / threads,
            "writing": model.num_bytes / head.link,
        }
        ordered = dict(sorted(causes.items(), key=lambda entry: -entry[1]))
        return Phase("merge written", "driver", 1, 1, sum(causes.values()), read + model.num_bytes, ordered)

    def _measuring(self, count: int) -> Phase:
        """So many merges on the items of all tasks, and every checkpoint as it is, which they must beat."""
        tasks = min(self._workload.tasks, len(self._members))
        seconds = generation_seconds(self._workload, self._engines, tasks * self._workload.items, self._costs)
        alone = [Merge((name,), None, tasks) for name in self._signals.names]
        trials = [*alone, *[Merge(self._sum, _SUM, tasks)] * count]
        nodes: Sequence[Node] = self._pool.make_nodes(self._costs, 4096)
        timed = [(one, seconds) for one in trials]
        return simulate_trials("measuring", self._model, timed, self._engines, nodes, self._costs)


def simulate_choice(
    workload: Workload,
    work: ChoiceWork,
    pool: Pool,
    costs: UnitCosts,
    head: str | None = None,
    evaluations: Sequence[int] = (1, 8, 20, 40),
) -> SimulatedChoice:
    """A choice on nodes of one kind. head: the driver's machine; None takes the costs' one of the same cloud.
    evaluations: numbers of measured merges to show beside it. Raises ConfigError: see `ChoiceSimulation`."""
    head_pool = make_pool(head or costs.head_beside(pool.machine), 1, costs)
    return ChoiceSimulation(workload, work, pool, head_pool, costs).run(evaluations)
