"""The table of propagators. A new one is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.signals.propagation.bound import Bound
from simmerge_ray.signals.propagation.evidence import Evidence
from simmerge_ray.signals.propagation.exact import Exact
from simmerge_ray.signals.propagation.interface import Propagator
from simmerge_ray.signals.propagation.second_order import SecondOrder
from simmerge_ray.signals.propagation.virtual import Virtual
from simmerge_ray.signals.signature import TaskOutputs


def _virtual(evidence: Evidence, halfway: Callable[[str, str], TaskOutputs] | None = None) -> Virtual:
    return Virtual(
        evidence.table, evidence.ids, evidence.outputs, evidence.weights, evidence.sums, evidence.digests, halfway
    )


def _curved(evidence: Evidence) -> Virtual:
    if evidence.halfway is None:
        raise ConfigError("propagator 'curved' needs a base checkpoint; the catalogue names none (take 'virtual')")
    return _virtual(evidence, evidence.halfway)


def _exact(evidence: Evidence) -> Exact:
    return Exact(evidence.table, evidence.catalogue, evidence.tokens, evidence.outputs, evidence.weights)


# `curved` is `virtual` with one more forward pass for each checkpoint, made when it is first used.
PROPAGATORS: Mapping[str, Callable[[Evidence], Propagator]] = {
    "bound": lambda evidence: Bound(evidence.table),
    "second_order": lambda evidence: SecondOrder(evidence.table),
    "virtual": _virtual,
    "curved": _curved,
    "exact": _exact,
}
