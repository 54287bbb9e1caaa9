"""What is merged into what, tensor by tensor: the form that plans and mergekit files are compiled to. No torch.

A graph lists the output's tensors. Each is computed from tensors of checkpoints by a tree of operators with plain
numbers as parameters: layer gradients, filters, slices and precedence are resolved before. So one engine runs them all,
any tensor can be computed alone (in chunks, on another machine, after an interruption), and every problem that the
headers show is found before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from simmerge_ray.base.storage import digest_bytes, digest_json
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.row_layouts import RowLayout

# As safetensors names them, in the order in which mixed inputs are promoted.
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

Number = float | int | bool | str


@dataclass(frozen=True)
class Read:
    """One tensor of one checkpoint."""

    checkpoint: str
    tensor: str


@dataclass(frozen=True)
class Apply:
    """An operator on the results of `sources`, one weight each.

    weights: as the n-ary operator takes them. params: by name; a tuple holds one number for each source. TIES trimmed
    over the whole model gets `thresholds` and `budgets` (see `operators.ties`) when they have been found.
    round_to: dtype to which the result is rounded when it is an input of another step; None keeps float32.
    step: number of the step in the plan, part of the seed of random operators. grams: what `regmean` knows of the
    inputs of each source's layer.
    """

    operator: str
    sources: tuple[Node, ...]
    weights: tuple[float, ...]
    params: tuple[tuple[str, Number | tuple[float, ...]], ...] = ()
    base: Node | None = None
    step: int = 0
    round_to: str | None = None
    grams: tuple[Read, ...] = ()

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The base, if there is one, and the sources."""
        return self.sources if self.base is None else (self.base, *self.sources)

    def param(self, name: str, default: Any = None) -> Any:
        """A parameter by name."""
        return dict(self.params).get(name, default)


@dataclass(frozen=True)
class Rows:
    """A tensor whose rows (entries of its first axis) are rows of tensors of one width, or made of them.

    layout: key of the `RowLayout` in `MergeGraph.layouts`, its digest. num_rows: of the result. dtype: to which what is
    computed of several rows is rounded, as safetensors names it.
    """

    sources: tuple[Read, ...]
    layout: str
    num_rows: int
    dtype: str


Node = Read | Apply | Rows


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the merged checkpoint: its name, shape, dtype as safetensors names it, and how it is made.

    input_dtype: dtype to which inputs are cast first, or None to take them as they are stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    node: Node
    input_dtype: str | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class MergeGraph:
    """All tensors of a merge, in name order, and what stands in the directory beside them.

    checkpoints: every checkpoint that is read, by id. config: content of `config.json`. tokenizer_from: whose
    tokenizer files are copied. description: JSON of the plan, for the model card. mergekit: the same merge as text of
    a `mergekit_config.yml`, or None where mergekit cannot express it. seed: of the random operators. layouts: of its
    `Rows`. tokenizer_files: content of the tokenizer's files by name where they are not those of `tokenizer_from`.
    warnings: what of the file has no effect.
    """

    outputs: tuple[OutputTensor, ...]
    checkpoints: Mapping[str, CheckpointRef]
    config: Mapping[str, Any]
    tokenizer_from: str
    members: tuple[str, ...]
    title: str
    description: Mapping[str, Any] = field(default_factory=dict)
    mergekit: str | None = None
    seed: int = 0
    layouts: Mapping[str, RowLayout] = field(default_factory=dict)
    tokenizer_files: Mapping[str, bytes] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(output.num_bytes for output in self.outputs)

    def digest(self) -> str:
        """Identity of the computation, without the bytes of its inputs."""
        outputs = [[o.name, list(o.shape), o.dtype, o.input_dtype, astuple(o.node)] for o in self.outputs]
        paths = {key: [str(ref.path), str(ref.adapter)] for key, ref in self.checkpoints.items()}
        files = {name: digest_bytes(content) for name, content in (self.tokenizer_files or {}).items()}
        return digest_json([outputs, paths, self.seed, files])


def reads(node: Node) -> Iterator[Read]:
    """Every tensor that a node needs, bases included, in the order in which it is used."""
    yield from (one for one in _tree(node) if isinstance(one, Read))


def applies(node: Node) -> Iterator[Apply]:
    """Every operator of a tree, sources before what is made of them."""
    yield from (one for one in _tree(node) if isinstance(one, Apply))


def _tree(node: Node) -> Iterator[Node]:
    inner = (*node.inputs, *node.grams) if isinstance(node, Apply) else node.sources if isinstance(node, Rows) else ()
    for one in inner:
        yield from _tree(one)
    yield node


def with_dtype(config: Mapping[str, Any], outputs: Sequence[OutputTensor]) -> dict[str, Any]:
    """The content of a `config.json` with the dtype that most bytes of the output have."""
    sizes = {dtype: sum(o.num_bytes for o in outputs if o.dtype == dtype) for dtype in DTYPE_NAMES}
    most = max(sizes, key=lambda dtype: sizes[dtype])
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: DTYPE_NAMES[most]} if sizes[most] else dict(config)


def promoted(dtypes: list[str]) -> str:
    """The dtype of a merge of tensors of these dtypes, as torch promotes: float16 with bfloat16 gives float32."""
    floats = sorted({dtype for dtype in dtypes if dtype in FLOAT_DTYPES}, key=FLOAT_DTYPES.index)
    if not floats:
        return dtypes[0]
    return "F32" if floats[:2] == ["F16", "BF16"] and len(floats) == 2 else floats[-1]
