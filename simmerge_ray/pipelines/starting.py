"""`simmerge init`: a directory to start in, made from a list of checkpoints: catalogue, probes, templates.

Nothing that exists is overwritten, and nothing is written before everything is checked.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simmerge_ray.base.errors import CheckpointError, ConfigError, OutputError, ProbeError, unknown_name
from simmerge_ray.base.program import program
from simmerge_ray.base.storage import Place, RemotePath, as_place, jsonl_bytes, read_json_object, write_atomically
from simmerge_ray.checkpoints.cards import card_matter
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue, new_catalogue_text
from simmerge_ray.checkpoints.probe_sources import read_texts, some_of
from simmerge_ray.checkpoints.references import ADAPTER_CONFIG, CheckpointRef, locate_checkpoint, read_config
from simmerge_ray.checkpoints.tokenizers import load_tokenizer
from simmerge_ray.search.evaluation.metrics import METRICS

CATALOGUE, PROBES, TASKS = "catalogue.yaml", "probes", "tasks"
_HUB = "hf://"
_MAX_TOKENS = 256 - 16  # of a probe: signals take 256 tokens, and an answer of 16 follows
_CATALOGUE_HEAD = """\
# What may be merged: checkpoints of one architecture and tokenizer. Paths are relative to this file.
# base: the common ancestor; most operators, and `simmerge auto`, need it. task: what a checkpoint was fine-tuned for.
# More of them: simmerge catalogue add {path} ID PATH --task TASK (--adapter LORA)
"""
_PROBES_TEMPLATE = """\
# Probes of {task}: prompts as they are given to the checkpoint, without answers; 64 are plenty. Take none that you
# evaluate on. Fill this in, take out the lines that begin with #, and call it {task}.jsonl; or let it be made:
#   simmerge init {directory} --probes {task}=FILE     (plain text, CSV, JSON, JSONL, Parquet, a data set on disk)
{{"text": "a prompt"}}
{{"text": "another prompt"}}
"""
_TASK_TEMPLATE = """\
# Items of {task} with answers, if you have any: they have the last word over what is chosen without them. Fill this in,
# take out the lines that begin with #, call it {task}.jsonl, and give `simmerge auto` --tasks and --evaluate 8.
# metric: {metrics}.
{{"settings": {{"metric": "exact_match", "max_new_tokens": 16}}}}
{{"prompt": "a prompt", "target": "its answer"}}
"""


@dataclass(frozen=True)
class NewDirectory:
    """What a directory is started with: texts of files by path, and what to say."""

    files: Mapping[Path, bytes]
    lines: tuple[str, ...]

    def write(self) -> None:
        """Raises OutputError: a file exists already, or cannot be written."""
        if there := [str(path) for path in self.files if path.exists()]:
            raise OutputError(f"{', '.join(there)}: exists already; nothing was written, nothing is overwritten")
        for path, content in self.files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror}") from None


def plan_start(
    directory: Path,
    checkpoints: Sequence[str],
    base: str | None = None,
    probes: Sequence[str] = (),
    field: str | None = None,
    num_probes: int = 64,
) -> NewDirectory:
    """Everything that `simmerge init` writes. Headers, configs and the sources of probes are read; no weights.

    Args:
        checkpoints: `PATH` or `TASK=PATH`, where PATH is a directory, a URI, or a hub id (`hf://owner/name@revision`),
            of a checkpoint or of a PEFT adapter. None: the catalogue is there, and only probes are added.
        base: path of the common ancestor; None takes what the checkpoints themselves name.
        probes: `TASK=SOURCE` (`probe_sources.read_texts`), or SOURCE where its name, or the only task, says which.

    Raises InputError: what cannot be used, with the remedy.
    """
    path, lines = directory / CATALOGUE, list[str]()
    files: dict[Path, bytes] = {}
    if checkpoints:
        if path.exists():
            raise OutputError(f"{path} exists already; `simmerge catalogue add` extends it")
        catalogue, said = _catalogue(checkpoints, base)
        files[path] = new_catalogue_text(path, catalogue, _CATALOGUE_HEAD.format(path=path)).encode()
        lines += [f"{path}: {', '.join(catalogue.ids)}", said]
    else:
        catalogue = _known_catalogue(path, base)
    tasks = sorted({task for task in catalogue.own_task.values() if task})
    sources = _sources(probes, tasks)
    tokenizer = load_tokenizer(catalogue.checkpoints[0]) if sources else None
    for task in tasks:
        target = directory / PROBES / f"{task}.jsonl"
        if task in sources:
            texts, said = _fitting(sources[task], field, num_probes, tokenizer)
            files[target] = jsonl_bytes([{"text": text} for text in texts])
            lines.append(f"{target}: {said}")
        elif checkpoints:
            shown = {"task": task, "directory": directory}
            files[target.with_suffix(".jsonl.template")] = _PROBES_TEMPLATE.format(**shown).encode()
        if checkpoints:
            template = directory / TASKS / f"{task}.jsonl.template"
            files[template] = _TASK_TEMPLATE.format(task=task, metrics=", ".join(METRICS)).encode()
    return NewDirectory(files, (*lines, *_next_lines(directory, catalogue, tasks, sources)))


def _known_catalogue(path: Path, base: str | None) -> Catalogue:
    if not path.exists():
        raise ConfigError(f"name the checkpoints: simmerge init {path.parent} CHECKPOINT..., each PATH or TASK=PATH")
    if base is not None:
        raise ConfigError(f"{path} exists already; `simmerge catalogue add {path} base PATH --base` gives it a base")
    return load_catalogue(path)


def _catalogue(given: Sequence[str], base: str | None) -> tuple[Catalogue, str]:
    refs: list[CheckpointRef] = []
    own_task: dict[str, str | None] = {}
    named: dict[str, list[str]] = defaultdict(list)  # base -> who names it
    for text in given:
        task, place = _task_and_place(text)
        ref, parent = _located(place)
        ref = replace(ref, id=_free_id(task or _name(place), own_task))
        refs.append(ref)
        own_task[ref.id] = task or ref.id
        if parent is not None:
            named[parent].append(ref.id)
    if base is None:
        base, said = _named_base(named)
    else:
        said = f"base: {base}, as given"
    if base is None:
        return Catalogue(tuple(refs), own_task), said
    found = replace(_locate(base), id=_free_id("base", own_task))
    refs = [replace(ref, base_id=found.id) for ref in refs]
    return Catalogue(tuple(refs), own_task, found), said


def _task_and_place(text: str) -> tuple[str | None, str]:
    """`TASK=PATH`; what is a path as a whole is one."""
    task, sign, place = text.partition("=")
    if not sign or Path(text).exists():
        return None, text
    if not re.fullmatch(r"[\w.\-]+", task) or not place:
        raise ConfigError(f"{text!r}: a checkpoint is PATH or TASK=PATH, and a task is letters, digits, _ . -")
    return task, place


def _locate(place: str, adapter: str | None = None) -> CheckpointRef:
    name, _, revision = place.removeprefix(_HUB).partition("@") if place.startswith(_HUB) else (place, "", "")
    adapter_name, _, adapter_revision = (adapter or "").removeprefix(_HUB).partition("@")
    if adapter and not adapter.startswith(_HUB):
        adapter_name, adapter_revision = adapter, ""
    return locate_checkpoint(name, revision or None, adapter_name or None, adapter_revision or None)


def _located(place: str) -> tuple[CheckpointRef, str | None]:
    """The checkpoint, and what it names as its base. An adapter is put on the model that it names."""
    ref = _locate(place)
    if not (ref.path / ADAPTER_CONFIG).exists() or (ref.path / "config.json").exists():
        return ref, _parent(ref)
    model = read_json_object(ref.path / ADAPTER_CONFIG, ref.error).get("base_model_name_or_path")
    if not isinstance(model, str) or not model:
        raise CheckpointError(f"{place} is an adapter whose {ADAPTER_CONFIG} names no base_model_name_or_path")
    try:
        return _locate(model, place), model
    except CheckpointError as error:
        raise CheckpointError(f"{place} is an adapter of {model!r}, which cannot be had: {error}") from None


def _parent(ref: CheckpointRef) -> str | None:
    """The base that a checkpoint's card or config names, unless that is the checkpoint itself."""
    card = card_matter(ref).get("base_model")
    card = card[0] if isinstance(card, list) and len(card) == 1 else card
    for name in (card, read_config(ref).get("_name_or_path")):
        if isinstance(name, str) and name and _is_other(name, ref):
            return name
    return None


