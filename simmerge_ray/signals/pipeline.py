"""The layer pipeline: a checkpoint that does not fit one worker, run stage by stage, a stage being a range of layers.

A stage is the family's own model, built without weights; only the modules of the stage get any, identities stand for
the others, and the hidden states of all tokens are handed from stage to stage. So nothing of a model's code is copied,
every operation has the operands of the whole model, and the joined outputs have the same bits. Where the first and last
stage's additions lie is a table of families; each is checked against the whole model, small, before it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.base.extras import import_transformers
from simmerge_ray.checkpoints.headers import TensorSpec
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef, local_files
from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.merging.engine.whole import flat_tensor
from simmerge_ray.merging.model import config_key, end_of_text
from simmerge_ray.signals.collect import BatchOutputs, check_logits, model_outputs, recording
from simmerge_ray.signals.stages import FAMILIES, Family, LayerRange, family_of
from simmerge_ray.signals.tokens import ProbeBatch

_READ_ELEMENTS = 1 << 22  # read at once: what loading needs on top of the weights stays below 50 MB


@dataclass(frozen=True)
class StageOutputs:
    """What one stage gives on one micro-batch, float32 on the CPU.

    hidden: by index as transformers counts hidden states, each (S, D); a stage has its layers' inputs, the last one the
    head's input, too. attention: by layer, (H, Sa, T). logits: (S, V) of the last stage. states: (B, T, D), what the
    next stage starts from.
    """

    hidden: dict[int, Tensor]
    attention: dict[int, Tensor]
    logits: Tensor | None
    states: Tensor | None


class StageModel:
    """One stage of one checkpoint at a time in memory, run over probes."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self._dtype, self._device = dtype, device
        self._model: Any = None
        self._loaded: tuple[CheckpointRef, LayerRange] | None = None
        self._built: tuple[str, LayerRange, bool] | None = None
        self._checked: set[str] = set()

    def run(self, ref: CheckpointRef, stage: LayerRange, batch: ProbeBatch, states: Tensor | None) -> StageOutputs:
        """Run a stage over a micro-batch. Raises CheckpointError: see `load`; or its logits are not finite.

        states: (B, T, D), `StageOutputs.states` of the stage before; None for the first stage.
        """
        if (states is None) != stage.is_first:
            raise ValueError(f"{stage} starts from {'tokens' if stage.is_first else 'the hidden states before it'}")
        model = self.load(ref, stage)
        outputs = _run_stage(model, FAMILIES[model.config.model_type], stage, batch, states, self._device)
        if outputs.logits is not None:
            check_logits(ref, outputs.logits)
        return outputs

    def load(self, ref: CheckpointRef, stage: LayerRange) -> Any:
        """The model with the weights of the stage, and with no others.

        Raises:
            CheckpointError: of a family that is not known or does not run in stages; it has another number of layers;
                a tensor is absent, of another shape, or holds NaN or infinity.
        """
        if self._loaded == (ref, stage):
            return self._model
        self._loaded = None  # an error must not leave the old name on new weights
        family = family_of(ref)
        source = TensorSource(ref)
        try:
            twice = all(_stored_name(name, family, source.specs, tied=False) for name in family.matrices)
            built = (config_key(ref), stage, twice)
            if self._built != built:
                self._model = self._built = None  # frees the old weights first
                self._model = self._build(ref, family, stage, twice)
                self._built = built
            tied = bool(self._model.config.tie_word_embeddings)
            for name, parameter in self._model.named_parameters():
                if (stored := _stored_name(name, family, source.specs, tied)) is None:
                    raise CheckpointError(f"checkpoint {ref.id!r} lacks tensors: {name}")
                _read(ref, source, stored, parameter)
        finally:
            source.close()
        self._loaded = (ref, stage)
        return self._model

    def _build(self, ref: CheckpointRef, family: Family, stage: LayerRange, stored_twice: bool) -> Any:
        auto_config = import_transformers().AutoConfig
        try:
            with local_files(ref) as directory:
                config = auto_config.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ref.error(f"transformers cannot read its config.json: {error}") from error
        if config.num_hidden_layers != stage.num_layers:
            raise CheckpointError(
                f"checkpoint {ref.id!r} has {config.num_hidden_layers} decoder layers; the stage is one of a model "
                f"with {stage.num_layers}"
            )
        small = _small_config(config)
        key = small.to_json_string()
        if key not in self._checked:
            if problem := _check_family(small, family, self._dtype, self._device):
                raise ref.error(
                    f"a small random model of its family {config.model_type!r} with its settings gives other {problem} "
                    "in stages than as a whole; run whole models instead: raise --memory-per-worker"
                )
            self._checked.add(key)
        return _build_stage(config, family, stage, self._dtype, self._device, untie=stored_twice)


