"""The shape of the model and the machine for its engines, where the user names neither."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from simmerge_ray.cluster_lint import MACHINES
from simmerge_ray.errors import ConfigError
from simmerge_ray.model_size import ModelSize, size_of
from simmerge_ray.signals.signature import model_shape
from simmerge_ray.simulation.costs import Costs
from simmerge_ray.simulation.labels import place_engines
from simmerge_ray.simulation.study import make_pool


def read_shape(parameters: float, config: Path | None = None) -> ModelSize:
    """A model with so many parameters, of the shape in a `config.json`, or of the known model that is nearest in size.

    Raises:
        ConfigError: the file cannot be read or says nothing of the shape; so few parameters do not have it.
    """
    try:
        if config is None:
            return size_of(parameters)
        content = json.loads(config.read_text())
        shape = model_shape(content)
        text = content.get("text_config", content)
        return ModelSize(
            name=str(config),
            parameters=parameters,
            layers=shape["layers"],
            hidden_size=shape["hidden"],
            heads=shape["heads"],
            intermediate_size=int(text.get("intermediate_size") or 4 * shape["hidden"]),
            vocab_size=shape["vocabulary"],
            tied=bool(content.get("tie_word_embeddings", False)),
        )
    except OSError as error:
        raise ConfigError(f"{config}: {error.strerror}") from None
    except ValidationError as error:
        told = error.errors()[0]
        place = ".".join(map(str, told["loc"]))
        said = str(told["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"--params {parameters:g}: {place and place + ': '}{said}") from None
    except ValueError as error:
        raise ConfigError(f"{config}: {error}") from None


def cheapest_engine(model: ModelSize, costs: Costs) -> str:
    """The machine with GPUs, of those that the costs know, whose engines cost least an hour each.

    Raises:
        ConfigError: none holds an engine.
    """
    prices: dict[str, float] = {}
    for machine in costs.assumed.machines:
        if machine in MACHINES and MACHINES[machine][2]:
            pool = make_pool(machine, 1, costs)
            try:
                engines = place_engines(model, pool.resources, pool.gpu_gb, 1.0)
            except ConfigError:
                continue
            prices[machine] = pool.dollars / engines.per_node
    if not prices:
        raise ConfigError(f"no machine that the costs know holds an engine of {model.engine_bytes / 1e9:.0f} GB")
    return min(prices, key=prices.__getitem__)