def _is_other(name: str, ref: CheckpointRef) -> bool:
    return isinstance(ref.path, RemotePath) or not Path(name).is_dir() or Path(name).resolve() != ref.path.resolve()


def _named_base(named: Mapping[str, Sequence[str]]) -> tuple[str | None, str]:
    """The base that the checkpoints name, and what to say. Raises ConfigError: they name several."""
    known: dict[str, tuple[str, list[str]]] = {}
    for name, ids in named.items():
        key = str(Path(name).resolve()) if Path(name).is_dir() else name
        known.setdefault(key, (name, []))[1].extend(ids)
    if len(known) > 1:
        said = "; ".join(f"{', '.join(ids)}: {name}" for name, ids in known.values())
        raise ConfigError(f"the checkpoints name different bases ({said}); say which one it is with --base PATH")
    if not known:
        return None, "no base: no checkpoint names one; give --base PATH if you know it, most operators need it"
    ((name, ids),) = known.values()
    try:
        _locate(name)
    except CheckpointError:
        return None, f"no base: {', '.join(ids)}: made from {name!r}, which is not here; give --base PATH"
    return name, f"base: {name}, which {', '.join(ids)} name{'s' if len(ids) == 1 else ''}"


def _name(place: str) -> str:
    """The last part of a path or hub id, as an id."""
    name = place.removeprefix(_HUB).partition("@")[0] if place.startswith(_HUB) else place
    known = as_place(name)
    last = known.resolve().name if isinstance(known, Path) else known.name
    return re.sub(r"[^\w.\-]+", "-", last) or "checkpoint"


