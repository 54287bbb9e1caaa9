"""Digests of checkpoints on the nodes of a cluster: the driver alone would read fifty large ones for a day."""

from __future__ import annotations

import logging
from collections import deque

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.digests import DigestEntry, checkpoint_digest
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.on_ray.resources import on_running_cluster, ray_session
from simmerge_ray.on_ray.tasks import run_tasks

_log = logging.getLogger(__name__)


def digest_on_nodes(catalogue: Catalogue) -> None:
    """Put the digests that this machine does not know into its cache, so that `catalogue.digests()` finds them there.

    On a cluster that this process has not started, one task for each checkpoint, spread over the nodes. What cannot be
    read there, or differs there, is left to the driver. Without such a cluster nothing happens: the files are local.
    """
    if not on_running_cluster():
        return
    try:
        entries = {ref: DigestEntry(ref) for ref in catalogue.all_refs}
    except CheckpointError:
        return  # `digests` says it better
    missing = deque((ref,) for ref, entry in entries.items() if entry.read() is None)
    if len(missing) < 2:
        return
    with ray_session():
        tasks = run_tasks(
            _digest_there,
            missing,
            scheduling_strategy="SPREAD",
            on_error=lambda call, error: _log.warning("%s was not read on a node: %s", call[0].id, error),
        )
        for (ref,), (fingerprint, digest) in tasks:
            if fingerprint == entries[ref].fingerprint:
                entries[ref].keep(digest)


def _digest_there(ref: CheckpointRef) -> tuple[str, str]:
    """On a node: what its files look like, and the digest."""
    return DigestEntry(ref).fingerprint, checkpoint_digest(ref)
