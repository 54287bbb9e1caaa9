"""Probed signals of any plan: merged in memory, one forward pass over the members' own answers, no label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.finding.utilities import Bench, plan_key
from simmerge_ray.checkpoints.probes import general_probe_set
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.signals.candidates.answers import (
    Answers,
    AnswerSpec,
    answer_logits,
    join_answers,
    kept_log_probabilities,
    kept_tokens,
    write_answers,
)
from simmerge_ray.signals.candidates.scores import AnswerScores, join_scores, score_answers
from simmerge_ray.signals.candidates.virtual import KeptAnswers

_BATCH_SIZE, _MAX_TOKENS = 16, 256  # as signatures have them
Kept = tuple[np.ndarray, np.ndarray]  # log-probabilities (S, K) of kept tokens, and (S,) of all others
SIGNALS = {"retention": 1.0, "kl": -1.0, "nll": -1.0, "entropy": -1.0}  # with the sign of what is better


@dataclass(frozen=True)
class OwnAnswers:
    """One member's answers, the tokens kept at their positions, and its own log-probabilities, by micro-batch."""

    answers: Answers
    kept: tuple[np.ndarray, ...]
    own: tuple[Kept, ...]


class Probing:
    """Scores of plans on members' answers, kept by (plan, member, probes).

    Args:
        general: whether members answer the shipped general probes instead of those of their task.
    """

    def __init__(self, bench: Bench, general: bool = False) -> None:
        self._bench, self._general = bench, general
        self._kept = bench.kept("probed-general" if general else "probed")
        self._answers: dict[str, OwnAnswers] = {}
        self._spec = AnswerSpec()

    def answers(self, member: str) -> OwnAnswers:
        """Written once; the live model then holds the base."""
        if member not in self._answers:
            bench = self._bench
            probes = general_probe_set() if self._general else bench.probes[bench.task_of(member)]
            batches = probes.token_batches(bench.tokenizer, _BATCH_SIZE, _MAX_TOKENS)
            model = bench.live.put_plan(MergePlan(source=member))
            written = [write_answers(model, batch, bench.live.ends, self._spec.max_tokens) for batch in batches]
            answers = join_answers(batches, written, probes.task)
            own = self._logits(MergePlan(source=member), answers)
            assert bench.catalogue.base is not None
            base = self._logits(MergePlan(source=bench.catalogue.base.id), answers)
            pairs = zip(own, base, strict=True)
            kept = tuple(kept_tokens(mine, of_base, self._spec.num_kept) for mine, of_base in pairs)
            likely = tuple(kept_log_probabilities(*both) for both in zip(own, kept, strict=True))
            self._answers[member] = OwnAnswers(answers, kept, likely)
        return self._answers[member]

    def scores(self, plan: MergePlan, member: str) -> AnswerScores:
        """Of every answer of a member, in the probes' order."""

        def probe() -> dict[str, list[float]]:
            found = self._probe(plan, self.answers(member))
            return {
                "kept": found.kept.astype(int).tolist(),
                **{name: np.round(getattr(found, name), 6).tolist() for name in ("nll", "kl", "entropy")},
                "num_tokens": found.num_tokens.tolist(),
            }

        value = self._kept.of(f"{plan_key(plan)} {member}", probe)
        floats = (np.array(value[name], dtype=np.float64) for name in ("nll", "kl", "entropy"))
        return AnswerScores(np.array(value["kept"], dtype=bool), *floats, np.array(value["num_tokens"]))

    def means(self, plan: MergePlan, members: Sequence[str], num_probes: int | None = None) -> dict[str, float]:
        """Every signal, a mean over members, of the first probes of each."""
        each = [first_scores(self.scores(plan, member), num_probes) for member in members]
        return {
            "retention": float(np.mean([one.retention for one in each])),
            "kl": float(np.mean([one.mean_kl for one in each])),
            "nll": float(np.mean([one.mean_nll for one in each])),
            "entropy": float(np.mean([one.mean_entropy for one in each])),
        }

    def kept_of(self, member: str, ids: Sequence[str], plan: MergePlan) -> tuple[KeptAnswers, Kept]:
        """What signatures of some checkpoints hold of a member's answers, and the log-probabilities of a plan there."""
        own, base = self.answers(member), self._bench.catalogue.base
        assert base is not None

        def at(source: MergePlan) -> Kept:
            logits = self._logits(source, own.answers)
            parts = [kept_log_probabilities(one, kept) for one, kept in zip(logits, own.kept, strict=True)]
            return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

        likely, rest = (np.stack(part) for part in zip(*(at(MergePlan(source=one)) for one in ids), strict=True))
        of_base = at(MergePlan(source=base.id))
        return KeptAnswers(tuple(ids), likely, rest, *of_base, member, own.answers.answer), at(plan)

    @torch.no_grad()
    def _logits(self, plan: MergePlan, answers: Answers) -> list[torch.Tensor]:
        model = self._bench.live.put_plan(plan)
        return [answer_logits(model, batch) for batch in answers.batches]

    def _probe(self, plan: MergePlan, own: OwnAnswers) -> AnswerScores:
        parts = []
        for logits, batch, kept, of_own in zip(
            self._logits(plan, own.answers), own.answers.batches, own.kept, own.own, strict=True
        ):
            best = (logits.argmax(-1) == batch.tokens).numpy()
            parts.append(score_answers(*kept_log_probabilities(logits, kept), best, *of_own, batch.answer.numpy()))
        return join_scores(parts)


def first_scores(scores: AnswerScores, num_probes: int | None) -> AnswerScores:
    """Of the first probes only."""
    if num_probes is None:
        return scores
    return AnswerScores(
        scores.kept[:num_probes],
        scores.nll[:num_probes],
        scores.kl[:num_probes],
        scores.entropy[:num_probes],
        scores.num_tokens[:num_probes],
    )
