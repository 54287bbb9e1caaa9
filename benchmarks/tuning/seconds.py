"""What tuning per layer takes, against one full evaluation of one merge: both members' tasks, all items.

    python -m benchmarks.tuning.seconds ZOO OUT [--left math-strong --right rag-strong]
    python -m benchmarks.tuning.seconds --large OUT

ZOO: of `simmerge demo` (catalogue.yaml, probes, tasks). One thread; the sides alternate, and the ratio is of processor
time, so that other work on the machine counts little. Target: at most 6. `--large` takes SmolLM2-135M's shape with
random weights: two steps of tuning and 16 items of 32 tokens that answer with 14, each scaled to the default number of
steps and to 800 items (answers in full length: random weights do not stop early).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring import Seconds, alternate, machine, pin_threads, script_parser, timed, write_result


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("places", type=Path, nargs="+", help="ZOO OUT, or OUT with --large")
    parser.add_argument("--left", default="math-strong")
    parser.add_argument("--right", default="rag-strong")
    parser.add_argument("--groups", default="layer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    pin_threads()
    import torch

    torch.set_num_threads(1)
    out = args.places[-1]
    sides, scales = large(out, args.groups) if args.large else zoo(args.places[0], out, args)
    rounds = alternate(sides, args.rounds, num_warm_up=0 if args.large else 1)
    cpu = {name: scales[name] * sorted(one.cpu for one in found)[len(found) // 2] for name, found in rounds.items()}
    ratio = cpu["tune"] / cpu["evaluate"]
    wall = {name: [scales[name] * one.wall for one in found] for name, found in rounds.items()}
    write_result(out / "seconds.json", {"cpu": cpu, "wall": wall, "ratio": ratio, "groups": args.groups})
    print(
        f"tune per {args.groups} {cpu['tune']:.1f} s, evaluate {cpu['evaluate']:.1f} s of processor time: "
        f"{ratio:.2f} x; load {machine()['load']:.1f}"
    )


def zoo(directory: Path, out: Path, args: Any) -> tuple[dict[str, Callable[[], Seconds]], dict[str, float]]:
    """The two sides on the demo's zoo, and what their seconds are multiplied by."""
    from simmerge_ray.base.config import TuneConfig
    from simmerge_ray.checkpoints.probes import load_probe_sets
    from simmerge_ray.pipelines.tune import tuning_job, tuning_sources
    from simmerge_ray.plans.plan import MergePlan, resolve_plan
    from simmerge_ray.plans.recipe import plain_average
    from simmerge_ray.search.evaluation.files import load_tasks
    from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
    from simmerge_ray.signals.tuning.run import run_tuning

    members = (args.left, args.right)
    catalogue, _ = tuning_sources(directory / "catalogue.yaml", members, directory / "probes")
    probe_sets, config = load_probe_sets(directory / "probes"), TuneConfig(groups=args.groups)
    tasks = [load_tasks(directory / "tasks")[str(catalogue.own_task[member])] for member in members]
    merge = resolve_plan(MergePlan(recipe=plain_average(members)), catalogue)
    evaluator = TransformersEvaluator(catalogue.checkpoints[0])

    def tune() -> Seconds:
        job = tuning_job(catalogue, probe_sets, config, out)
        job.state_file.unlink(missing_ok=True)
        return timed(lambda: run_tuning(job))[1]

    def evaluate() -> Seconds:
        def call() -> None:
            evaluator.load(merge)
            for task in tasks:
                task.evaluate(evaluator)

        return timed(call)[1]

    return {"tune": tune, "evaluate": evaluate}, {"tune": 1.0, "evaluate": 1.0}


def large(out: Path, groups: str) -> tuple[dict[str, Callable[[], Seconds]], dict[str, float]]:
    """The same on random checkpoints of SmolLM2-135M's shape, fewer steps and items."""
    import torch

    from benchmarks.tuning.shapes import SMOLLM2_135M, make_checkpoints, make_probes
    from simmerge_ray.base.config import TuneConfig
    from simmerge_ray.merging.model import load_model
    from simmerge_ray.signals.tuning.prepare import prepare_tuning
    from simmerge_ray.signals.tuning.tuner import tune_coefficients

    num_steps, num_items, answer = 2, 16, 14
    catalogue, batches = make_checkpoints(out / "checkpoints"), make_probes(64, 32)
    config = TuneConfig(num_steps=num_steps, groups=groups)
    prepared = prepare_tuning(catalogue, batches, config)
    model = load_model(catalogue.checkpoints[0])
    ids = torch.randint(1, SMOLLM2_135M["vocab_size"], (num_items, 32))

    def tune() -> Seconds:
        return timed(lambda: tune_coefficients(prepared.model, prepared.batches, prepared.start, config))[1]

    def evaluate() -> Seconds:
        return timed(
            lambda: model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer, do_sample=False, pad_token_id=0
            )
        )[1]

    return (
        {"tune": tune, "evaluate": evaluate},
        {"tune": TuneConfig().num_steps / num_steps, "evaluate": 800 / num_items},
    )


if __name__ == "__main__":
    main()
