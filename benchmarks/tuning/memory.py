"""Peak memory of tuning two members of SmolLM2-135M's shape in float32, against what is stated before it starts.

    python -m benchmarks.tuning.memory OUT [--num-tokens 32]

Peak: anonymous memory of this process above what it holds with its libraries loaded, from the first checkpoint to the
last step. Targets: peak at most the stated bytes and 10 %, stated at most 5 x the model in float32.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.measuring import PeakMemory, machine, pin_threads, script_parser, write_result


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="directory for the checkpoints and memory.json")
    parser.add_argument("--num-probes", type=int, default=32, help="of each member")
    parser.add_argument("--num-tokens", type=int, default=32, help="of a probe")
    parser.add_argument("--groups", default="layer")
    args = parser.parse_args()
    pin_threads()
    import torch

    from benchmarks.tuning.shapes import make_checkpoints, make_probes
    from simmerge_ray.base.config import TuneConfig
    from simmerge_ray.checkpoints.headers import read_headers
    from simmerge_ray.signals.tuning.run import TuningJob, run_tuning

    torch.set_num_threads(1)
    catalogue = make_checkpoints(args.out / "checkpoints")
    config = TuneConfig(num_steps=2, groups=args.groups)
    state_file = args.out / "state.npz"
    state_file.unlink(missing_ok=True)
    job = TuningJob(catalogue, make_probes(args.num_probes, args.num_tokens), config, state_file)
    with PeakMemory() as memory:
        tuned = run_tuning(job)
    model = sum(spec.num_bytes for spec in read_headers(catalogue.checkpoints[0]).values())
    result = {
        "model_bytes": model,
        "stated_bytes": job.num_bytes,
        "peak_bytes": memory.above_start,
        "peak_over_stated": memory.above_start / job.num_bytes,
        "stated_over_model": job.num_bytes / model,
        "objectives": tuned.state.objectives,
    }
    write_result(args.out / "memory.json", result)
    print(
        f"model {model / 1e6:.0f} MB, stated {job.num_bytes / 1e6:.0f} MB ({result['stated_over_model']:.2f} x), peak "
        f"{memory.above_start / 1e6:.0f} MB ({result['peak_over_stated']:.3f} of it); load {machine()['load']:.1f}"
    )


if __name__ == "__main__":
    main()
