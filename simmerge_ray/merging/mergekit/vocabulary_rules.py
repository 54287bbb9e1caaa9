"""What a document says of the output's tokenizer: rules of tokens, padding, the chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simmerge_ray.base.storage import Place, place_in, read_text
from simmerge_ray.merging.mergekit.chat_templates import TEMPLATES
from simmerge_ray.merging.mergekit.documents import ModelName, TokenRule, VocabularyRules
from simmerge_ray.merging.mergekit.problems import Problems, shorten

_MAX_PADDING = 1 << 20
_MAX_TEMPLATE = 1_000_000


def read_vocabulary(
    value: object, problems: Problems, read_model: Callable[[object, str], ModelName]
) -> VocabularyRules:
    """The `tokenizer` mapping but for its source; a bare source has no rules."""
    if not isinstance(value, Mapping):
        return VocabularyRules()
    fields = problems.mapping(value, "tokenizer", ("source", "tokens", "pad_to_multiple_of")) or {}
    padding = fields.get("pad_to_multiple_of")
    if padding is not None and (isinstance(padding, bool) or not isinstance(padding, int) or not padding > 0):
        problems.report("tokenizer.pad_to_multiple_of", f"a whole number above 0 is needed, got {shorten(padding)}")
        padding = None
    elif padding is not None and padding > _MAX_PADDING:
        problems.report("tokenizer.pad_to_multiple_of", f"{shorten(padding)} is above {_MAX_PADDING}")
    tokens = fields.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        problems.report("tokenizer.tokens", f"a mapping of tokens is needed, got {shorten(tokens)}")
        tokens = {}
    rules = []
    for token, rule in tokens.items():
        place = f"tokenizer.tokens.{token}"
        if not isinstance(token, str) or not token:
            problems.report(place, f"the text of a token is needed, got {shorten(token)}")
            continue
        rules.append((token, _rule(rule, place, problems, read_model)))
    return VocabularyRules(tuple(rules), padding)


def _rule(value: object, place: str, problems: Problems, read_model: Callable[[object, str], ModelName]) -> TokenRule:
    fields = problems.mapping(value, place, ("source", "force")) or {}
    force, source = fields.get("force", False), fields.get("source")
    if not isinstance(force, bool):
        problems.report(f"{place}.force", f"true or false is needed, got {shorten(force)}")
        force = False
    if force and source is None:
        problems.report(f"{place}.source", "is missing; force needs it")
    if not isinstance(source, Mapping) or "kind" not in source:
        model = None if source is None else read_model(source, f"{place}.source")
        return TokenRule(model, force=force)
    kind = source["kind"]
    if kind == "zero":
        problems.mapping(source, f"{place}.source", ("kind",))
        return TokenRule("zero", force=force)
    if kind != "model_token":
        problems.report(f"{place}.source.kind", f"unknown kind {shorten(kind)}; known: zero, model_token")
        return TokenRule(force=force)
    inner = problems.mapping(source, f"{place}.source", ("kind", "model", "token", "token_id")) or {}
    token, number = inner.get("token"), inner.get("token_id")
    if (token is None) == (number is None):
        problems.report(f"{place}.source", "exactly one of token and token_id is needed")
    elif token is not None and not isinstance(token, str):
        problems.report(f"{place}.source.token", f"the text of a token is needed, got {shorten(token)}")
    elif number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
        problems.report(f"{place}.source.token_id", f"a whole number is needed, got {shorten(number)}")
    return TokenRule(read_model(inner.get("model"), f"{place}.source.model"), token, number, force)


def read_template(value: object, directory: Place, report: Callable[[str, str], None]) -> str | None:
    """`auto`, or the text of a template: one of the known names, a file beside the document, or given as it is."""
    if value is None or value == "":
        return None
    place = "chat_template"
    if not isinstance(value, str):
        report(place, f"a text is needed, got {shorten(value)}")
        return None
    if value == "auto":
        return value
    if value in TEMPLATES:
        return TEMPLATES[value]
    if "{" in value or "\n" in value:
        return value
    try:
        text = read_text(place_in(directory, value))
    except (OSError, ValueError):
        known = ", ".join(("auto", *TEMPLATES))
        report(place, f"{shorten(value)} is no file, no text of a template (it has no '{{'), and none of: {known}")
        return None
    if len(text) > _MAX_TEMPLATE or "{" not in text:
        report(place, f"{shorten(value)} holds no template of at most {_MAX_TEMPLATE} characters")
        return None
    return text
