"""Arrays in a safetensors file that another run, or somebody else, wrote: the artifacts of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simmerge_ray.base.errors import shown_value
from simmerge_ray.base.storage import Place, read_bytes

if TYPE_CHECKING:
    import numpy as np

MAX_EMPTY = 1 << 24  # the longest side of an array without elements, which takes no byte of its file


def load_arrays(uri: str | Place) -> dict[str, np.ndarray]:
    """All arrays by name, whole in memory. Raises OSError: see `read_bytes`. ValueError: it is no sound file, or an
    array of no bytes has a shape that arithmetic with it would need the whole memory for.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: dict[str, np.ndarray] = load(read_bytes(uri))
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    except KeyError as error:
        raise ValueError(f"numpy has no dtype {error}") from None
    for name, array in arrays.items():
        if not array.size and max(array.shape) > MAX_EMPTY:
            raise ValueError(f"array {shown_value(name)} has no elements and the shape {array.shape}")
    return arrays
