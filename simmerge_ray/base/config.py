"""One frozen, closed config per job. Nothing here reads the environment, and a config is never changed.

Paths in a YAML file are relative to that file; `Place`s may be URIs (`s3://`, `gs://`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from simmerge_ray.base.config_problems import ToldPlainly, problem_lines
from simmerge_ray.base.errors import ConfigError, problem_list
from simmerge_ray.base.storage import Place, file_names, place_in, read_text
from simmerge_ray.base.yaml_text import YamlError, parse_yaml

ConfigType = TypeVar("ConfigType", bound=BaseModel)


class FrozenConfig(BaseModel, metaclass=ToldPlainly):
    """Raises ConfigError: with every problem, one a line. Models in models and `model_validate` raise pydantic's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def option(
    default: Any,
    description: str,
    *,
    flag: str | None = None,
    panel: str | None = None,
    shown: str | None = None,
    **rules: Any,
) -> Any:
    """A field that is an option of commands as well (`cli.options`); other fields are set in YAML only.

    Args:
        flag: name of the option without its dashes, if it is not the field's; `arm` of `arms`, once for each value.
        panel: heading of the option in `--help`.
        shown: the default in `--help`, if it is not the default's own text.
        rules: of `pydantic.Field`, such as `ge`.
    """
    extra: Any = {"flag": flag, "panel": panel, "shown": shown}
    return Field(default, description=description, json_schema_extra={"option": extra}, **rules)


def parse_ways(text: str) -> tuple[int, int]:
    """`3` or `2-4`. Raises ConfigError: the text has neither form."""
    low, _, high = text.partition("-")
    if not (low.isdecimal() and (high or low).isdecimal()):
        raise ConfigError(f"ways is a number of checkpoints or a range, 3 or 2-4, got {text!r}")
    return int(low), int(high or low)


def _parse_pair(text: str) -> tuple[str, ...]:
    """`LEFT,RIGHT`."""
    if text.count(",") != 1 or not all(text.split(",")):
        raise ConfigError(f"a pair is LEFT,RIGHT, got {text!r}")
    return tuple(text.split(","))


# Values that an option, and YAML too, may give as text.
Ways: TypeAlias = Annotated[
    tuple[int, int], BeforeValidator(lambda value: parse_ways(value) if isinstance(value, str) else value)
]
Pair: TypeAlias = Annotated[
    tuple[str, str], BeforeValidator(lambda value: _parse_pair(value) if isinstance(value, str) else value)
]
Evaluator: TypeAlias = Literal["vllm", "transformers"]

_EVALUATION, _COST, _BEST = "Evaluation", "Resources and limits", "Search for the best merge"
_SPACE, _SCORING = "Which plans", "How they are scored"


class SignalsConfig(FrozenConfig):
    """Signals of all pairs of a catalogue."""

    weights: Literal["exact", "sampled"] = option(
        "exact", "weight signals from all weights (exact) or a sample (sampled)"
    )
    num_positions: int = option(64, "sampled token positions per task", flag="positions", ge=1)
    num_attention_positions: int = option(16, "positions that keep attention rows", flag="attention-positions", ge=1)
    num_coordinates: int = option(10_000, "sampled coordinates per tensor", flag="coordinates", ge=1)
    num_workers: int = option(2, "signal actors", flag="workers", ge=1)
    memory_per_worker: float | None = option(None, "GB; a checkpoint that needs more is run layer by layer", gt=0)
    gpus_per_worker: float = option(0.0, "share of a GPU for each actor; 0 runs on CPU cores", ge=0)
    batch_size: int = option(16, "probes per micro-batch, the fixed unit of work", ge=1)
    max_tokens: int = option(256, "longest probe in tokens; a longer one is an error", ge=2)
    answers: bool = option(
        True, "also keep the members' own answers to their probes, for choices and rankings without labels"
    )


