"""A service that can tell what a merge keeps: tiny checkpoints, their signals and answers, and a selector beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simmerge_ray.base.config import ServiceConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.selector.finding.sources import find_request, find_sources
from simmerge_ray.signals.compute import compute_signals, local_executor
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from tests import tiny
from tests.unit.service.published import PublishedFiles, write_published

SPEC = SignatureSpec(num_positions=16, num_attention_positions=4, num_coordinates=500)


@dataclass(frozen=True)
class AnsweringFiles:
    """root: with `catalogue.yaml` of m0 to m3 (tasks s, t, s, t), `probes` and `signatures`."""

    root: Path
    published: PublishedFiles

    @property
    def catalogue(self) -> Catalogue:
        return load_catalogue(self.root / "catalogue.yaml")

    def settings(self, root: Path, **changes: object) -> ServiceConfig:
        """Of a replica whose database and registry lie in `root`."""
        zoo = self.root
        own = {"catalogue": zoo / "catalogue.yaml", "probes": zoo / "probes", "signatures": str(zoo / "signatures")}
        return self.published.settings(root, **own | changes)


def write_answering(root: Path, answers: bool = True) -> AnsweringFiles:
    """Everything a service needs; without answers in the signatures where these were made before they had any."""
    catalogue = load_catalogue(tiny.make_catalogue(root, 4, noise=0.02, tasks=("s", "t")))
    probe_sets, store = load_probe_sets(root / "probes"), SignatureStore(root / "signatures")
    executor = local_executor(catalogue)
    table = compute_signals(catalogue, probe_sets, SPEC, store=store, executor=executor)
    if answers:
        find_sources(find_request(catalogue, probe_sets, FindConfig()), store, executor, SPEC)
    return AnsweringFiles(root, write_published(root, table=table))
