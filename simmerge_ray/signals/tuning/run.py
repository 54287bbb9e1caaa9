"""One tuning from its inputs to its recipe, with a state file that an interrupted run goes on from to the same bits."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.base.progress import Report
from simmerge_ray.base.storage import write_atomically
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.plans.recipe import Recipe
from simmerge_ray.signals.tuning.memory import stated_bytes
from simmerge_ray.signals.tuning.prepare import prepare_tuning
from simmerge_ray.signals.tuning.tuner import TuneState, tune_coefficients


@dataclass(frozen=True)
class TuningJob:
    """All that one tuning needs, small enough to send anywhere.

    catalogue: its members are tuned. batches: micro-batches of the probes of their own tasks. start: see
    `prepare_tuning`. state_file: on a disk that all nodes share where the job may run on any of them.
    """

    catalogue: Catalogue
    batches: Mapping[str, Sequence[TokenBatch]]
    config: TuneConfig
    state_file: Path
    start: Recipe | None = None

    @property
    def num_bytes(self) -> int:
        """Memory, as stated before it starts."""
        return stated_bytes(self.catalogue, self.batches, self.config)


@dataclass(frozen=True)
class TunedRecipe:
    """The recipe that was best on the probes held out, and how it was reached."""

    recipe: Recipe
    state: TuneState


def run_tuning(job: TuningJob, device: str = "cpu", report: Report | None = None) -> TunedRecipe:
    """Tune from the state file, or from the start without one; the state is written after every step.

    Raises:
        ProbeError, CheckpointError, ConfigError: see `prepare_tuning`.
    """
    prepared = prepare_tuning(job.catalogue, job.batches, job.config, device, job.start)

    def keep(reached: TuneState) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **reached.arrays())  # type: ignore[arg-type]
        write_atomically(job.state_file, buffer.getvalue())
        if report:
            report(reached.num_steps, job.config.num_steps)

    state = _read_state(job.state_file)
    state = tune_coefficients(prepared.model, prepared.batches, prepared.start, job.config, state, keep)
    return TunedRecipe(prepared.recipe(state.best), state)


def _read_state(file: Path) -> TuneState | None:
    if not file.exists():
        return None
    with np.load(file) as arrays:
        return TuneState.from_arrays(dict(arrays))
