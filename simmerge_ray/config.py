"""One frozen, closed config per job. Nothing here reads the environment, and nobody changes a config later.

Paths in a YAML file are relative to that file.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from simmerge_ray.errors import ConfigError

ConfigType = TypeVar("ConfigType", bound=BaseModel)


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SignalsConfig(_Config):
    """Signals of all pairs of a catalogue."""

    num_workers: int = Field(2, ge=1, description="signal actors; 0 is not allowed, 1 is one actor")
    gpus_per_worker: float = Field(0.0, ge=0, description="share of a GPU for each actor; 0 runs on CPU cores")
    memory_per_worker: float | None = Field(
        None, gt=0, description="GB for weights and activations; a checkpoint that needs more is run layer by layer"
    )
    weights: str = Field("exact", pattern="^(exact|sampled)$", description="weight signals of all weights or a sample")
    batch_size: int = Field(16, ge=1, description="probes per micro-batch, the fixed unit of work")
    max_tokens: int = Field(256, ge=2, description="longest probe in tokens; a longer one is an error")
    num_positions: int = Field(64, ge=1, description="sampled token positions per task; a quarter more greedy ones")
    num_attention_positions: int = Field(16, ge=1, description="at how many of them attention rows are kept")
    num_coordinates: int = Field(10_000, ge=1, description="sampled coordinates per tensor")


class SearchConfig(_Config):
    """Ground-truth merge-and-evaluate search."""

    arms: tuple[str, ...] = Field(
        ("linear", "nuslerp", "task_arithmetic", "ties(density=0.2)"), min_length=1, description="arms to try on a pair"
    )
    pairs: str = Field("cross-task", pattern="^(cross-task|all)$", description="which pairs of checkpoints to merge")
    exclude: tuple[tuple[str, str], ...] = Field((), description="pairs to leave out, e.g. to test on")
    evaluator: str = Field("vllm", pattern="^(vllm|transformers)$", description="what evaluates; said in every label")
    concurrency: int = Field(2, ge=1, description="trial actors at the same time, one engine each")
    dtype: str = Field("float32", pattern="^(float32|bfloat16)$", description="dtype of the engine")
    max_model_len: int | None = Field(
        None, ge=8, description="longest prompt + answer in tokens; None takes the model's own limit, at most 4096"
    )


class TrainConfig(_Config):
    """Selector training."""

    hidden_sizes: tuple[int, ...] = Field((32, 16), min_length=1)
    num_members: int = Field(5, ge=1, description="networks in the ensemble")
    num_epochs: int = Field(300, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    seed: int = 0


class StudyConfig(_Config):
    """Dataset of a catalogue: signals of all pairs, then labels. `jobs/build_dataset.py` runs it."""

    catalogue: Path
    probes: Path = Field(description="directory of <task>.jsonl files with a `text` per line")
    tasks: Path = Field(description="directory of <task>.jsonl files with a `prompt` and a `target` per line")
    out: Path
    signals: SignalsConfig = SignalsConfig()
    search: SearchConfig = SearchConfig()


class ServeConfig(_Config):
    """HTTP endpoint of a selector."""

    selector: Path
    signals: Path
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    num_replicas: int = Field(1, ge=1)


def _problem_lines(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line a problem: where, value, rule, and the nearest known key for an unknown one."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            owner: type[BaseModel] = model
            for part in problem["loc"][:-1]:
                annotation = owner.model_fields[str(part)].annotation if str(part) in owner.model_fields else None
                if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                    owner = annotation
            known = sorted(owner.model_fields)
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            lines.append(f"unknown key {where!r}{hint}; known: {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"key {where!r} is missing")
        else:
            lines.append(f"{where!r}: {problem['msg']}, got {problem['input']!r}")
    return lines


def check_config(model: type[ConfigType], values: dict[str, Any], source: str) -> ConfigType:
    """Build a config.

    Raises:
        ConfigError: with every problem, one a line.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError("\n  ".join([f"{source}:", *_problem_lines(error, model)])) from None


def load_yaml(path: Path, model: type[ConfigType]) -> ConfigType:
    """Read a config file; its relative paths are taken from the file's directory.

    Raises:
        ConfigError: no such file, not YAML, or not this config, with every problem.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must be a mapping with the keys {', '.join(sorted(model.model_fields))}")
    config = check_config(model, values, f"config {path}")
    paths = {
        name: (path.parent / value).resolve()
        for name in type(config).model_fields
        if isinstance(value := getattr(config, name), Path)
    }
    return config.model_copy(update=paths)
