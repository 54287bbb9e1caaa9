"""Our engine as lm-evaluation-harness's `LM`: its requests in, tokens cut where its own `hf` model cuts them.

Import this module only where lm_eval is installed; `simmerge_ray.search.evaluation.harness` does so when it needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS

from simmerge_ray.base.errors import TaskError
from simmerge_ray.search.evaluation.evaluator import Evaluator, TokenPair

# Names under which tasks give the number of tokens to generate, the first that is there counting.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# They shape a distribution that greedy decoding does not draw from.
_SAMPLING_ONLY = ("top_p", "top_k", "min_p", "seed")


class HarnessLM(LM):
    """An evaluator's model, with the weights that it holds, for `lm_eval.simple_evaluate` and our own `HarnessTask`.

    No chat template is applied and nothing is truncated.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__()
        self._evaluator = evaluator

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation after its context.

        Raises:
            TaskError: a request that does not fit the evaluator, or a continuation of no tokens.
        """
        pairs = encode_pairs([request.args for request in requests], self._evaluator.tokenizer)
        self._check([len(before) + len(after) + 1 for before, after in pairs])
        return [(one.total, one.is_greedy) for one in self._evaluator.log_likelihoods(pairs)]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Greedy answers, each cut before the first of its request's stop strings.

        Raises:
            TaskError: a request that asks for sampling or does not fit the evaluator.
        """
        tokenizer = self._evaluator.tokenizer
        prompts = encode_prompts([request.args[0] for request in requests], tokenizer)
        # lm_eval stops there also when a model spells it out.
        end = None if tokenizer.eos_token_id is None else str(tokenizer.decode(tokenizer.eos_token_id))
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(generation_settings(request.args[1]), []).append(index)
        self._check([len(prompts[index]) + key[0] for key, indices in groups.items() for index in indices])
        answers = [""] * len(requests)
        for (max_new_tokens, stop), indices in groups.items():
            stops = (*stop, *([end] if end and end not in stop else []))
            found = self._evaluator.generate([prompts[index] for index in indices], max_new_tokens, stops)
            for index, answer in zip(indices, found, strict=True):
                answers[index] = answer
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Perplexities of whole texts are no utilities per item; `load_harness_tasks` refuses such tasks."""
        raise NotImplementedError("loglikelihood_rolling is not supported")

    def _check(self, lengths: Sequence[int]) -> None:
        if lengths and max(lengths) > self._evaluator.max_model_len:
            raise TaskError(f"a request needs {max(lengths)} tokens, max_model_len is {self._evaluator.max_model_len}")


def generation_settings(settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """(tokens to generate at most, stop strings) of a task's `generation_kwargs`.

    Raises:
        TaskError: they ask for anything but greedy decoding.
    """
    rest = dict(settings)
    until = rest.pop("until", None) or []
    lengths = [value for name in _LENGTHS if (value := rest.pop(name, None)) is not None]
    do_sample, temperature = rest.pop("do_sample", None), float(rest.pop("temperature", None) or 0.0)
    if do_sample or (do_sample is None and temperature > 0):
        raise TaskError(f"answers are greedy, generation_kwargs ask for sampling: {dict(settings)}")
    if unknown := sorted(set(rest) - set(_SAMPLING_ONLY)):
        raise TaskError(f"generation_kwargs {unknown} are not supported; greedy decoding takes until and max_gen_toks")
    stops = [until] if isinstance(until, str) else list(until)
    return int(lengths[0] if lengths else DEFAULT_MAX_GEN_TOKS), tuple(stop for stop in stops if stop)


def encode_prompts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts, with the tokenizer's special tokens where a text does not begin with them already."""
    return _encode(texts, tokenizer, getattr(tokenizer, "bos_token", None))


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[TokenPair]:
    """Token ids of contexts and of the continuations after them, cut from those of the whole text.

    White space at the end of a context goes to the continuation. An empty context is the beginning-of-text token, or
    the end-of-text token of a tokenizer without one.

    Raises:
        TaskError: a continuation of no tokens, or an empty context and a tokenizer with neither token.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    kept = [context.rstrip() for context, _ in pairs]
    moved = [context[len(short) :] + after for (context, after), short in zip(pairs, kept, strict=True)]
    begin = None if prefix is None else tokenizer.decode(prefix)
    contexts = list(dict.fromkeys(text for text in kept if text))  # choices share theirs
    encoded = dict(zip(contexts, _encode(contexts, tokenizer, begin), strict=True))
    wholes = _encode([short + text for short, text in zip(kept, moved, strict=True) if short], tokenizer, begin)
    alone = [text for short, text in zip(kept, moved, strict=True) if not short]
    bare = tokenizer(alone, add_special_tokens=False)["input_ids"] if alone else []
    rest_of_wholes, rest_of_bare = iter(wholes), iter(bare)
    found = []
    for short, (context, after) in zip(kept, pairs, strict=True):
        if short:
            before = encoded[short]
            answer = list(next(rest_of_wholes))[len(before) :]
        else:
            before, answer = [prefix], list(next(rest_of_bare))
            if prefix is None:
                raise TaskError("a context is empty, and the tokenizer has no token that begins or ends a text")
            if answer[:1] == before:
                before, answer = answer[:1], answer[1:]
        if not answer:
            raise TaskError(f"the continuation {after!r} of the context {context[-40:]!r} has no tokens of its own")
        found.append((list(before), answer))
    return found


def _encode(texts: Sequence[str], tokenizer: Any, begin: str | None) -> list[list[int]]:
    """Token ids; special tokens are added to texts that do not begin with `begin`."""
    found: list[list[int]] = [[] for _ in texts]
    for special in (True, False):
        chosen = [index for index, text in enumerate(texts) if bool(begin and text.startswith(begin)) != special]
        # `True` is the default of every tokenizer; a text that begins with the token gets no second one.
        ids = tokenizer([texts[index] for index in chosen], add_special_tokens=special)["input_ids"] if chosen else []
        for index, one in zip(chosen, ids, strict=True):
            found[index] = list(one)
    return found
