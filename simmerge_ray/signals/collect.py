"""One forward pass of one checkpoint over one micro-batch of probes, recorded by hooks at the sampled positions.

Nothing of a model's code is copied: hooks take the inputs of the decoder layers, the attention probabilities that
eager attention returns, and the input of the language-model head, which they cut down to the sampled positions, so that
logits are computed only there. Shapes: B rows, T tokens, S sampled positions (Sa of them with attention rows), V
vocabulary, L layers, D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.in_memory import FiniteStream
from simmerge_ray.merging.model import check_finite, config_key, end_of_text, load_model, put_tensors, put_weights
from simmerge_ray.plans.plan import ResolvedPlan
from simmerge_ray.signals.tokens import ProbeBatch, left_padded


@dataclass
class Recording:
    """What hooks saw of one micro-batch, at its sampled positions, float32 on the CPU.

    hidden: by index, 0 the embedding's output, l the output of layer l - 1, the last one after the final norm, as
    transformers counts hidden states; each (S, D). attention: by layer, (H, Sa, T), rows sum to 1.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchOutputs:
    """What one checkpoint does on one micro-batch, float32 on the CPU.

    logits: (S, V). hidden: (L + 1, S, D). attention: (L, H, Sa, T).
    """

    logits: Tensor
    hidden: Tensor
    attention: Tensor


def decoder_layers(model: Any) -> nn.ModuleList:
    """The stack of decoder layers of a transformers model, whatever its name.

    Raises:
        CheckpointError: no list of modules is as long as the configuration says.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise CheckpointError(f"model type {model.config.model_type!r}: no stack of {num_layers} decoder layers found")


def attention_module(layer: nn.Module) -> nn.Module:
    """The self-attention of a decoder layer. Raises CheckpointError: it has none that is named so."""
    for module in layer.modules():
        if type(module).__name__.endswith("Attention"):
            return module
    raise CheckpointError(f"{type(layer).__name__} holds no module whose class ends in Attention")


@contextmanager
def recording(layers: Mapping[int, nn.Module], head: nn.Module | None, batch: ProbeBatch) -> Iterator[Recording]:
    """Hooks on decoder layers (by index) and on the head for the time of a block.

    The head's input becomes (1, S, D). Both `hidden` of a layer's input and its attention are recorded under the
    layer's index; the head's input under the next one.
    """
    found = Recording()
    handles = []
    kept = batch.with_attention.nonzero()[:, 0]

    def of(states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return states[rows.to(states.device), columns.to(states.device)]

    def on_input(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        found.hidden[index] = of(states, batch.rows, batch.columns).float().cpu()

    def on_attention(index: int, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        weights = next((x for x in output[1:] if isinstance(x, Tensor) and x.dim() == 4), None)
        if weights is None:
            raise CheckpointError(f"{type(module).__name__} gave no attention probabilities")
        picked = weights.transpose(1, 2)  # (B, T, H, K)
        found.attention[index] = of(picked, batch.rows[kept], batch.columns[kept]).transpose(0, 1).float().cpu()

    def on_head(_: nn.Module, args: tuple[Any, ...]) -> Any:
        states = of(args[0], batch.rows, batch.columns)
        found.hidden[max(layers, default=-1) + 1] = states.float().cpu()
        return (states[None], *args[1:])

    for index, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(partial(on_input, index), with_kwargs=True))
        handles.append(attention_module(layer).register_forward_hook(partial(on_attention, index)))
    if head is not None:
        handles.append(head.register_forward_pre_hook(on_head))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def model_outputs(model: Any, batch: ProbeBatch, device: str = "cpu") -> BatchOutputs:
    """Run a whole model over a micro-batch. Does not check that the outputs are finite."""
    layers = decoder_layers(model)
    with torch.no_grad(), recording(dict(enumerate(layers)), model.get_output_embeddings(), batch) as found:
        logits = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), use_cache=False
        ).logits
    return BatchOutputs(
        logits=logits[0].float().cpu(),
        hidden=torch.stack([found.hidden[index] for index in range(len(layers) + 1)]),
        attention=torch.stack([found.attention[index] for index in range(len(layers))]),
    )


class ProbeModel:
    """One checkpoint at a time in memory, run over probes."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self._dtype, self._device = dtype, device
        self._model: Any = None
        self._source: CheckpointRef | ResolvedPlan | None = None
        self._config_key = ""

    def load(self, source: CheckpointRef | ResolvedPlan) -> Any:
        """The model with the weights of a checkpoint or a merge; the one before is overwritten where that is possible.

        Raises:
            CheckpointError: it cannot be loaded or made, or holds NaN or infinity.
        """
        if source == self._source:
            return self._model
        ref = source if isinstance(source, CheckpointRef) else source.checkpoints[0]
        key = config_key(ref)
        reusable = self._model is not None and key == self._config_key
        self._source = None  # an error must not leave the old name on new weights
        if source is ref and reusable and put_weights(self._model, ref):
            check_finite(self._model, ref)
        elif source is ref or not reusable:
            self._model = None
            self._model = load_model(ref, self._dtype, self._device)
            self._config_key = key
        if isinstance(source, ResolvedPlan):
            self._put_merge(source)
        self._source = source
        return self._model

    def _put_merge(self, merge: ResolvedPlan) -> None:
        stream = FiniteStream(merge)
        if not put_tensors(self._model, stream):
            raise unusable(merge, "its tensors do not cover the model's parameters")
        stream.check()

    def outputs(self, ref: CheckpointRef, batch: ProbeBatch) -> BatchOutputs:
        """Run a checkpoint over a micro-batch. Raises CheckpointError: see `load`; or its logits are not finite."""
        outputs = model_outputs(self.load(ref), batch, self._device)
        check_logits(ref, outputs.logits)
        return outputs

    @torch.no_grad()
    def continuation(self, ref: CheckpointRef, batch: TokenBatch, num_tokens: int) -> Tensor:
        """Greedy tokens after each row, (B, num_tokens) int64, without those that end a text."""
        from transformers import GenerationConfig

        model = self.load(ref)
        # `generate` fills what is not given from the model, which may have come with another checkpoint's penalties.
        model.generation_config = GenerationConfig(eos_token_id=end_of_text(ref, model.config).tolist() or None)
        ids, mask = left_padded(batch)
        settings = GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, num_beams=1, pad_token_id=0
        )
        written = model.generate(ids.to(self._device), attention_mask=mask.to(self._device), generation_config=settings)
        return written[:, ids.shape[1] :].cpu()


def check_logits(source: CheckpointRef | ResolvedPlan, logits: Tensor) -> None:
    """Raises CheckpointError where they are not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise unusable(source, "its logits on the probes are not finite")


def unusable(source: CheckpointRef | ResolvedPlan, what: str) -> CheckpointError:
    """The error of a checkpoint, or of a merge by its label."""
    if isinstance(source, CheckpointRef):
        return source.error(what)
    return CheckpointError(f"merge {source.plan.label!r}: {what}")
