"""How long one decision takes in process: `NeuralLinearTS.suggest` with exact propensities, safe rule and floor.

    python -m benchmarks.service.recommend [--arms 3] [--dimensions 64] [--calls 5000]

Contexts have one more dimension, the bias. Threads are pinned to one. Posteriors have learned from some rewards, and
every call has another context and decision id, as in service; a second line learns a reward before each call, so that a
Cholesky factor has to be made anew. Prints one JSON object a line, in microseconds.
"""

from __future__ import annotations

import json
import time

from benchmarks.measuring import percentiles, pin_threads, script_parser

pin_threads()

import numpy as np  # noqa: E402

from simmerge_ray.service.bandit.policy import NeuralLinearTS, Noise, SafeRule  # noqa: E402
from simmerge_ray.service.bandit.posterior import GaussianPosterior  # noqa: E402

NUM_WARM_UP = 200


def policy_of(num_arms: int, num_dimensions: int, generator: np.random.Generator) -> NeuralLinearTS:
    """Arms that have seen a hundred rewards each."""
    posteriors = {}
    for arm in range(num_arms):
        prior = GaussianPosterior.prior(num_dimensions, 1.0, generator.normal(size=num_dimensions) * 0.02)
        seen = generator.normal(size=(100, num_dimensions))
        posteriors[f"arm{arm}"] = prior.fold((z, 0.1 * generator.normal()) for z in seen)
    return NeuralLinearTS(posteriors, Noise(0.01), SafeRule("arm0", 0.02), floor=0.02)


def measure(num_arms: int, num_dimensions: int, num_calls: int, learning: bool) -> dict[str, float]:
    """Percentiles over the calls, in microseconds."""
    generator = np.random.default_rng([num_arms, num_dimensions])
    policy = policy_of(num_arms, num_dimensions, generator)
    contexts = generator.normal(size=(NUM_WARM_UP + num_calls, num_dimensions))
    times = []
    for number, z in enumerate(contexts):
        if learning:
            policy.update([(f"arm{number % num_arms}", contexts[number - 1], 0.1)])
        start = time.perf_counter_ns()
        policy.suggest(z, f"decision-{number}")
        times.append((time.perf_counter_ns() - start) / 1000)
    kept = times[NUM_WARM_UP:]
    figures = percentiles(kept, (50, 90, 99), 1) | {"min": round(min(kept), 1)}
    return {f"{name}_us": value for name, value in figures.items()}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--arms", type=int, default=3)
    parser.add_argument("--dimensions", type=int, default=64, help="of the encoder; the bias is one more")
    parser.add_argument("--calls", type=int, default=5000)
    given = parser.parse_args()
    for learning in (False, True):
        result = measure(given.arms, given.dimensions + 1, given.calls, learning)
        about = {"arms": given.arms, "dimensions": given.dimensions + 1, "calls": given.calls}
        print(json.dumps({**about, "a reward before each call": learning, **result}))


if __name__ == "__main__":
    main()