def _free_id(wanted: str, used: Mapping[str, object]) -> str:
    numbers = (f"{wanted}-{number}" for number in range(2, len(used) + 3))
    return next(name for name in (wanted, *numbers) if name not in used)


def _sources(probes: Sequence[str], tasks: Sequence[str]) -> dict[str, Place]:
    """Sources by task. Raises ProbeError: whose probes they are is not said."""
    found: dict[str, Place] = {}
    for text in probes:
        task, sign, source = text.partition("=")
        if not sign or Path(text).exists():
            source, task = text, as_place(text).stem
            task = tasks[0] if task not in tasks and len(tasks) == 1 else task
        if task not in tasks:
            raise ProbeError(f"--probes {text}: {unknown_name('task', task, tasks)}; write --probes TASK=FILE")
        if task in found:
            raise ProbeError(f"--probes {text}: {task!r} has probes from {found[task]} already")
        found[task] = as_place(source)
    return found


def _fitting(source: Place, field: str | None, count: int, tokenizer: object) -> tuple[list[str], str]:
    """A sample of the texts that have neither too few nor too many tokens, and a line about it."""
    texts = read_texts(source, field)
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]  # type: ignore[operator]
    fitting = [text for text, length in zip(texts, lengths, strict=True) if 2 <= length <= _MAX_TOKENS]
    if not fitting:
        raise ProbeError(f"{source}: none of its {len(texts)} texts has 2 to {_MAX_TOKENS} tokens; give shorter ones")
    chosen = some_of(fitting, count)
    left_out = f"; {len(texts) - len(fitting)} with more than {_MAX_TOKENS} tokens left out"
    said = f"{len(chosen)} of {len(texts)} texts of {source}"
    return chosen, said + (left_out if len(fitting) < len(texts) else "")


def _next_lines(
    directory: Path, catalogue: Catalogue, tasks: Sequence[str], sources: Mapping[str, object]
) -> list[str]:
    from importlib.util import find_spec

    missing = [task for task in tasks if task not in sources and not (directory / PROBES / f"{task}.jsonl").exists()]
    lines = []
    if missing:
        more = " ".join(f"--probes {task}=FILE" for task in missing)
        lines.append(f"no probes yet of {', '.join(missing)}: {program()} init {directory} {more}")
    engine = "" if find_spec("vllm") else " --evaluator transformers"
    command = (
        f"{program()} auto {directory / CATALOGUE} --probes {directory / PROBES} --out {directory / 'best'}{engine}"
    )
    first = [word for word, is_missing in (("a base", catalogue.base is None), ("probes", bool(missing))) if is_missing]
    return [*lines, f"next{', with ' + ' and '.join(first) if first else ''}: {command}"]