class EngineConfig(FrozenConfig):
    """What evaluates a merge, and with what resources."""

    evaluator: Evaluator = option("vllm", "engine; recorded in every label", panel=_EVALUATION)
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the engine", panel=_EVALUATION)
    max_model_len: int | None = option(
        None, "longest prompt + answer in tokens; default: the model's own limit, at most 4096", ge=8, panel=_EVALUATION
    )
    max_items: int | None = option(
        None, "items of each task, a sample by the seed; default: all", ge=1, panel=_EVALUATION
    )
    seed: int = option(0, "of the sample of items and of the proposed merges", panel=_EVALUATION)
    lm_eval: tuple[str, ...] = option(
        (), "task of lm-evaluation-harness, also under a task's name: math=gsm8k; repeatable", panel=_EVALUATION
    )
    lm_eval_include: Path | None = option(None, "directory of lm-evaluation-harness task YAML files", panel=_EVALUATION)
    lm_eval_fewshot: int | None = option(
        None, "examples before each prompt; default: as the task says", ge=0, panel=_EVALUATION
    )
    retry_infeasible: bool = option(False, "evaluate merges again that could not be measured", panel=_EVALUATION)
    concurrency: int | None = option(None, "engines at the same time; default: as many as fit", ge=1, panel=_COST)
    cpus_per_trial: float = option(1.0, "CPU cores of an engine or of each rank; up to four merge", ge=0, panel=_COST)
    gpus_per_trial: float = option(0.0, "GPUs of an engine; a fraction for small models", ge=0, panel=_COST)
    tensor_parallel: int = option(1, "ranks that a model is split over", ge=1, panel=_COST)
    executor: Literal["mp", "ray"] = option("mp", "ranks on one node (mp) or over several", panel=_COST)


class _TrialsConfig(EngineConfig):
    """Merges that are made and evaluated."""

    arms: tuple[str, ...] = option(
        ("linear", "nuslerp", "task_arithmetic", "ties(density=0.2)"),
        "merge operator to try, e.g. linear or 'ties(density=0.2)'; repeatable",
        flag="arm",
        min_length=1,
    )
    exclude: tuple[Pair, ...] = option((), "LEFT,RIGHT: a pair to leave out; repeatable")
    max_trials: int | None = option(None, "stop after this many trials", ge=1, panel=_COST)
    max_hours: float | None = option(None, "stop after this many hours", gt=0, panel=_COST)
    max_gpu_hours: float | None = option(
        None, "stop when the engines have held GPUs for this many hours", gt=0, panel=_COST
    )


class LabelsConfig(_TrialsConfig):
    """Labels of pairs x arms."""

    pairs: Literal["cross-task", "all"] = option("cross-task", "which pairs of checkpoints to merge")


class BestMergeConfig(_TrialsConfig):
    """The best merge that can be found within a budget."""

    budget: int | None = option(None, "merges to try", ge=1, panel=_BEST)
    objectives: tuple[str, ...] = option(
        ("mean",),
        "mean, worst, a task, or math=2,code=1; repeatable: several keep the Pareto front",
        flag="objective",
        panel=_BEST,
        min_length=1,
    )
    sampler: Literal["tpe", "cmaes", "random"] = option("tpe", "what proposes merges", panel=_BEST)
    members: tuple[str, ...] = option((), "checkpoint to merge; repeatable; default: all", flag="member", panel=_BEST)
    ways: Ways = option((2, 2), "checkpoints of a merge: 2, or 2-4", panel=_BEST, shown="2")
    layer_groups: int = option(1, "anchors of every weight over the depth of the model", ge=1, le=16, panel=_BEST)
    shards: int | None = option(None, "parts of the items; a bad trial stops after some; default: 4", ge=1, panel=_BEST)
    reduction_factor: int = Field(3, ge=2, description="one trial in this many goes on after a part of the items")


