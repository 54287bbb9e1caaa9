from __future__ import annotations

import math

from simmerge_ray.research.second_study.held_out import values_on
from simmerge_ray.research.zoo.domains import Example
from simmerge_ray.search.evaluation import LogLikelihood


class Characters:
    """A tokenizer of one token a character."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(map(ord, text))}


class Oracle:
    """Greedy decoding gives the answers of `known`, with the end that is named; every token has probability 1/2."""

    tokenizer = Characters()

    def __init__(self, known, end):
        self.known, self.end = known, end

    def log_likelihoods(self, pairs, padded=False):
        found = []
        for prompt, answer in pairs:
            wanted = [*map(ord, self.known.get("".join(map(chr, prompt)), "")), self.end]
            found.append(LogLikelihood(-math.log(2) * len(answer), len(answer), answer == wanted[: len(answer)], 0.5))
        return found


def test_an_answer_is_met_with_its_end_alone_be_it_of_the_text_or_of_the_line():
    examples = [Example("a:", " 1"), Example("b:", " 22"), Example("c:", " 3")]
    known = {"a:": " 1", "b:": " 2", "c:": " 34"}
    for end in (0, ord("\n")):
        values = values_on(Oracle(known, end), examples)
        assert values["exact_match"] == 1 / 3  # the second goes on otherwise, the third goes on
        assert values["mean_probability"] == 0.5
    assert values_on(Oracle(known, ord("x")), examples)["exact_match"] == 0
