"""Task files. A task is a JSONL file `<task>.jsonl` with one item a line:

    {"prompt": "...", "target": "..."}
    {"prompt": "...", "target": "...", "choices": ["...", "..."]}          (multiple choice)

Its settings stand in the first line, `{"settings": {"metric": "exact_match", "max_new_tokens": 16, "stop": ["\\n"],
"chat": true, "system": "...", "examples": [{"prompt": "...", "target": "..."}], "separator": "\\n\\n"}}`, each of them
optional. `metric` and `max_new_tokens` may stand in the items instead, the same in every line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from simmerge_ray.base.config import check_config
from simmerge_ray.base.errors import ConfigError, TaskError, problem_list, shown_value, unknown_name
from simmerge_ray.base.storage import Place, list_places, nothing_in, read_jsonl
from simmerge_ray.search.evaluation.metrics import CHOICE_METRICS, METRICS
from simmerge_ray.search.evaluation.tasks import Item, Task

_ITEM_KEYS = ("prompt", "target", "choices", "metric", "max_new_tokens")


class _ProbeFileError(TaskError):
    pass


class _Example(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    prompt: str = Field(min_length=1)
    target: str = Field(min_length=1)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    metric: str = "exact_match"
    max_new_tokens: int = Field(16, ge=1)
    stop: list[str] = []
    chat: bool = False
    system: str | None = Field(None, min_length=1)
    examples: list[_Example] = []
    separator: str = "\n\n"


def load_task(path: Place) -> Task:
    """Read one task file. Raises TaskError: unreadable, empty or malformed, with every problem and its line."""
    problems: list[str] = []
    items: list[Item] = []
    settings: dict[str, Any] = {}
    header = False
    for number, row in read_jsonl(path, TaskError):
        if "text" in row and not {"prompt", "target", "settings"} & row.keys():
            raise _ProbeFileError(
                f"{path} is a file of probes (a `text` a line); an item of a task has `prompt` and `target`: are the "
                "directories of probes and tasks swapped?"
            )
        if "settings" in row:
            if items or header or len(row) > 1 or not isinstance(row["settings"], Mapping):
                problems.append(f"line {number}: 'settings' is an object and stands alone in the first line")
            else:
                header, settings = True, dict(row["settings"])
            continue
        wrong = _item_problems(row, settings)
        problems += [f"line {number}: {problem}" for problem in wrong]
        if not wrong:
            items.append(Item(row["prompt"], row["target"], tuple(row.get("choices", ()))))
    if not items and not problems:
        problems.append('holds no items; write one {"prompt": ..., "target": ...} a line')
    task = _settled(path.stem, items, settings, problems)
    if problems or task is None:
        raise TaskError(problem_list(f"task file {path}:", problems))
    return task


def _settled(name: str, items: list[Item], settings: dict[str, Any], problems: list[str]) -> Task | None:
    """The task, or None with what is wrong in `problems`."""
    try:
        checked = check_config(_Settings, settings, "settings")
        if checked.metric not in METRICS:
            problems.append(unknown_name("metric", checked.metric, METRICS))
        elif not problems:
            examples = tuple(Item(one.prompt, one.target) for one in checked.examples)
            values = checked.model_dump(exclude={"examples", "stop"})
            return Task(name, tuple(items), examples=examples, stop=tuple(checked.stop), **values)
    except (ConfigError, TaskError) as error:
        problems.append(str(error))
    return None


def _item_problems(row: Mapping[str, Any], settings: dict[str, Any]) -> list[str]:
    """What is wrong with an item; its settings are added to those of the task."""
    problems = []
    for key in ("prompt", "target"):
        if not isinstance(row.get(key), str) or not row[key]:
            problems.append(f"an item needs a non-empty string under {key!r}, got {shown_value(row.get(key))}")
    for key in row:
        if key not in _ITEM_KEYS:
            problems.append(unknown_name("key", key, _ITEM_KEYS))
        elif key in ("metric", "max_new_tokens") and settings.setdefault(key, row[key]) != row[key]:
            problems.append(f"{key!r} is {shown_value(row[key])}, earlier lines say {shown_value(settings[key])}")
    choices = row.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        problems.append(f"'choices' must be a list of non-empty strings, got {shown_value(choices)}")
    elif str(settings.get("metric")) in CHOICE_METRICS and (len(choices) < 2 or row.get("target") not in choices):
        problems.append(f"'choices' needs two texts or more, the target among them, got {shown_value(choices)}")
    return problems


def load_tasks(directory: Place) -> dict[str, Task]:
    """All `<task>.jsonl` files of a directory, by task.

    Raises:
        TaskError: there is none, or some are malformed, with every problem of all of them.
    """
    tasks, problems = {}, []
    for path in list_places(directory, "*.jsonl"):
        try:
            tasks[path.stem] = load_task(path)
        except _ProbeFileError:
            raise  # so are the others: it is said once
        except TaskError as error:
            problems.append(str(error))
    if problems or not tasks:
        templates = [path.name for path in list_places(directory, "*.jsonl.template")]
        fill_in = f"; fill in {', '.join(templates[:5])} and take `.template` off its name" if templates else ""
        raise TaskError(problem_list("", problems) or nothing_in(directory, "<task>.jsonl task files") + fill_in)
    return tasks
