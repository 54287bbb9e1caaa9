"""Evidence of the tiny catalogue, read once."""

from __future__ import annotations

import pytest

from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.propagation.evidence import read_evidence
from simmerge_ray.signals.propagation.table import PROPAGATORS
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore

SPEC = SignatureSpec(batch_size=8, num_positions=40, num_attention_positions=12, num_coordinates=1500)


@pytest.fixture(scope="session")
def evidence(catalogue_path, catalogue, tmp_path_factory):
    probe_sets = load_probe_sets(catalogue_path.parent / "probes")
    store = SignatureStore(tmp_path_factory.mktemp("signatures"))
    table = compute_signals(catalogue, probe_sets, SPEC, store=store)
    return read_evidence(table, catalogue, probe_sets, store)


@pytest.fixture(scope="session")
def propagators(evidence):
    return {name: build(evidence) for name, build in PROPAGATORS.items()}


@pytest.fixture(params=PROPAGATORS)
def propagator(request, propagators):
    """Every row of the table."""
    return propagators[request.param]
