"""Four small domains, each with training examples, unlabeled probes and evaluation items.

A domain is a generator of (prompt, target) examples. Which of the three splits an example belongs to is a property of
the example itself: a digest of its *key* modulo 20. So the splits are disjoint whatever the seeds and the numbers, and
no list of held-out examples has to be kept. The key is the question stripped of what does not change it: the order of
two countries, the name of a variable.

    math          `3+4+5=`                    -> `12`           sums of three or four digits below eight
    code          `s='dog'\\nprint(s[1])\\n`     -> `o`            the output of a two-line Python program
    multilingual  `de Chad,Peru>`             -> `Tschad,Peru`  country names, from the CLDR data in babel
    rag           `tom=rug ann=tea ann?`      -> `tea`          a value looked up in the passages of the prompt

Scoring is greedy generation up to the end-of-sequence token and exact match with the target.
"""

import hashlib
import random
import string
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import NamedTuple

from simmerge_ray.base.errors import InputError, unknown_name
from simmerge_ray.base.extras import require

MAX_PROMPT_CHARS = 55  # with the beginning-of-sequence token a prompt has at most 56 tokens
MAX_TARGET_CHARS = 12


class Example(NamedTuple):
    prompt: str
    target: str


class Split(Enum):
    """What an example may be used for; the values are the digests modulo 20 that belong to it."""

    EVALUATION = range(0, 4)
    PROBE = range(4, 6)
    TRAINING = range(6, 20)


# Makes one random example and its key, from whichever split the key falls in.
Draw = Callable[[random.Random], tuple[str, Example]]


def split_of(domain: str, key: str) -> Split:
    """The split that the question `key` of a domain belongs to, for good."""
    residue = int.from_bytes(hashlib.sha256(f"{domain}\0{key}".encode()).digest()[:8], "big") % 20
    return next(split for split in Split if residue in split.value)


def evaluation_items(domain: str, num: int, seed: int = 0) -> list[Example]:
    """`num` different held-out (prompt, target) items."""
    return _distinct(domain, Split.EVALUATION, num, seed)


def probe_texts(domain: str, num: int, seed: int = 0) -> list[str]:
    """`num` different unlabeled prompts, neither trained on nor evaluated."""
    return [example.prompt for example in _distinct(domain, Split.PROBE, num, seed)]


def example_stream(domain: str, split: Split, seed: int) -> Iterator[Example]:
    """Endless random examples of one split; the stream is a function of the arguments alone."""
    if domain not in DOMAINS:
        raise InputError(unknown_name("domain", domain, DOMAINS))
    generator = random.Random(f"{domain}/{split.name}/{seed}")
    while True:
        key, example = DOMAINS[domain](generator)
        if split_of(domain, key) is split:
            yield example


# A split counts as exhausted after this many known examples in a row; the smallest holds some hundreds.
_MAX_MISSES = 5000


def _distinct(domain: str, split: Split, num: int, seed: int) -> list[Example]:
    stream = example_stream(domain, split, seed)
    items: dict[str, Example] = {}
    num_misses = 0
    while len(items) < num and num_misses < _MAX_MISSES:
        example = next(stream)
        num_misses = num_misses + 1 if example.prompt in items else 0
        items.setdefault(example.prompt, example)
    if len(items) == num:
        return list(items.values())
    raise InputError(f"domain {domain!r} has no {num} different {split.name.lower()} items (found {len(items)})")


def _draw_math(generator: random.Random) -> tuple[str, Example]:
    terms = [generator.randrange(8) for _ in range(generator.choice((3, 4)))]
    prompt = "+".join(map(str, terms)) + "="
    return prompt, Example(prompt, str(sum(terms)))


# Calls on a string variable, and what they print.
CALLS: Mapping[str, Callable[[str], str]] = {
    "{}[0]": lambda text: text[0],
    "{}[1]": lambda text: text[1],
    "{}[-1]": lambda text: text[-1],
    "{}[1:]": lambda text: text[1:],
    "{}[::-1]": lambda text: text[::-1],
    "{}*2": lambda text: text * 2,
    "{}.upper()": lambda text: text.upper(),
    "max({})": lambda text: max(text),
}


def _draw_code(generator: random.Random) -> tuple[str, Example]:
    variable = generator.choice(string.ascii_lowercase)
    text = "".join(generator.choices(string.ascii_lowercase, k=generator.choice((3, 4))))
    call, value = generator.choice(list(CALLS.items()))
    prompt = f"{variable}='{text}'\nprint({call.format(variable)})\n"
    return f"{text} {call}", Example(prompt, value(text))


LANGUAGES = ("de", "es", "fr", "it", "pl", "pt")
COUNTRIES = (
    "BH", "BT", "CA", "CL", "CN", "CU", "CY", "GA", "GH", "GN", "IL", "IQ", "IR", "KE", "KW", "LB", "LY", "ML",
    "MT", "MX", "NE", "NP", "OM", "PA", "PE", "QA", "RW", "SD", "SY", "TD", "YE", "ZM",
)  # fmt: skip


@cache
def _country_names(language: str) -> Mapping[str, str]:
    require("babel", "demo")
    from babel import Locale  # the CLDR tables take a moment to load, and only this domain needs them

    territories = Locale(language).territories
    return {code: territories[code] for code in COUNTRIES}


def _draw_multilingual(generator: random.Random) -> tuple[str, Example]:
    while True:
        language = generator.choice(LANGUAGES)
        first, second = generator.sample(COUNTRIES, 2)
        names, english = _country_names(language), _country_names("en")
        target = f"{names[first]},{names[second]}"
        if len(target) <= MAX_TARGET_CHARS:
            key = " ".join([language, *sorted((first, second))])
            return key, Example(f"{language} {english[first]},{english[second]}>", target)


# No two names end in the same letter and no two values begin with the same one: looking one up is one step.
NAMES = (
    "ida", "bob", "sid", "eve", "meg", "kai", "raj", "zak", "hal", "tom", "ann", "leo", "pip", "amr", "gus",
    "pat", "lou", "viv", "lew", "max", "ray", "liz",
)  # fmt: skip
VALUES = (
    "arm", "bag", "cup", "dog", "egg", "fox", "gum", "hat", "ink", "jar", "key", "log", "map", "net", "oak",
    "pen", "rug", "sea", "tea", "urn", "van", "wax", "yam", "zip",
)  # fmt: skip


def _draw_rag(generator: random.Random) -> tuple[str, Example]:
    num_passages = generator.choice((2, 3, 4))
    names, values = generator.sample(NAMES, num_passages), generator.sample(VALUES, num_passages)
    asked = generator.randrange(num_passages)
    passages = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    prompt = f"{passages} {names[asked]}?"
    return prompt, Example(prompt, values[asked])


DOMAINS: Mapping[str, Draw] = {
    "math": _draw_math,  # sums of three or four digits below eight
    "code": _draw_code,  # the output of a two-line Python program
    "multilingual": _draw_multilingual,  # two country names into one of six languages
    "rag": _draw_rag,  # a value looked up in two to four passages
}