def join_stages(outputs: Sequence[StageOutputs]) -> BatchOutputs:
    """The outputs of all stages of one checkpoint on one micro-batch, as `ProbeModel.outputs` gives them.

    Raises:
        ValueError: a stage is missing.
    """
    hidden = {index: states for part in outputs for index, states in part.hidden.items()}
    attention = {index: rows for part in outputs for index, rows in part.attention.items()}
    logits = next((part.logits for part in outputs if part.logits is not None), None)
    layers = list(range(len(hidden)))
    if logits is None or sorted(hidden) != layers or sorted(attention) != layers[:-1]:
        raise ValueError(f"stages with layers {sorted(attention)} do not make a whole model; the last one has logits")
    stacked = (torch.stack([found for _, found in sorted(one.items())]) for one in (hidden, attention))
    return BatchOutputs(logits, *stacked)


def staged_continuation(
    model: StageModel, ref: CheckpointRef, stages: Sequence[LayerRange], batch: TokenBatch, num_tokens: int
) -> Tensor:
    """`ProbeModel.continuation` stage by stage, (B, num_tokens) int64; every stage is loaded for every token.

    Right-padded and without a cache, so that a token may differ where two logits are equal but for rounding.
    """
    lengths = batch.attention_mask.sum(1)
    rows = torch.arange(len(lengths))
    ids, mask = (nn.functional.pad(field, (0, num_tokens)) for field in (batch.input_ids, batch.attention_mask))
    nothing = torch.zeros(len(rows), dtype=torch.bool)
    written = torch.zeros((len(rows), num_tokens), dtype=torch.int64)
    ends = end_of_text(ref, model.load(ref, stages[0]).config)
    for step in range(num_tokens):
        columns = lengths + step - 1
        at = ProbeBatch(ids, mask, rows, columns, nothing, nothing, rows, rows)
        states: Tensor | None = None
        for stage in stages:
            outputs = model.run(ref, stage, at, states)
            states = outputs.states
        assert outputs.logits is not None
        written[:, step] = outputs.logits.index_fill(1, ends, -torch.inf).argmax(-1)
        ids[rows, columns + 1] = written[:, step]
        mask[rows, columns + 1] = 1
    return written


class _Through(nn.Module):
    """Stands in for a module that another stage runs: returns its first input."""

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states


class _NoPositions(nn.Module):
    """Stands in for learned positions that the first stage has added: -0.0, which changes no bit of any addend."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.tensor(-0.0, device=position_ids.device)


def _build_stage(config: Any, family: Family, stage: LayerRange, dtype: torch.dtype, device: str, untie: bool) -> Any:
    """The model of a configuration with room for one stage's weights, and for no others.

    untie: give the head a matrix of its own although the configuration ties it to the embedding, as transformers does
    where the files hold both.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
        head = model.get_submodule(family.head)
        if untie:
            head.weight = nn.Parameter(torch.empty_like(head.weight))
    layers = model.get_submodule(family.layers)
    for index in set(range(stage.num_layers)) - set(stage.layers):
        layers[index] = _Through()
    if not stage.is_first:
        model.set_submodule(family.embeddings, _Through())
        if family.positions is not None:
            model.set_submodule(family.positions, _NoPositions())
    if not stage.is_last:
        model.set_submodule(family.norm, _Through())
        model.set_submodule(family.head, _Through())
    for module in list(model.modules()):
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if names:  # how from_pretrained computes buffers that no file holds; parameters on `meta` are not touched by it
            model._init_weights(module)
    made: dict[int, nn.Parameter] = {}  # a tied matrix once
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
            setattr(module, name, made[id(parameter)])
    return model.eval()


def _stored_name(name: str, family: Family, specs: Mapping[str, TensorSpec], tied: bool) -> str | None:
    """The name in the files of one parameter; a tied matrix may stand there as the embedding or as the head."""
    names = (name, *family.matrices) if tied and name in family.matrices else (name,)
    return next((stored for one in names for stored in (one, one.removeprefix(family.prefix)) if stored in specs), None)


@torch.no_grad()
def _read(ref: CheckpointRef, source: TensorSource, stored: str, target: Tensor) -> None:
    """Read one tensor into a parameter, block by block, and check it."""
    if source.specs[stored].shape != tuple(target.shape):
        shape = source.specs[stored].shape
        raise ref.error(f"tensor {stored} has shape {shape}, its config.json asks for {tuple(target.shape)}")
    flat = target.view(-1)
    # The last bits of an adapter's product depend on how many rows are taken at once: all, as for the whole model.
    whole = flat_tensor(source.read_whole(stored)) if source.is_adapted(stored) else None
    size = max(1, min(_READ_ELEMENTS, flat.numel()))
    raw, values = np.empty(8 * size, dtype=np.uint8), np.empty(size, dtype=np.float32)
    for start in range(0, flat.numel(), size):
        stop = min(start + size, flat.numel())
        if whole is None:
            flat[start:stop].copy_(torch.from_numpy(source.read_float32(stored, start, stop, raw, values)))
        else:
            flat[start:stop].copy_(whole[start:stop])
        if not bool(torch.isfinite(flat[start:stop]).all()):
            raise ref.error(f"tensor {stored} holds NaN or infinity")


