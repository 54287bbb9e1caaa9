"""Recipes scored from signatures: CPU nanoseconds of one log-probability that one recipe mixes, and recipes a second.

`python -m benchmarks.signals.mixtures`: made-up answers of 64 probes and 16 tokens with 32 kept tokens, all of one
member; a recipe of M members mixes (tokens of answers) x (kept tokens and the rest) log-probabilities of every member's
answers. One thread, CPU seconds, medians of 5.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from simmerge_ray.signals.candidates.virtual import KeptAnswers, VirtualAnswers

PROBES, TOKENS, KEPT, RECIPES, ROUNDS = 64, 16, 32, 200, 5


def made_up_answers(members: int, generator: np.random.Generator) -> VirtualAnswers:
    """Random log-probabilities of `members` checkpoints and their base at one member's answers."""
    logits = generator.normal(size=(members + 1, PROBES * TOKENS, KEPT + 1))
    values = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    likely, rest = values[..., :-1], values[..., -1]
    ids = tuple(f"m{number}" for number in range(members))
    answer = np.repeat(np.arange(PROBES), TOKENS)
    return VirtualAnswers(KeptAnswers(ids, likely[1:], rest[1:], likely[0], rest[0], ids[0], answer))


def main() -> None:
    generator = np.random.default_rng(0)
    print("| members | ns a log-probability | recipes/s, all members' answers |")
    print("|---|---|---|")
    for members in (2, 4, 8):
        mixtures, rows = made_up_answers(members, generator), generator.random((RECIPES, members))
        mixtures.scores(rows[:2])  # compiles
        seconds = []
        for _ in range(ROUNDS):
            start = time.thread_time()
            mixtures.scores(rows)
            seconds.append(time.thread_time() - start)
        each = statistics.median(seconds) / RECIPES
        print(f"| {members} | {1e9 * each / (PROBES * TOKENS * (KEPT + 1)):.2f} | {1 / (members * each):,.0f} |")


if __name__ == "__main__":
    main()
