"""A merge that a user requests, by a plan file or mergekit's YAML: checked, described, and made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from simmerge_ray.base.errors import PlanError, problem_list
from simmerge_ray.base.storage import Place, check_outputs, read_json, read_text
from simmerge_ray.checkpoints.adapters import LoraAdapter
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef, locate_checkpoint
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine.forms import is_blockwise, memory_per_thread
from simmerge_ray.merging.engine.global_trims import global_steps
from simmerge_ray.merging.graph import MergeGraph, reads
from simmerge_ray.merging.mergekit import ModelName, compile_mergekit, read_mergekit
from simmerge_ray.merging.mergekit.problems import raise_problems
from simmerge_ray.merging.write.directory import write_graph
from simmerge_ray.merging.write.layout import plan_layout
from simmerge_ray.merging.write.output import MANIFEST_FILE, MergeResult, WriteOptions, check_target, merge_output
from simmerge_ray.merging.write.tensors import default_threads
from simmerge_ray.plans.plan import ResolvedPlan, read_plan

_YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class MergeRequest:
    """A requested merge: its graph, the target, and (from a plan file) the plan with its predictions."""

    graph: MergeGraph
    out: Place
    resolved: ResolvedPlan | None = None
    predicted: Mapping[str, Any] | None = None

    def write(self, options: WriteOptions) -> MergeResult:
        """Make it; see `write_graph`."""
        return write_graph(self.graph, self.out, replace(options, predicted=self.predicted, plan=self.resolved))

    def warnings(self) -> list[str]:
        """That the target has another merge, and what of the file has no effect, one a line; the first 20."""
        return [*self._replaced(), *self._without_effect()]

    def _replaced(self) -> list[str]:
        try:
            before = read_json(self.out / MANIFEST_FILE)["config"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return [] if before == dict(self.graph.description) else [f"replaces another merge, which {self.out} holds"]

    def _without_effect(self) -> list[str]:
        lines = problem_list("", (f"warning: {line}" for line in self.graph.warnings)).splitlines()
        return [line.strip() for line in lines]

    def lines(self, max_shard_bytes: int, num_threads: int | None) -> list[str]:
        """The merge in words and numbers, from headers alone."""
        graph, layout = self.graph, plan_layout(self.graph.outputs, max_shard_bytes)
        threads = min(num_threads or default_threads(), max(1, len(graph.outputs)))
        specs = {key: read_headers(ref) for key, ref in graph.checkpoints.items()}
        inputs = {read for output in graph.outputs for read in reads(output.node)}
        read_bytes = sum(specs[read.checkpoint][read.tensor].num_bytes for read in inputs)
        whole = sum(not is_blockwise(output, specs) for output in graph.outputs)
        memory = threads * memory_per_thread(graph, specs)
        checkpoints = graph.checkpoints.items()
        return [
            graph.title,
            *self.warnings(),
            *(f"  {key}: {ref.path}" + (f" + {ref.adapter}" if ref.adapter else "") for key, ref in checkpoints),
            f"tensors  {len(graph.outputs)}, of which {whole} are held in memory as a whole",
            f"read     {read_bytes / 1e9:.3f} GB",
            f"write    {layout.num_bytes / 1e9:.3f} GB in {len(layout.shards)} file(s) -> {self.out}",
            f"memory   at most {memory / 1e6:.0f} MB for {threads} thread(s)",
            *(
                [f"trim     step {', '.join(map(str, steps))} over the whole model: its inputs are read twice before"]
                if (steps := global_steps(graph))
                else []
            ),
            f"mergekit {'can make the same merge' if graph.mergekit else 'has no words for this plan'}",
            f"no problem was found{self._ignored}",
        ]

    @property
    def _ignored(self) -> str:
        count = len(self.graph.warnings)
        return f"; without effect (--strict refuses): {count} warning{'s' * (count > 1)} above" if count else ""


def read_request(file: Place, out: Place, strict: bool = False) -> MergeRequest:
    """Read a plan file and check everything that headers show, before a weight is read.

    Raises InputError: with every problem found; with `strict` also what of the file would have no effect.
    """
    check_outputs([merge_output(out)])  # before anything is fetched from the hub
    if file.suffix in _YAML_SUFFIXES:
        try:
            text = read_text(file)
        except OSError as error:
            raise PlanError(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PlanError(f"{file} is not text") from None
        if re.search(r"^checkpoints *:", text, re.MULTILINE):
            raise PlanError(
                f"{file} is a catalogue, which says what may be merged, not how: `simmerge auto` finds a merge of it, "
                "`simmerge plan --out` writes plans"
            )
        try:
            read = read_mergekit(text, file.parent)
        except PlanError as error:
            raise PlanError(f"{file}: {error}") from None
        graph = compile_mergekit(read, _locate)
        request = MergeRequest(graph, out)
        if strict:
            raise_problems(graph.warnings, "this mergekit file holds what has no effect (--strict):")
    else:
        resolved, predicted = read_plan(file)
        request = MergeRequest(compile_plan(resolved), out, resolved, predicted)
    check_target(request.graph, out)
    global_steps(request.graph)  # it raises what cannot be trimmed so
    for ref in request.graph.checkpoints.values():
        if ref.adapter is not None:
            LoraAdapter(ref, read_headers(ref))  # it raises what does not fit
    return request


def _locate(name: ModelName) -> CheckpointRef:
    found = locate_checkpoint(name.model, name.revision, name.adapter, name.adapter_revision, name.directory)
    return CheckpointRef(name.id, found.path, adapter=found.adapter)
