"""YAML that somebody else wrote, with limits, and without a key that is given twice (of which the last would count).

Anchors let a few lines stand for a billion values: an alias counts as all that it stands for. The limits are checked on
the parser's events, before anything is built.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

_MAX_BYTES = 1 << 23
_MAX_NODES, _MAX_CHARACTERS = 100_000, 1 << 23  # a weight for each of 10,000 tensors and four members takes 80,000
_MAX_DEPTH = 64
_MAX_DIGITS = 100  # a digest may be of decimal digits alone


class YamlError(ValueError):
    """Text that is not YAML, or beyond a limit. The message starts with `not YAML` and gives the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not YAML: {' '.join(reason.split())}")


def parse_yaml(text: str) -> Any:
    """The value of one document; None of an empty text. Raises YamlError."""
    documents = parse_yaml_documents(text)
    if len(documents) > 1:
        raise YamlError(f"one document is expected, the text has {len(documents)}")
    return documents[0] if documents else None


def parse_yaml_documents(text: str) -> list[Any]:
    """The values of all documents. Raises YamlError."""
    if len(text) > _MAX_BYTES:
        raise YamlError(f"{len(text)} characters; at most {_MAX_BYTES} are read")
    try:
        _check_limits(text)
        return list(yaml.load_all(text, _Loader))
    except yaml.YAMLError as error:
        raise YamlError(str(error).replace(' in "<unicode string>",', " at")) from None
    except YamlError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # of a date, or of an odd key
        raise YamlError(f"a value that cannot be read: {str(error) or type(error).__name__}") from None


# With libyaml, ten times as fast, where PyYAML was built with it.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):
    """YAML 1.1 as PyYAML's safe loader reads it, with unique keys and integers of a sane length."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(keys) > len(set(keys)):
            seen: set[str] = set()
            twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping

    def integer(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:
            problem = f"an integer of {len(node.value)} digits; at most {_MAX_DIGITS} are read"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(self.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)


def _check_limits(text: str) -> None:
    """Raises YamlError: too many nodes or characters, counting what aliases stand for, or nodes too deep."""
    sizes: dict[str, tuple[int, int]] = {}  # nodes and characters, by anchor
    opened: list[tuple[str | None, int, int]] = []  # collections: anchor, and nodes and characters before them
    nodes = characters = 0
    for event in yaml.parse(text, _Parser):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise YamlError(f"the alias *{event.anchor} stands for nothing before it, or for what it is a part of")
            nodes, characters = nodes + sizes[event.anchor][0], characters + sizes[event.anchor][1]
        elif isinstance(event, yaml.ScalarEvent):
            nodes, characters = nodes + 1, characters + len(event.value)
            if event.anchor is not None:
                sizes[event.anchor] = 1, len(event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes, characters))
            nodes += 1
            if len(opened) > _MAX_DEPTH:
                raise YamlError(f"nested deeper than {_MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, written = opened.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before, characters - written
        if nodes > _MAX_NODES or characters > _MAX_CHARACTERS:
            raise YamlError(
                f"more than {_MAX_NODES} values or {_MAX_CHARACTERS} characters, counting what aliases stand for"
            )
