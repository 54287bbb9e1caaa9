"""Libraries that not everybody needs: each comes with an extra of this package."""

from __future__ import annotations

import importlib
from types import ModuleType

from simmerge_ray.base.errors import MissingLibraryError


def require(module: str, extra: str) -> ModuleType:
    """An optional library, which that extra of this package installs. Raises MissingLibraryError: it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = f'pip install "simmerge_ray[{extra}]"'
        raise MissingLibraryError(f"{module.split('.')[0]} is not installed: {hint} ({error})") from error
