"""A driver for `test_nodes`: one stage on the cluster of `RAY_ADDRESS`, with workers that keep count and can be held.

`python -m tests.on_ray.on_nodes DIRECTORY STAGE ...`. Every unit, trial or share leaves a file `ran-*` there when
it begins. Those whose name is in `hold.json` stop the first time, write the node that they are on into `held-NAME`, and
wait to be killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import runpy
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from simmerge_ray.base.storage import write_atomically
from simmerge_ray.capacity.placement import engine_needs, signal_worker_needs
from simmerge_ray.on_ray import merge_search, merge_tasks
from simmerge_ray.pipelines.jobs import run_job
from simmerge_ray.signals.worker import SignalWorker

DIRECTORY = "SIMMERGE_TEST_NODES"


def begin(name: str, content: Any = None) -> None:
    """Note that a piece of work begins, and wait for ever if it is to be held and never was."""
    import ray

    directory = Path(os.environ[DIRECTORY])
    digest = hashlib.blake2b(pickle.dumps(content), digest_size=8).hexdigest()
    (directory / f"ran-{name}-{digest}-{uuid.uuid4().hex}").touch()
    if name not in json.loads((directory / "hold.json").read_text()):
        return
    try:
        (directory / f"claimed-{name}").touch(exist_ok=False)
    except FileExistsError:
        return
    write_atomically(directory / f"held-{name}", ray.get_runtime_context().get_node_id().encode())
    time.sleep(600)
    raise SystemExit("nobody has killed this worker")


def num_again(directory: Path) -> int:
    """How many pieces of work began a second time."""
    counts = Counter(path.name.rsplit("-", 1)[0] for path in directory.glob("ran-*"))
    return sum(count - 1 for count in counts.values())


class CountingWorker(SignalWorker):
    def run_unit(self, unit: Any) -> Any:
        begin(f"{unit.kind}.{unit.checkpoint}", unit.payload)
        return super().run_unit(unit)


class CountingTrial(merge_search.MergeTrial):
    def step(self) -> dict[str, Any]:
        begin(merge_search.Trial.from_text(self.config["trial"]).plan.label.replace(" ", ""))
        return super().step()


_make_share = merge_tasks.make_share


def counting_share(graph: Any, partial: Path, share: Any, journal: str, num_threads: int) -> None:
    begin(journal)
    _make_share(graph, partial, share, journal, num_threads)


class Place:
    """An actor that only says where it is."""

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())


def place(workers: int) -> dict[str, list[str]]:
    """Nodes that Ray chooses for actors with the needs of signal workers, and of engines on GPUs."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

    from simmerge_ray.on_ray.signal_actors import spread_options

    offered = list(ray.cluster_resources())
    actor = ray.remote(Place)
    spread = [actor.options(**spread_options(signal_worker_needs(1e9, 0.0))).remote() for _ in range(workers)]
    nodes = {"workers": ray.get([one.node.remote() for one in spread])}
    for one in spread:
        ray.kill(one)
    for name, num_bytes, share, count in (("large", 30e9, 1.0, 1), ("halves", 20e9, 0.5, 2)):
        needs = engine_needs(num_bytes, 0.5, share, 1, offered)
        groups = [ray.util.placement_group([needs]) for _ in range(count)]
        inside = [{"num_cpus": 0.5, "scheduling_strategy": InGroup(group)} for group in groups]
        nodes[name] = ray.get([actor.options(**options).remote().node.remote() for options in inside])
        for group in groups:
            ray.util.remove_placement_group(group)
    return nodes


def main() -> None:
    directory, stage, *arguments = sys.argv[1:]
    os.environ[DIRECTORY] = directory
    import ray

    # Tasks and actors get it by their environment: nodes were started before.
    ray.init(runtime_env={"env_vars": {DIRECTORY: directory}}, log_to_driver=False, logging_level="warning")
    if stage == "place":
        sys.exit(run_job("place", lambda: place(int(arguments[0]))))
    if stage == "merge":
        merge_tasks.make_share = counting_share
        job = "merge_plan"
    else:
        merge_search.MergeTrial = CountingTrial  # type: ignore[misc]
        import simmerge_ray.signals.worker as worker

        worker.SignalWorker = CountingWorker  # type: ignore[misc]
        job = "build_dataset"
    sys.argv = [f"{job}.py", *arguments]
    try:
        runpy.run_path(f"jobs/{job}.py", run_name="__main__")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    # Under the name that workers import, so that they unpickle what is defined here.
    from tests.on_ray import on_nodes

    on_nodes.main()