@torch.no_grad()
def _run_stage(
    model: Any, family: Family, stage: LayerRange, batch: ProbeBatch, states: Tensor | None, device: str
) -> StageOutputs:
    layers = model.get_submodule(family.layers)
    head = model.get_submodule(family.head) if stage.is_last else None
    if states is None:
        inputs = {"input_ids": batch.input_ids.to(device)}
    else:
        inputs = {"inputs_embeds": states.to(device, model.dtype)}
    runs = model if stage.is_last else model.base_model  # soft-capping behind the head is for logits only
    with recording({index: layers[index] for index in stage.layers}, head, batch) as found:
        result = runs(**inputs, attention_mask=batch.attention_mask.to(device), use_cache=False)
    logits = result.logits[0].float().cpu() if stage.is_last else None
    following = None if stage.is_last else result.last_hidden_state.float().cpu()
    return StageOutputs(found.hidden, found.attention, logits, following)


_SMALL_LAYERS = 3  # one each for the first, a middle and the last stage


def _small_config(config: Any) -> Any:
    """The configuration with two heads of the same size, three layers and 32 tokens; every other setting as it is.

    The head size stays, since the lists of scaled rotary embeddings depend on it. Lists with an entry per layer keep
    the first layer of every kind.
    """
    small = copy.deepcopy(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_layers = config.num_hidden_layers
    lists = {key: v for key, v in vars(config).items() if isinstance(v, list) and len(v) == num_layers}
    kinds = [tuple(v[layer] for v in lists.values()) for layer in range(num_layers)]
    layers = list(dict.fromkeys(kinds.index(kind) for kind in kinds))
    layers = (layers + list(range(num_layers)) * _SMALL_LAYERS)[: max(_SMALL_LAYERS, len(layers))]
    for key, values in lists.items():
        setattr(small, key, [values[layer] for layer in layers])
    small.num_hidden_layers = len(layers)
    small.num_attention_heads = 2
    small.hidden_size = 2 * head_size
    small.vocab_size = 32
    if hasattr(small, "num_key_value_heads"):
        small.num_key_value_heads = 1 if config.num_key_value_heads < config.num_attention_heads else 2
    if hasattr(small, "intermediate_size"):
        small.intermediate_size = 3 * head_size
    if getattr(small, "sliding_window", None):
        small.sliding_window = 3
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    return small


@torch.no_grad()
def _check_family(small: Any, family: Family, dtype: torch.dtype, device: str) -> str | None:
    """Which outputs of a small random model in stages are not those of the whole, bit by bit; None if none.

    Small, not the checkpoint itself: the whole checkpoint is what does not fit, and the settings that matter to where
    a model can be cut are all in the small configuration. It costs some 30 ms.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):  # a check must not move the caller's random numbers
        whole = AutoModelForCausalLM.from_config(small, attn_implementation="eager", dtype=dtype).eval().to(device)
    generator = torch.Generator().manual_seed(0)
    for parameter in whole.parameters():  # the usual start, norms of 1 or 0, would hide a norm left out
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    weights = dict(whole.named_parameters())
    ids = torch.arange(14).reshape(2, 7) % 11 + 3
    mask = (torch.arange(7)[None] < torch.tensor([[7], [5]])).long()  # rows of 7 and 5 tokens, all of them sampled
    rows, columns = mask.nonzero(as_tuple=True)
    everywhere = torch.ones(len(rows), dtype=torch.bool)
    batch = ProbeBatch(ids * mask, mask, rows, columns, ~everywhere, everywhere, torch.full_like(rows, -1), rows)
    parts: list[StageOutputs] = []
    for layer in range(small.num_hidden_layers):
        stage = LayerRange(layer, layer + 1, small.num_hidden_layers)
        model = _build_stage(small, family, stage, dtype, device, untie=False)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name if name in weights else family.matrices[0]])  # a tied head has no own name
        parts.append(_run_stage(model, family, stage, batch, parts[-1].states if parts else None, device))
    joined, expected = join_stages(parts), model_outputs(whole, batch, device)
    for name, field in (("hidden states", "hidden"), ("attention", "attention"), ("logits", "logits")):
        if not torch.equal(getattr(joined, field), getattr(expected, field)):
            return name
    return None
