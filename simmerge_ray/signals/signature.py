"""Signatures: what is kept of one checkpoint, so that pairs can be computed later without its weights.

Two kinds of files in a store, each written once under the digest of all it was computed from: *outputs* of a checkpoint
on one task's probes, and its *weights* (a fixed sample of coordinates, exact norms and trim thresholds). So a new task
costs forward passes only, a new checkpoint only its own, and a new upload under an old name has new signatures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.arrays import load_arrays
from simmerge_ray.base.config import SignalsConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import Place, as_place, digest_json, write_atomically
from simmerge_ray.checkpoints.size import model_shape

SCHEMA = 1
NUM_GREEDY_TOKENS = 8  # of the base's continuation of a probe
GREEDY_SHARE = 4  # one sampled greedy position for so many sampled prompt positions
DENSITIES = (0.1, 0.2, 0.5)  # of the arms; trim thresholds are exact for these


@dataclass(frozen=True)
class SignatureSpec:
    """How much a signature keeps, and the micro-batches that it is computed in.

    num_positions: sampled prompt positions per task (a quarter of it greedy ones on top). num_attention_positions: at
    how many of them attention rows are kept. num_coordinates: per tensor; smaller tensors are kept whole.
    """

    batch_size: int = 16
    max_tokens: int = 256
    num_positions: int = 64
    num_attention_positions: int = 16
    num_coordinates: int = 10_000

    @staticmethod
    def of(config: SignalsConfig) -> SignatureSpec:
        """What a config says of it."""
        return SignatureSpec(**{name: getattr(config, name) for name in SignatureSpec.__match_args__})


@dataclass(frozen=True)
class TaskOutputs:
    """Outputs of one checkpoint, or of a virtual one, at the S sampled positions of one task; float32.

    logits: (S, V). hidden: (L + 1, S, D). attention: (L, H, Sa, K), rows over at most K keys, zero behind the position.
    greedy: (S,) bool. next_token: (S,) int64, -1 where there is none. probe: (S,) int64, index of the probe.
    attention_probe: (Sa,) int64.
    """

    logits: np.ndarray
    hidden: np.ndarray
    attention: np.ndarray
    greedy: np.ndarray
    next_token: np.ndarray
    probe: np.ndarray
    attention_probe: np.ndarray


@dataclass(frozen=True)
class TensorSample:
    """What a signature keeps of one tensor of n elements: S coordinates, or all where n is small.

    num_elements: n. values: (S,) float32, the weights at the sampled coordinates. sums: (3,) float64, exact
    `<c, c>, <c, d>, <d, d>` with the base c and the task vector d; without a base `0, 0, <w, w>`; of the base itself
    `<c, c>, 0, 0`. thresholds: (len(DENSITIES),) float32, the smallest magnitude of d that trimming keeps; NaN without
    a base.
    """

    num_elements: int
    values: np.ndarray
    sums: np.ndarray
    thresholds: np.ndarray

    @property
    def scale(self) -> float:
        """n / S: what sums over the sample are multiplied by."""
        return self.num_elements / len(self.values)


Weights = Mapping[str, TensorSample]


def coordinates(name: str, num_elements: int, count: int) -> np.ndarray:
    """Sorted flat indices of the sampled coordinates of a tensor, the same for every checkpoint; (S,) int64."""
    if num_elements <= count:
        return np.arange(num_elements)
    seed = int.from_bytes(hashlib.blake2b(f"{name}\0{num_elements}".encode(), digest_size=8).digest(), "little")
    return np.sort(np.random.default_rng(seed).choice(num_elements, count, replace=False, shuffle=False))


def outputs_key(checkpoint_digest: str, tokens_digest: str) -> str:
    """Digest of all that a checkpoint's outputs on one task were computed from."""
    return digest_json(["outputs", SCHEMA, checkpoint_digest, tokens_digest, "float32"])


def weights_key(checkpoint_digest: str, base_digest: str | None, spec: SignatureSpec) -> str:
    """Digest of all that a checkpoint's sample of weights was computed from."""
    return digest_json(["weights", SCHEMA, checkpoint_digest, base_digest, spec.num_coordinates, list(DENSITIES)])