class SearchConfig(LabelsConfig, BestMergeConfig):
    """Merge-and-evaluate search: pairs x arms without a `budget`, with one the best merge that can be found."""

    @property
    def num_shards(self) -> int:
        """Parts of the items of a proposed trial; several objectives cannot be compared part by part."""
        return 1 if self.budget is None or len(self.objectives) > 1 else self.shards or 4

    def content(self) -> dict[str, Any]:
        """What the labels depend on: everything but how much is run where, and when it stops."""
        resources = {"concurrency", "cpus_per_trial", "gpus_per_trial", "tensor_parallel", "executor"}
        return self.model_dump(mode="json", exclude=resources | {"max_trials", "max_hours", "max_gpu_hours"})


class RankingFiles(FrozenConfig):
    """What a ranking of merges is computed from, beside the catalogue."""

    signals: Place = option(..., "signal table (Parquet)")
    selector: Place | None = option(None, "directory that `simmerge train` wrote; default: the one in the package")
    signatures: Place | None = option(None, "default: `signatures` beside the table", panel=_SCORING)
    probes: Place | None = option(None, "probe files, for curved and exact", panel=_SCORING)


class RankingConfig(FrozenConfig):
    """Which merges of a catalogue are ranked, and by what score."""

    tasks: tuple[str, ...] = option(
        (), "count on this task; repeatable; default: the checkpoints' own tasks", flag="task"
    )
    ways: Ways = option((2, 3), "checkpoints of a merge: 2, or 2-4", panel=_SPACE, shown="2-3")
    must_contain: tuple[str, ...] = option((), "checkpoint id; repeatable", panel=_SPACE)
    exclude: tuple[str, ...] = option((), "checkpoint id; repeatable", panel=_SPACE)
    arms: tuple[str, ...] = option(
        (), "choose from these, e.g. 'ties(density=0.2)'; repeatable; default: all known", flag="arm", panel=_SPACE
    )
    weighting: Literal["equal", "halving"] = option(
        "equal", "equal: every member counts the same; halving: each step weighs 1/2", panel=_SPACE
    )
    objective: str = option("mean", "mean, worst, a task, or math=2,code=1", panel=_SCORING)
    propagator: Literal["bound", "second_order", "virtual", "curved", "exact"] = option(
        "virtual", "ranks the shortlist", panel=_SCORING
    )
    budget: int = option(1_000_000, "plans; if there are more, a beam of about so many", panel=_SCORING, ge=1)
    shortlist: int = option(500, "plans that the propagator ranks", panel=_SCORING, ge=1)
    caution: float = option(
        1.0, "rank by the prediction less so many spreads", panel=_SCORING, ge=0, allow_inf_nan=False
    )
    aggregate: Literal["last", "mean", "sum"] = option("last", "last step, mean or sum over steps", panel=_SCORING)


class TuneConfig(FrozenConfig):
    """Coefficients of a merge by gradient on the members' own answers (`signals.tuning`)."""

    method: Literal["gradient", "regmean"] = option(
        "gradient", "gradient on coefficients, or regmean's closed form for linear layers (only --alpha counts then)"
    )
    alpha: float = option(0.9, "regmean: what off-diagonals of Gram matrices are scaled by", ge=0, le=1)
    groups: Literal["global", "layer", "block", "tensor"] = option("tensor", "what shares a coefficient of a member")
    objective: Literal["kl", "nll", "entropy"] = option("kl", "entropy never looks at the members: a control")
    num_steps: int = option(30, "gradients, at most", flag="steps", ge=1)
    pull: float = option(0.05, "weight of the mean squared distance from the start", ge=0)
    held_out: float = option(0.25, "share of the probes that only decide when to stop", ge=0, lt=1)
    patience: int = option(4, "steps in which the held-out objective falls by less than 1 % before the stop", ge=1)
    start: float | None = option(None, "mean coefficient at the start; default: one over the members' number", ge=0)
    start_from: Literal["equal", "norm-matched"] = option(
        "equal", "shares at the start: the same, or by the inverse of the task vectors' norms (NAN)"
    )
    max_tokens: int = option(16, "longest answer in tokens", ge=1, le=256)
    gpus: float = option(0.0, "of the cluster, for each tuning; 0: on a CPU", ge=0)


