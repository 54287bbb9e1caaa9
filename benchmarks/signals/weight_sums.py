"""What an element costs in the sample of weights and in the exact sums over M checkpoints, on one thread."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.measuring import pin_threads, timed

pin_threads()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from simmerge_ray.checkpoints.references import CheckpointRef  # noqa: E402
from simmerge_ray.signals.samples import TensorBlocks, exact_sums, tensor_sample, trim_thresholds  # noqa: E402
from simmerge_ray.signals.weights import BLOCK_ELEMENTS  # noqa: E402

NUM_ELEMENTS, COUNT, NAME = 8_000_000, 10_000, "w"
MOST, REPETITIONS = 32, 3


def make_checkpoints(root: Path) -> list[CheckpointRef]:
    """A base and noisy copies, each of one tensor."""
    generator = torch.Generator().manual_seed(0)
    base, found = torch.randn(NUM_ELEMENTS, generator=generator), []
    for number in range(MOST + 1):
        path = root / f"m{number}"
        path.mkdir()
        noise = 0.1 * torch.randn(NUM_ELEMENTS, generator=generator) if number else 0.0
        save_file({NAME: (base + noise).bfloat16().reshape(2000, -1)}, path / "model.safetensors")
        (path / "config.json").write_text("{}")
        found.append(CheckpointRef(path.name, path))
    return found


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        refs = make_checkpoints(Path(root))
        blocks = [TensorBlocks(ref, BLOCK_ELEMENTS) for ref in refs]
        samples = [tensor_sample(NAME, one, blocks[0], COUNT) for one in blocks]  # the first ones compile the loops
        samples, taken = timed(lambda: [tensor_sample(NAME, one, blocks[0], COUNT) for one in blocks])
        print(f"sample: {taken.cpu / len(blocks) / NUM_ELEMENTS * 1e9:.2f} ns an element")
        for count in (2, 4, 8, 16, MOST):
            limits = trim_thresholds(samples[: count + 1])
            sums = partial(exact_sums, NAME, blocks[: count + 1], blocks[0], limits, BLOCK_ELEMENTS)
            each = median(timed(sums)[1].cpu for _ in range(REPETITIONS)) / NUM_ELEMENTS / count
            print(f"sums of {count} and their base: {each * 1e9:.2f} ns an element and checkpoint")


if __name__ == "__main__":
    main()
