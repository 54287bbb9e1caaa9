"""One frozen, closed config per job. Nothing here reads the environment, and nobody changes a config later.

Paths in a YAML file are relative to that file; `Place`s may be URIs (`s3://`, `gs://`).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import Place, place_in

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
    """Ground-truth merge-and-evaluate search: pairs x arms, or with a `budget` the best merge that can be found."""

    arms: tuple[str, ...] = Field(
        ("linear", "nuslerp", "task_arithmetic", "ties(density=0.2)"), min_length=1, description="arms to try on a pair"
    )
    pairs: str = Field("cross-task", pattern="^(cross-task|all)$", description="which pairs of checkpoints to merge")
    exclude: tuple[tuple[str, str], ...] = Field((), description="pairs to leave out, e.g. to test on")

    evaluator: str = Field("vllm", pattern="^(vllm|transformers)$", description="what evaluates; said in every label")
    dtype: str = Field("float32", pattern="^(float32|bfloat16)$", description="dtype of the engine")
    max_model_len: int | None = Field(
        None, ge=8, description="longest prompt + answer in tokens; None takes the model's own limit, at most 4096"
    )
    max_items: int | None = Field(None, ge=1, description="items of each task, a sample by `seed`; None takes all")
    seed: int = Field(0, description="of the sample of items and of the search's proposals")
    lm_eval: tuple[str, ...] = Field((), description="tasks of lm-evaluation-harness by name")
    lm_eval_include: Path | None = Field(None, description="directory of lm-evaluation-harness task YAML files")
    lm_eval_fewshot: int | None = Field(None, ge=0, description="examples before each prompt; None: as the task says")

    concurrency: int | None = Field(None, ge=1, description="engines at the same time; None: as many as fit")
    cpus_per_trial: float = Field(1.0, ge=0, description="CPU cores of an engine or of each rank; up to four merge")
    gpus_per_trial: float = Field(0.0, ge=0, description="GPUs of an engine; a fraction for small models")
    tensor_parallel: int = Field(1, ge=1, description="ranks that a model is split over")
    executor: str = Field("mp", pattern="^(mp|ray)$", description="ranks on one node (mp) or over several (ray)")

    max_trials: int | None = Field(None, ge=1, description="stop after so many trials")
    max_hours: float | None = Field(None, gt=0, description="stop after so long")
    max_gpu_hours: float | None = Field(None, gt=0, description="stop when engines have held GPUs for so long")
    retry_infeasible: bool = Field(False, description="evaluate merges again that could not be measured")

    budget: int | None = Field(None, ge=1, description="merges to try in a search for the best one; None: pairs x arms")
    objectives: tuple[str, ...] = Field(
        ("mean",), min_length=1, description="mean, worst, a task, or math=2,code=1; several keep the Pareto front"
    )
    sampler: str = Field("tpe", pattern="^(tpe|cmaes|random)$", description="what proposes merges")
    members: tuple[str, ...] = Field((), description="checkpoints to merge; none named: all")
    ways: tuple[int, int] = Field((2, 2), description="fewest and most checkpoints of a merge")
    layer_groups: int = Field(1, ge=1, le=16, description="anchors of a step's weight over the depth of the model")
    shards: int | None = Field(None, ge=1, description="parts of the items; a bad trial stops after some (None: 4)")
    reduction_factor: int = Field(3, ge=2, description="one trial of so many goes on after a part of the items")

    @property
    def num_shards(self) -> int:
        """Parts of the items of a proposed trial; several objectives cannot be compared part by part."""
        return 1 if self.budget is None or len(self.objectives) > 1 else self.shards or 4

    def content(self) -> dict[str, Any]:
        """What the labels depend on: everything but how much is run where, and when it stops."""
        resources = {"concurrency", "cpus_per_trial", "gpus_per_trial", "tensor_parallel", "executor"}
        return self.model_dump(mode="json", exclude=resources | {"max_trials", "max_hours", "max_gpu_hours"})


class TrainConfig(_Config):
    """Selector training."""

    model: str = Field("mlp", pattern="^(mlp|ridge|knn|forest)$", description="what predicts utilities from signals")
    task_encoding: str = Field(
        "none", pattern="^(none|onehot|probe_stats)$", description="what is said about the task beside the signals"
    )
    hidden_sizes: tuple[int, ...] = Field((32, 16), min_length=1, description="mlp: layers of the encoder")
    num_members: int = Field(5, ge=1, description="mlp: networks in the ensemble")
    num_epochs: int = Field(300, ge=1, description="mlp: steps on all contexts")
    learning_rate: float = Field(3e-3, gt=0, description="mlp: of AdamW, decaying to 0")
    weight_decay: float = Field(1e-2, ge=0, description="mlp: of AdamW")
    penalties: tuple[float, ...] = Field(
        (1.0, 10.0, 100.0, 1000.0, 10000.0), min_length=1, description="ridge: penalties to choose from"
    )
    neighbours: tuple[int, ...] = Field((4, 8, 16, 32), min_length=1, description="knn: numbers to choose from")
    num_trees: int = Field(60, ge=1, description="forest: trees for the level, and as many for the contrasts")
    min_samples_leaf: int = Field(3, ge=1, description="forest: fewest rows in a leaf; a context has two rows")
    num_folds: int = Field(12, ge=2, description="at most so many groups of checkpoints are left out in turn")
    novelty_quantile: float = Field(
        0.99, gt=0, le=1, description="of the training distances; what lies beyond is not answered"
    )
    seed: int = 0

    @field_validator("penalties", "neighbours")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(value <= 0 for value in values):
            raise ValueError("every value must be above 0")
        return values


class DatasetConfig(_Config):
    """Dataset of a catalogue: signals of all pairs, then labels. `jobs/build_dataset.py` runs it."""

    catalogue: Place
    probes: Place | None = Field(None, description="directory of <task>.jsonl, a `text` per line; None: general ones")
    tasks: Place | None = Field(None, description="directory of <task>.jsonl files, `prompt` and `target` per line")
    out: Place
    signals: SignalsConfig = SignalsConfig()
    search: SearchConfig = SearchConfig()


class StudyConfig(_Config):
    """The study that says whether selection works: a zoo of its own, trained and labelled. `jobs/study.py` runs it."""

    num_bases: int = Field(12, ge=1, description="bases of different seeds")
    num_per_domain: int = Field(3, ge=1, description="experts of each base and domain, with recipes drawn at random")
    num_large_per_domain: int = Field(2, ge=0, description="the same for the large base; 0 leaves it out")
    num_items: int = Field(400, ge=4, description="evaluation items of each task")
    num_probes: int = Field(64, ge=1, description="probes of each task")
    num_subsets: dict[int, int] = Field(
        {3: 4, 4: 4, 5: 2, 6: 1}, description="of each base: how many subsets of so many checkpoints are merged"
    )
    num_orders: int = Field(1, ge=1, description="random orders of each arm and subset, beside the expert last")
    num_mixed: int = Field(4, ge=0, description="plans of each subset and weighting with an arm drawn for each step")
    step_share: float = Field(1.0, gt=0, le=1, description="of the training steps; below 1 for a trial run")
    num_full: int = Field(6, ge=0, description="checkpoints of the first base of which every subset is merged")
    evaluator: str = Field("vllm", pattern="^(vllm|transformers)$", description="what evaluates")
    concurrency: int | None = Field(None, ge=1, description="engines at the same time; None: as many as fit")


class ServeConfig(_Config):
    """HTTP endpoint of a selector."""

    selector: Path
    signals: Path
    catalogue: Path | None = Field(None, description="for better plans")
    out: Path | None = Field(
        None, description="event log, tokens and selectors; default: `service` beside the selector"
    )
    database: str | None = Field(None, description="URL; default: SQLite in `out`")
    namespace: str = Field("default", min_length=1, max_length=200)
    tokens: Path | None = Field(None, description="YAML file; default: one that is made in `out`")
    floor: float = Field(0.02, gt=0, lt=1, description="probability that every arm is played with at least")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    num_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1, description="under load")


class RetrainConfig(_Config):
    """A new selector from the rewards of a service."""

    database: str = Field(min_length=1, description="URL of the event log")
    namespace: str = Field("default", min_length=1, max_length=200, description="of the log")
    registry: Path
    dataset: Path
    out: Path
    margin: float = Field(0.03, ge=0, le=1, description="what counts as not worse, in utility and in GapClosed")
    held_out: float = Field(0.25, gt=0, lt=1, description="share of the rewards, the last ones, to compare on")


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


def load_yaml(path: Place, model: type[ConfigType]) -> ConfigType:
    """Read a config file; its relative paths are taken from the file's directory.

    Raises:
        ConfigError: no such file, not YAML, or not this config, with every problem.
    """
    return _with_paths_from(check_config(model, _read_mapping(path, model), f"config {path}"), path.parent)


def load_yaml_leniently(path: Place, model: type[ConfigType]) -> tuple[ConfigType | None, list[str]]:
    """`load_yaml`, but what is wrong with single values is returned, and the config goes without these values, so that
    the rest can be checked as well; None where it cannot.

    Raises:
        ConfigError: no such file, or not a YAML mapping.
    """
    values = _read_mapping(path, model)
    try:
        return _with_paths_from(model(**values), path.parent), []
    except ValidationError as error:
        problems = _problem_lines(error, model)
        for problem in error.errors():
            _remove(values, problem["loc"])
    try:
        return _with_paths_from(model(**values), path.parent), problems
    except ValidationError:
        return None, problems


def _remove(values: Any, where: tuple[int | str, ...]) -> None:
    """Take a value out of nested mappings; of a list, which a part may make invalid, all of it."""
    for part in where[:-1]:
        if not isinstance(values, dict) or not isinstance(values.get(part), dict):
            break
        values = values[part]
    else:
        part = where[-1]
    if isinstance(values, dict):
        values.pop(part, None)


def _read_mapping(path: Place, model: type[BaseModel]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must be a mapping with the keys {', '.join(sorted(model.model_fields))}")
    return values


def _with_paths_from(config: ConfigType, directory: Place) -> ConfigType:
    """The config with its relative paths, those of the configs in it too, taken from a directory."""
    update: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Path):
            update[name] = place_in(directory, value)
        elif isinstance(value, BaseModel):
            update[name] = _with_paths_from(value, directory)
    return config.model_copy(update=update)
