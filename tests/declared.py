"""What pyproject.toml declares: the core, the extras, and all that an installation of the core alone brings."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["optional-dependencies"].items()
}  # fmt: skip


@cache
def distributions() -> dict[str, frozenset[str]]:
    """Names of the installed distributions that hold a top-level module, by module."""
    return {
        module: frozenset(map(canonicalize_name, names)) for module, names in metadata.packages_distributions().items()
    }


def names(requirements: Iterable[Requirement]) -> set[str]:
    """Distributions by their canonical names; extras of this package by what they hold."""
    found = set()
    for requirement in requirements:
        if canonicalize_name(requirement.name) == "simmerge-ray":
            for extra in requirement.extras:
                found |= names(EXTRAS[extra])
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """All distributions that an installation of the requirements brings here, as the installed ones say."""
    found: set[str] = set()
    waiting = [(requirement, "") for requirement in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                try:
                    lines = metadata.requires(name) or []
                except metadata.PackageNotFoundError:  # in the lock it is left out
                    continue
                waiting += [(Requirement(line), wanted) for line in lines]
    return found
