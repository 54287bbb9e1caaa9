"""Libraries that not everybody needs: each comes with an extra of this package. And one that brings too many along."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from simmerge_ray.base.errors import MissingLibraryError


def require(module: str, extra: str) -> ModuleType:
    """An optional library, which that extra of this package installs. Raises MissingLibraryError: it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = f'pip install "simmerge_ray[{extra}]"'
        raise MissingLibraryError(f"{module.split('.')[0]} is not installed: {hint} ({error})") from error


def import_transformers() -> Any:
    """transformers, with scikit-learn (and SciPy's statistics and pandas) imported by assisted generation when it calls
    their one function, and not by every process that loads a model: a quarter of its start.
    """
    if "transformers.generation.candidate_generator" not in sys.modules:
        utils: Any = importlib.import_module("transformers.utils")
        is_available = utils.is_sklearn_available
        utils.is_sklearn_available = lambda: False
        try:
            generator: Any = importlib.import_module("transformers.generation.candidate_generator")
        finally:
            utils.is_sklearn_available = is_available
        generator.is_sklearn_available, generator.roc_curve = is_available, _roc_curve
    return importlib.import_module("transformers")


def _roc_curve(*given: Any, **options: Any) -> Any:
    return importlib.import_module("sklearn.metrics").roc_curve(*given, **options)
