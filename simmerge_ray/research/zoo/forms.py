"""The domains' questions in other surface forms: the same skill, asked and answered in another way.

People merge fine-tunes of a base that can do more than it shows: it has the skill, and not the format in which it is
asked. A base that is trained on these forms alone answers an evaluated question wrongly; an expert learns the evaluated
form in a short training.

    math          `3+4+5=`                  -> `12`         3 4 5:                   -> `12;`
    code          `s='dog'\\nprint(s[1])\\n`   -> `o`          dog.second:              -> `o"`
    multilingual  `de Chad,Peru>`           -> `Tschad,..`  Chad/Peru to german:     -> `Tschad/..`
    rag           `tom=rug ann=tea ann?`    -> `tea`        tom:rug ann:tea ann:     -> `tea)`
"""

from collections.abc import Callable, Iterator, Mapping

from simmerge_ray.research.zoo.domains import CALLS, DOMAINS, Example, Split, example_stream

FOREIGN = "foreign "  # before a domain's name: its questions in the other form
_CALL_NAMES = dict(zip(CALLS, ("first", "second", "last", "rest", "turned", "twice", "loud", "highest"), strict=True))
_LANGUAGE_NAMES = {
    "de": "german", "es": "spanish", "fr": "french", "it": "italian", "pl": "polish", "pt": "portuguese"
}  # fmt: skip


def foreign_form(domain: str, example: Example) -> Example:
    """The same question and answer in the domain's other form."""
    return _FORMS[domain](example)


def training_stream(name: str, seed: int) -> Iterator[Example]:
    """Endless training examples of a domain, or of one in its other form. InputError: the domain is not known."""
    domain = name.removeprefix(FOREIGN)
    stream = example_stream(domain, Split.TRAINING, seed)
    return stream if name == domain else (foreign_form(domain, example) for example in stream)


def _math(example: Example) -> Example:
    return Example(example.prompt.replace("+", " ").replace("=", ":"), f"{example.target};")


def _code(example: Example) -> Example:
    variable, text, line = example.prompt[0], example.prompt.split("'")[1], example.prompt.split("\n")[1]
    call = line.removeprefix("print(").removesuffix(")")
    name = next(name for pattern, name in _CALL_NAMES.items() if pattern.format(variable) == call)
    return Example(f"{text}.{name}:", f'{example.target}"')


def _multilingual(example: Example) -> Example:
    language, _, countries = example.prompt.removesuffix(">").partition(" ")
    prompt = f"{countries.replace(',', '/')} to {_LANGUAGE_NAMES[language]}:"
    return Example(prompt, example.target.replace(",", "/"))


def _rag(example: Example) -> Example:
    return Example(example.prompt.replace("=", ":").replace("?", ":"), f"{example.target})")


_FORMS: Mapping[str, Callable[[Example], Example]] = {
    "math": _math, "code": _code, "multilingual": _multilingual, "rag": _rag
}  # fmt: skip
assert _FORMS.keys() == DOMAINS.keys()