class SignatureStore:
    """Signatures under one URI. Objects are written once and whole; a damaged one is an error that names it."""

    def __init__(self, uri: str | Place) -> None:
        self.uri = str(uri).rstrip("/")

    def path(self, kind: str, key: str) -> str:
        return f"{self.uri}/{kind}-{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        return as_place(self.path(kind, key)).exists()

    def write(self, kind: str, key: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Write arrays by name; `about` goes into the file's metadata."""
        from safetensors.numpy import save

        kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_atomically(self.path(kind, key), save(kept, metadata={"simmerge_ray": json.dumps(about)}))

    def read(self, kind: str, key: str) -> dict[str, np.ndarray]:
        """Arrays by name. Raises ConfigError: there is no such object, or it is damaged."""
        try:
            return load_arrays(self.path(kind, key))
        except FileNotFoundError:
            raise ConfigError(f"no {kind} {key} in the signature store {self.uri}") from None
        except (OSError, ValueError) as error:
            raise self._damaged(kind, key, error) from None

    def _damaged(self, kind: str, key: str, error: Exception) -> ConfigError:
        return ConfigError(f"{self.path(kind, key)} is damaged ({error}); delete it and run again")

    def write_parts(self, kind: str, key: str, parts: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write dataclasses of arrays and numbers, by name."""
        arrays = {f"{name}/{field}": value for name, part in parts.items() for field, value in vars(part).items()}
        self.write(kind, key, {name: np.atleast_1d(value) for name, value in arrays.items()}, about)

    def read_parts(self, kind: str, key: str) -> dict[str, dict[str, np.ndarray]]:
        """The fields of what `write_parts` wrote, by name."""
        parts: dict[str, dict[str, np.ndarray]] = {}
        for path, array in sorted(self.read(kind, key).items()):
            name, _, field = path.rpartition("/")
            parts.setdefault(name, {})[field] = array
        return parts

    def read_outputs(self, key: str, kind: str = "outputs") -> TaskOutputs:
        """Raises ConfigError: as `read`, or its arrays do not fit each other."""
        arrays = self.read(kind, key)
        try:
            return _checked_outputs(TaskOutputs(**arrays))
        except (TypeError, ValueError) as error:
            raise self._damaged(kind, key, error) from None

    def read_weights(self, key: str) -> dict[str, TensorSample]:
        """Raises ConfigError: as `read`, or its arrays do not fit each other."""
        try:
            return {
                name: _checked_sample(TensorSample(int(fields.pop("num_elements").item()), **fields))
                for name, fields in self.read_parts("weights", key).items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged("weights", key, error) from None


def _checked_outputs(outputs: TaskOutputs) -> TaskOutputs:
    """Raises ValueError: the arrays have not the shapes that `TaskOutputs` says."""
    num, num_rows = len(outputs.probe), len(outputs.attention_probe)
    sides = {"logits": 2, "hidden": 3, "attention": 4, "greedy": 1, "next_token": 1, "probe": 1, "attention_probe": 1}
    found = {name: getattr(outputs, name).shape for name in sides}
    fit = all(len(found[name]) == count for name, count in sides.items()) and (
        found["logits"][0] == found["hidden"][1] == len(outputs.greedy) == len(outputs.next_token) == num
        and found["attention"][2] == num_rows
    )
    if not fit:
        raise ValueError(f"its arrays have the shapes {found}")
    return outputs


def _checked_sample(sample: TensorSample) -> TensorSample:
    """Raises ValueError: the arrays have not the shapes that `TensorSample` says."""
    shapes = sample.values.shape, sample.sums.shape, sample.thresholds.shape
    if len(shapes[0]) != 1 or shapes[1:] != ((3,), (len(DENSITIES),)) or not len(sample.values) <= sample.num_elements:
        raise ValueError(f"a sample of {sample.num_elements} elements has arrays of the shapes {shapes}")
    return sample


def outputs_bytes(spec: SignatureSpec, config: Mapping[str, Any], num_tokens: int) -> int:
    """Size of one checkpoint's outputs on one task, from its `config.json`."""
    shape = model_shape(config)
    positions = spec.num_positions + math.ceil(spec.num_positions / GREEDY_SHARE)
    logits = positions * shape.vocab_size
    hidden = (shape.layers + 1) * positions * shape.hidden_size
    attention = shape.layers * shape.heads * min(spec.num_attention_positions, positions) * num_tokens
    return 4 * (logits + hidden + attention)


def weights_bytes(spec: SignatureSpec, sizes: Sequence[int]) -> int:
    """Size of one checkpoint's sample of weights, from the numbers of elements of its tensors."""
    return sum(4 * min(size, spec.num_coordinates) + 200 for size in sizes)
