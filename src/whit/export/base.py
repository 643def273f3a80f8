"""What an exporter is: it knows how one kind of file stores a quantized model: names, types, layout, small files.

A run asks it in this order: `fitted` (which variant of a format it can hold), `problems` (before a weight is read),
`specs` and `shards` (every byte planned), `tensors` (the bytes), `decode` (read back), `files` (config.json, model card
and the like). `restore` is for resumed runs and for everything that reads the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from whit.activations import Activations
from whit.checkpoint.writer import Shard
from whit.model.targets import Target
from whit.recipe import Recipe
from whit.tensor import Format, QuantizedTensor, TensorSpec

Value: TypeAlias = Tensor | QuantizedTensor


@dataclass(frozen=True)
class Parameter:
    """A parameter of the running model on its way to a file: `spec` is the model's own, `format` None where it is kept.

    A quantized one has a `target`, whose shape (out_features, in_features) is the QuantizedTensor's, and
    `activations` where the inputs of its linear are quantized as well.
    """

    name: str
    spec: TensorSpec
    target: Target | None
    format: Format | None
    activations: Activations | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Outcome:
    """What is known when the small files are written. `config` is MODEL's config.json without a quantization_config.

    `model` is the name that a user gave; `recipe` is None where nothing was quantized.
    """

    model: str
    config: Mapping[str, Any]
    recipe: Recipe | None
    parameters: tuple[Parameter, ...]
    tied: Mapping[str, str]
    bits_per_weight: float
    size_bytes: int

    @property
    def formats(self) -> dict[str, Format]:
        """Holder to format, of everything quantized."""
        return {p.target.holder: p.format for p in self.parameters if p.target is not None and p.format is not None}

    @property
    def inputs(self) -> dict[str, Activations]:
        """Holder to how its inputs are quantized, where they are."""
        return {p.target.holder: p.activations for p in self.parameters if p.target and p.activations is not None}


@dataclass(frozen=True)
class Importance:
    """Which importance matrix a run weighs by: its file's name, the text it was measured on, matrices and chunks."""

    file: str
    dataset: str
    entries: int
    chunks: int


class Exporter(Protocol):
    """One kind of file, for one model. A new kind is one class in one file, and one name in EXPORTERS.

    The skeleton `model` has no weights; `folder` is MODEL's, for what a file takes over from it (a tokenizer).
    UnsupportedModelError where such a file cannot name this architecture.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `--help`."""
    example: ClassVar[str]
    """A format that it holds: the default of a run, and the example in messages."""
    suffix: ClassVar[str]
    """If not empty, an OUT with this ending is one file, with its account beside it, OUT.whit.json."""
    fuses: ClassVar[bool]
    """Whether engines fuse linears with the same input (q, k, v; gate, up), which must then have the same format."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None: ...

    @property
    def reads_back(self) -> bool:
        """Whether `decode` reads what was written: there is such a decoder, and it is installed."""
        ...

    @classmethod
    def fitted(cls, format: Format) -> Format:
        """The variant of a format that the file can hold, for example with float16 scales; else the format itself."""
        ...

    @classmethod
    def whole(cls, recipe: Recipe) -> Recipe:
        """The recipe as this kind of file means it: in GGUF, a type for everything stands for a mix."""
        ...

    def adapted(self, target: Target, format: Format) -> tuple[Format | None, str | None]:
        """The format in which the file can hold a target meant for `format` (None: kept), and why if it differs."""
        ...

    def refuses(self, activations: Activations) -> str | None:
        """None if the file can express such activations, else why not and what to do, in a clause."""
        ...

    def problems(self, formats: Mapping[Target, Format]) -> list[str]:
        """One sentence for each thing that the file cannot hold: *where: what is; what must be; what to do.*

        With empty `formats`: whether such a file must have something quantized.
        """
        ...

    def weighed(self, by: Importance) -> None:
        """Called before `shards` if columns are weighed by an importance matrix, for files that record it."""
        ...

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        """Names, shapes and types, in the file, of the tensors that a parameter becomes."""
        ...

    def verbatim(self, parameter: Parameter) -> bool:
        """Whether a kept parameter is copied byte for byte, as one tensor."""
        ...

    def tensors(self, parameter: Parameter, value: Value) -> Mapping[str, Tensor]:
        """The tensors themselves; `value` is a QuantizedTensor where the parameter has a format."""
        ...

    def inputs(self, parameter: Parameter, scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors for static scales of a linear's inputs, `input_scale` and `input_zero_point` (1,)."""
        ...

    def restore(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Value:
        """The inverse of `tensors`."""
        ...

    def decode(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The float32 weight (of target.shape, as it was quantized) that a reader of the file gets from the tensors.

        It follows the format's description and shares no code with `tensors`; None where there is no such decoder.
        """
        ...

    def shards(self, parameters: Sequence[Parameter], limit: int) -> tuple[Shard, ...]:
        """The files that hold the tensors of `parameters`, in their order; if possible at most `limit` bytes each."""
        ...

    def files(self, outcome: Outcome) -> Mapping[str, bytes]:
        """config.json, README.md and whatever else readers of the file need, by name; they replace MODEL's own."""
        ...

    def takes(self, name: str) -> bool:
        """Whether a small file of MODEL (tokenizer, licence) is copied beside the weights."""
        ...
