"""The shape of the model and the machine for its engines, where the user names neither."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import ValidationError

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import read_json
from simmerge_ray.capacity.machines import MACHINES
from simmerge_ray.capacity.simulation.costs import UnitCosts
from simmerge_ray.capacity.simulation.labels import place_engines
from simmerge_ray.capacity.simulation.workload import make_pool
from simmerge_ray.capacity.size import ModelSize, size_of
from simmerge_ray.checkpoints.size import model_shape


def read_shape(parameters: float, config: Path | None = None) -> ModelSize:
    """A model with so many parameters, of the shape in a `config.json`, or of the known model that is nearest in size.
    Raises ConfigError: the file cannot be read or says nothing of the shape; so few parameters do not have it."""
    if not math.isfinite(parameters):
        raise ConfigError(f"--params {parameters:g} is no number of parameters")
    try:
        if config is None:
            return size_of(parameters)
        content = read_json(config)
        if not isinstance(content, dict):
            raise ValueError("no config.json: it holds no object")
        text = content.get("text_config") or content
        shape, names = model_shape(text), ("layers", "hidden_size", "heads", "intermediate_size", "vocab_size")
        values = {
            "name": str(config),
            "parameters": parameters,
            **{name: getattr(shape, name) for name in names},
            # transformers' own default, which config.json leaves out
            "tied": text.get("tie_word_embeddings", content.get("tie_word_embeddings", True)),
            "dtype": "float32" if (text.get("dtype") or text.get("torch_dtype")) == "float32" else "bfloat16",
        }
        return ModelSize.model_validate(values)
    except OSError as error:
        raise ConfigError(f"{config}: {error.strerror}") from None
    except ValidationError as error:
        told = error.errors()[0]
        place, said = ".".join(map(str, told["loc"])), str(told["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"--params {parameters:g}: {place and place + ': '}{said}") from None
    except ValueError as error:
        raise ConfigError(f"{config}: {error}") from None


def cheapest_engine(model: ModelSize, cloud: str, costs: UnitCosts) -> str:
    """The machine with GPUs, of those of a cloud that the costs know, whose engines cost least an hour each. Raises
    ConfigError: none holds an engine."""
    prices: dict[str, float] = {}
    for machine, about in costs.assumed.machines.items():
        if about.cloud == cloud and machine in MACHINES and MACHINES[machine].gpus:
            pool = make_pool(machine, 1, costs)
            try:
                engines = place_engines(model, pool.resources, pool.gpu_gb, 1.0)
            except ConfigError:
                continue
            prices[machine] = pool.dollars / engines.per_node
    if not prices:
        size = f"{model.engine_bytes / 1e9:.0f} GB"
        raise ConfigError(f"no machine of {cloud} that the costs know holds an engine of {size}")
    return min(prices, key=prices.__getitem__)
