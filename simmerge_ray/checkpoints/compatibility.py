"""Whether checkpoints can be merged, from headers, `config.json` and tokenizers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simmerge_ray.base.errors import CheckpointError, IncompatibleCheckpointsError, problem_list, shown_value
from simmerge_ray.checkpoints.formats import quantisation
from simmerge_ray.checkpoints.headers import TensorSpec, read_headers
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.checkpoints.tokenizers import same_tokenizer, tokenizer_files

# What must be equal for tensors of the same name to mean the same thing.
ARCHITECTURE_KEYS = (
    "model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "tie_word_embeddings", "n_embd", "n_layer", "n_head",
    "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok",
)  # fmt: skip
_MERGEABLE_DTYPES = ("F64", "F32", "BF16", "F16", "I64", "I32", "I16", "BOOL")  # integers are copied
_VOCABULARY_REMEDY = "choose others, or merge them by a mergekit file with tokenizer_source (union, base, a model)"


def unsupported_problems(ref: CheckpointRef, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> list[str]:
    """What keeps a checkpoint from being merged at all, with the remedy: quantised weights."""
    problems = []
    if (found := quantisation(specs, config, _MERGEABLE_DTYPES)) is not None:
        problems.append(f"checkpoint {ref.id!r} {found}")
    return problems


def config_problems(
    first: tuple[str, Mapping[str, Any]], other: tuple[str, Mapping[str, Any]], keys: Sequence[str] = ARCHITECTURE_KEYS
) -> list[str]:
    """Keys in which two `config.json`, each with the id of its checkpoint, differ."""
    (first_id, first_config), (other_id, other_config) = first, other
    return [
        f"{key}: {other_id!r} has {shown_value(other_config.get(key))}, "
        f"{first_id!r} has {shown_value(first_config.get(key))}"
        for key in keys
        if other_config.get(key) != first_config.get(key)
    ]


def compatibility_problems(refs: Sequence[CheckpointRef]) -> list[str]:
    """Everything that keeps the checkpoints from being merged, each line with the checkpoint, the value and the rule.

    Reads headers, `config.json` and the tokenizer only. Unreadable checkpoints are problems too.
    """
    problems: list[str] = []
    readable: list[tuple[CheckpointRef, dict[str, TensorSpec], dict[str, Any]]] = []
    for ref in refs:
        try:
            found = ref, read_headers(ref), read_config(ref)
            tokenizer_files(ref)
            readable.append(found)
        except CheckpointError as error:
            problems.append(str(error))
    if not readable:
        return problems
    for ref, specs, config in readable:
        problems += unsupported_problems(ref, specs, config)
    first, first_specs, first_config = readable[0]
    for ref, specs, config in readable[1:]:
        problems += config_problems((first.id, first_config), (ref.id, config))
        for title, names in (
            ("lacks", first_specs.keys() - specs.keys()),
            ("also has", specs.keys() - first_specs.keys()),
        ):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                problems.append(f"tensors: {ref.id!r} {title} {shown}, compared with {first.id!r}")
        for name in sorted(first_specs.keys() & specs.keys()):
            if specs[name].shape != first_specs[name].shape:
                problems.append(
                    f"shape of {name}: {ref.id!r} has {specs[name].shape}, {first.id!r} has {first_specs[name].shape}"
                )
        problems += tokenizer_problems(first, ref)
    return problems


def tokenizer_problems(first: CheckpointRef, other: CheckpointRef) -> list[str]:
    """One line where two tokenizers differ or cannot be read."""
    try:
        if same_tokenizer(first, other):
            return []
    except CheckpointError as error:
        return [str(error)]
    return [f"tokenizer: {other.id!r} and {first.id!r} have different vocabularies; {_VOCABULARY_REMEDY}"]


def check_compatible(refs: Sequence[CheckpointRef]) -> None:
    """Refuse checkpoints that cannot be merged: IncompatibleCheckpointsError, with every problem, one a line."""
    refuse_problems(compatibility_problems(refs))


def refuse_problems(problems: Sequence[str]) -> None:
    """Raise `IncompatibleCheckpointsError` with the problems, one a line, where there are any."""
    if problems:
        raise IncompatibleCheckpointsError(problem_list("these checkpoints cannot be merged:", problems))
