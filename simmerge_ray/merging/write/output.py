"""A merge on its way into a directory or a store: how it is written, what stands beside the weights, and the result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.base.storage import (
    Manifest,
    Output,
    Place,
    RemotePath,
    check_outputs,
    file_names,
    read_bytes,
    write_json,
)
from simmerge_ray.checkpoints.digests import checkpoint_fingerprint
from simmerge_ray.checkpoints.tokenizers import TOKENIZER_FILES
from simmerge_ray.merging.engine.compute import TensorReport
from simmerge_ray.merging.engine.global_trims import resolve_global_trims
from simmerge_ray.merging.graph import MergeGraph
from simmerge_ray.merging.write.card import model_card
from simmerge_ray.merging.write.layout import MAX_SHARD_BYTES, Layout, Placement, Shard, plan_layout
from simmerge_ray.merging.write.tensors import Progress, default_threads
from simmerge_ray.plans.plan import ResolvedPlan, write_plan

PLAN_FILE = "simmerge_plan.json"
MANIFEST_FILE = "simmerge_manifest.json"
STATE_FILE = "merge.state.json"
# Beside the tokenizer's.
_OTHER_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "normalizer.json",
)  # fmt: skip


class Runner(Protocol):
    """Makes tensors elsewhere than in threads of this process."""

    def __call__(
        self, graph: MergeGraph, partial: Path, placements: Sequence[Placement], progress: Progress | None, total: int
    ) -> None:
        """Make the tensors that are missing in a directory which every worker sees."""

    def make_files(
        self, graph: MergeGraph, shards: Sequence[Shard], out: RemotePath, progress: Progress | None, total: int
    ) -> dict[str, TensorReport]:
        """Make whole files in a store (`to_store.make_file`); reports of their tensors by name."""


@dataclass(frozen=True)
class WriteOptions:
    """How a merge is written.

    predicted: utilities by task for the model card. progress: called with (bytes done, bytes in all).
    strict: refuse a result with NaN or infinity. plan: is written beside the weights, with the predicted utilities.
    runner: makes the tensors elsewhere (see `on_ray.merge_tasks`); default: threads of this process.
    """

    predicted: Mapping[str, Any] | None = None
    progress: Progress | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    num_threads: int | None = None
    strict: bool = False
    plan: ResolvedPlan | None = None
    runner: Runner | None = None


@dataclass(frozen=True)
class MergeResult:
    """What was written, and what was noticed.

    num_resumed: tensors that an interrupted merge had finished. not_finite: tensors that hold NaN or infinity.
    fell_back: for every SLERP step (from 1) the tensors on which it was the linear average.
    """

    path: Place
    num_bytes: int
    num_resumed: int
    not_finite: tuple[str, ...]
    fell_back: Mapping[int, tuple[str, ...]]
    num_tensors: int

    def lines(self) -> list[str]:
        """What a person should know of it beside its path."""
        lines = []
        if self.num_resumed:
            lines.append(
                f"went on from an interrupted merge: {self.num_resumed} of {self.num_tensors} tensors were there"
            )
        for step, names in self.fell_back.items():
            lines.append(f"step {step}: slerp was the linear average on {len(names)} of {self.num_tensors} tensors")
        if self.not_finite:
            shown = ", ".join(self.not_finite[:5]) + (" ..." if len(self.not_finite) > 5 else "")
            lines.append(f"warning: NaN or infinity in {len(self.not_finite)} tensors: {shown}")
        return lines


@dataclass(frozen=True)
class MergeOutput:
    """A merge that is being written to `out`."""

    graph: MergeGraph
    out: Place
    options: WriteOptions
    started: float = field(default_factory=time.monotonic)

    @cached_property
    def layout(self) -> Layout:
        return plan_layout(self.graph.outputs, self.options.max_shard_bytes)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What must be unchanged for an interrupted merge to go on: the computation, its inputs, the files."""
        return {
            "graph": self.graph.digest(),
            "inputs": {key: checkpoint_fingerprint(ref) for key, ref in self.graph.checkpoints.items()},
            "files": {shard.file: shard.num_bytes for shard in self.layout.shards},
        }

    @cached_property
    def trimmed(self) -> MergeGraph:
        """The graph with the thresholds of global trims."""
        return resolve_global_trims(self.graph, self.options.num_threads or default_threads())

    def trimmed_outputs(self, placements: Sequence[Placement]) -> tuple[Placement, ...]:
        """The placements with the outputs of `trimmed`."""
        outputs = {output.name: output for output in self.trimmed.outputs}
        return tuple(replace(placement, output=outputs[placement.output.name]) for placement in placements)

    def result(self, reports: Mapping[str, TensorReport], num_resumed: int) -> MergeResult:
        """What the reports of all tensors come to. Raises CheckpointError: one is not finite, and `strict`."""
        steps = sorted({step for report in reports.values() for step in report.fell_back})
        fell_back = {step: tuple(sorted(r.name for r in reports.values() if step in r.fell_back)) for step in steps}
        not_finite = tuple(sorted(report.name for report in reports.values() if report.not_finite))
        if self.options.strict and not_finite:
            raise CheckpointError(f"the merge holds NaN or infinity in {', '.join(not_finite[:5])}")
        return MergeResult(self.out, self.graph.num_bytes, num_resumed, not_finite, fell_back, len(reports))

    def write_beside(self, directory: Path, result: MergeResult) -> None:
        """Write everything that stands beside the weights."""
        graph = self.graph
        if (index := self.layout.index()) is not None:
            (directory / "model.safetensors.index.json").write_text(index)
        write_json(directory / "config.json", dict(graph.config))
        origin = graph.checkpoints[graph.tokenizer_from].path
        copied = TOKENIZER_FILES + _OTHER_FILES if graph.tokenizer_files is None else _OTHER_FILES
        for name in sorted((file_names(origin) or set()).intersection(copied)):
            (directory / name).write_bytes(read_bytes(origin / name))
        for name, content in (graph.tokenizer_files or {}).items():
            (directory / name).write_bytes(content)
        (directory / "README.md").write_text(model_card(graph, self.options.predicted, result.not_finite))
        if graph.mergekit is not None:
            (directory / "mergekit_config.yml").write_text(graph.mergekit)
        inputs = {f"checkpoint {key}": fingerprint for key, fingerprint in self.state["inputs"].items()}
        outcome = {
            "num_bytes": result.num_bytes,
            "not_finite": list(result.not_finite),
            "fell_back": {str(step): list(names) for step, names in result.fell_back.items()},
        }
        seconds = time.monotonic() - self.started
        Manifest("merge", dict(graph.description), inputs).write(directory / MANIFEST_FILE, seconds, outcome)
        if self.options.plan is not None:
            write_plan(directory / PLAN_FILE, self.options.plan, self.options.predicted)


def merge_output(out: Place, shown: str = "OUT") -> Output:
    """A directory that a merge is written to, for `check_outputs`: an older merge there may be replaced."""
    return Output(out, shown, marks=(PLAN_FILE, MANIFEST_FILE, STATE_FILE), kind="a merge made by simmerge")


def check_target(graph: MergeGraph, out: Place) -> None:
    """Refuse a target that is not ours to replace, or cannot be written. Raises as `check_outputs`."""
    sources = {f"checkpoint {key}": ref.path for key, ref in graph.checkpoints.items()}
    sources |= {f"adapter of {key}": ref.adapter for key, ref in graph.checkpoints.items() if ref.adapter}
    check_outputs([merge_output(out)], sources)
