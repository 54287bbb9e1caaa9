"""Predict which merge of language model checkpoints will work, and make it.

    import simmerge_ray as sm

    catalogue = sm.Catalogue.load("catalogue.yaml")
    best = sm.auto(catalogue, probes="probes")  # or `sm.merge`, `sm.pair_signals`, `sm.rank`, `sm.retention`
    best.retention, best.write("merged")

These names are imported when they are used: importing the package imports neither torch nor Ray. All else is taken from
its module. A module imports only from its own folder and from the floors below it (tests/unit/test_layers.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from simmerge_ray.base.version import __version__

if TYPE_CHECKING:
    from simmerge_ray.base.config import EngineConfig, RankingConfig, RankingFiles, SignalsConfig
    from simmerge_ray.base.errors import InputError, SimmergeError
    from simmerge_ray.base.finding import FindConfig
    from simmerge_ray.checkpoints.catalogue import Catalogue
    from simmerge_ray.checkpoints.probes import Probe, ProbeSet
    from simmerge_ray.pipelines.python import Best, pair_signals
    from simmerge_ray.pipelines.python import find_merge as auto
    from simmerge_ray.pipelines.python import make_merge as merge
    from simmerge_ray.pipelines.python import rank_merges as rank
    from simmerge_ray.pipelines.python import report_card as retention

# Name -> module and, where it has another one there, its name. `signals` is a folder of the package, so the function
# cannot have that name.
_HOMES = {
    "auto": "pipelines.python.find_merge",
    "merge": "pipelines.python.make_merge",
    "pair_signals": "pipelines.python.pair_signals",
    "rank": "pipelines.python.rank_merges",
    "retention": "pipelines.python.report_card",
    "Best": "pipelines.python.Best",
    "Catalogue": "checkpoints.catalogue.Catalogue",
    "Probe": "checkpoints.probes.Probe",
    "ProbeSet": "checkpoints.probes.ProbeSet",
    "FindConfig": "base.finding.FindConfig",
    "EngineConfig": "base.config.EngineConfig",
    "SignalsConfig": "base.config.SignalsConfig",
    "RankingConfig": "base.config.RankingConfig",
    "RankingFiles": "base.config.RankingFiles",
    "SimmergeError": "base.errors.SimmergeError",
    "InputError": "base.errors.InputError",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