class TrainConfig(FrozenConfig):
    """Selector training."""

    model: Literal["mlp", "ridge", "knn", "forest"] = option("mlp", "what predicts utilities from signals")
    task_encoding: Literal["none", "onehot", "probe_stats"] = option(
        "none", "what the model is told of the task, beside the signals"
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
    num_folds: int = Field(12, ge=2, description="groups of checkpoints that are left out in turn, at most")
    novelty_quantile: float = Field(
        0.99, gt=0, le=1, description="of the training distances; what lies beyond is not answered"
    )
    seed: int = option(0, "of the training")

    @field_validator("penalties", "neighbours")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(value <= 0 for value in values):
            raise ValueError(f"every value must be above 0, got {values}")
        return values


class PredictorConfig(FrozenConfig):
    """Training of the predictor of utilities."""

    model: Literal["ridge", "forest", "mlp"] = option("ridge", "what predicts utilities from what merges keep")
    seed: int = option(0, "of the training")


class DatasetConfig(FrozenConfig):
    """Dataset of a catalogue: signals of all pairs, then labels. `jobs/build_dataset.py` runs it."""

    catalogue: Place
    probes: Place | None = Field(None, description="directory of <task>.jsonl, a `text` per line; None: general ones")
    tasks: Place | None = Field(None, description="directory of <task>.jsonl files, `prompt` and `target` per line")
    out: Place
    signals: SignalsConfig = SignalsConfig()
    search: SearchConfig = SearchConfig()


class StudyConfig(FrozenConfig):
    """The study that shows whether selection works: a zoo of its own, trained and labelled. `jobs/study.py` runs it."""

    num_bases: int = Field(12, ge=1, description="bases of different seeds")
    num_per_domain: int = Field(3, ge=1, description="experts of each base and domain, with recipes drawn at random")
    num_large_per_domain: int = Field(2, ge=0, description="the same for the large base; 0 leaves it out")
    num_items: int = Field(400, ge=4, description="evaluation items of each task")
    num_probes: int = Field(64, ge=1, description="probes of each task")
    num_subsets: dict[int, int] = Field(
        {3: 4, 4: 4, 5: 2, 6: 1}, description="size of a subset: how many such subsets of each base are merged"
    )
    num_orders: int = Field(1, ge=1, description="random orders of each arm and subset, beside the expert last")
    num_mixed: int = Field(4, ge=0, description="plans of each subset and weighting with an arm drawn for each step")
    step_share: float = Field(1.0, gt=0, le=1, description="of the training steps; below 1 for a trial run")
    num_full: int = Field(6, ge=0, description="checkpoints of the first base of which every subset is merged")
    evaluator: Evaluator = Field("vllm", description="what evaluates")
    concurrency: int | None = Field(None, ge=1, description="engines at the same time; None: as many as fit")


class ServeConfig(FrozenConfig):
    """Settings of the service that `simmerge serve` takes; what is None follows from the run or the other settings."""

    selector: Place | None = option(
        None, "for a log that has not begun, or to publish beside the log's own; default: RUN's"
    )
    signals: Place | None = option(None, "table of the pairs that may be asked for; default: RUN's")
    catalogue: Place | None = option(None, "for better plans; default: RUN's")
    signatures: str | None = option(None, "default with a catalogue: `signatures` beside the table")
    probes: Place | None = option(
        None, "the probes of the signals, to rank by what a merge keeps; default: RUN's, with a catalogue"
    )
    database: str | None = option(None, "URL of the event log; default: SQLite in RUN/service")
    registry: Path | None = option(None, "directory of published selectors; default: RUN/service/selectors")
    namespace: str = option("default", "services of one namespace share what they learn", min_length=1, max_length=200)
    tokens: Path | None = option(
        None, "YAML file of tokens and roles; default: the environment, or one admin token that is made"
    )
    floor: float = option(0.02, "probability that every arm is played with at least", gt=0, lt=1)
    snapshot_every: int = option(1000, "events", ge=1)
    ttl_seconds: float | None = Field(30 * 86400.0, gt=0, description="of a decision; None: for ever")
    num_replicas: int = option(1, "with Ray", flag="replicas", ge=1)
    max_replicas: int | None = option(None, "under load; default: as many as --replicas", ge=1)


class ServiceConfig(ServeConfig):
    """All settings of a service: `args` in `cluster/serve.yaml`. Paths are absolute and readable on every node."""

    signals: Place
    database: str
    registry: Path

    @property
    def signature_store(self) -> str | None:
        """Plans are ranked with signatures if there is a catalogue."""
        return self.signatures or (str(self.signals.parent / "signatures") if self.catalogue else None)


class RetrainConfig(FrozenConfig):
    """A new selector from the rewards of a service."""

    database: str = option(..., "URL of the event log", min_length=1)
    namespace: str = option("default", "of the log", min_length=1, max_length=200)
    registry: Path = option(..., "directory of published selectors")
    dataset: Path | None = option(None, "labels and signals that the present selector was trained on")
    out: Path | None = option(None, "directory for what is trained")
    margin: float = option(0.03, "what counts as not worse, in utility and in GapClosed", ge=0, le=1)
    held_out: float = option(0.25, "share of the rewards, the last ones, to compare on", gt=0, lt=1)


def check_config(
    model: type[ConfigType], values: Mapping[str, Any], source: str, flags: Mapping[str, str] | None = None
) -> ConfigType:
    """Build a config. flags: what errors call a field, if not by its name; `--arm` for `arms`.

    Raises ConfigError: with every problem, one a line.
    """
    try:
        return model.model_validate(_with_text_keys(values))
    except ValidationError as error:
        raise ConfigError(problem_list(f"{source}:", problem_lines(error, model, flags or {}))) from None


def load_yaml(path: Place, model: type[ConfigType]) -> ConfigType:
    """Read a config file, with relative paths taken from its directory. Raises ConfigError: with every problem."""
    return _with_paths_from(check_config(model, _read_mapping(path, model), f"config {path}"), path.parent)


def load_yaml_leniently(path: Place, model: type[ConfigType]) -> tuple[ConfigType | None, list[str]]:
    """`load_yaml`, but what is wrong with single values is returned, and the config goes without these values, so that
    the rest can be checked as well; None where it cannot. Raises ConfigError: the file is no YAML mapping.
    """
    values = _with_text_keys(_read_mapping(path, model))
    try:
        return _with_paths_from(model.model_validate(values), path.parent), []
    except ValidationError as error:
        problems = problem_lines(error, model, {})
        for problem in error.errors():
            _remove(values, problem["loc"])
    try:
        return _with_paths_from(model.model_validate(values), path.parent), problems
    except ValidationError:
        return None, problems


def _with_text_keys(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}  # a file may have other keys, which no config knows


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
        values = parse_yaml(read_text(path))
    except OSError as error:
        instead = _what_is_there(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"config {path}: {error.strerror}{instead}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path} is not UTF-8 text") from None
    except YamlError as error:
        raise ConfigError(f"config {path} is {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must be a mapping with the keys {', '.join(sorted(model.model_fields))}")
    return values


def _what_is_there(path: Place) -> str:
    """In the place of a file that is not there: no directory, or a file of nearly the same name."""
    there = file_names(path.parent)
    if there is None:
        return f" (there is no directory {path.parent})"
    near = difflib.get_close_matches(path.name, sorted(there - {path.name}), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


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
