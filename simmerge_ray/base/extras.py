"""Libraries that not everybody needs: each comes with an extra of this package."""

from __future__ import annotations

import importlib
from types import ModuleType

from simmerge_ray.base.errors import MissingLibraryError


def require(module: str, extra: str) -> ModuleType:
    """An optional library.

    Args:
        extra: of this package, that installs it.

    Raises:
        MissingLibraryError: it is not installed, or what it needs itself is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = f'pip install "simmerge_ray[{extra}]"'
        raise MissingLibraryError(f"{module.split('.')[0]} is not installed: {hint} ({error})") from error
