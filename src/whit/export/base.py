"""What an exporter is: it says how a file names, types and frames what a model has become.

A run asks it in this order: `fitted` (which variant of a format it can hold), `problems` (before a weight is read),
`specs` and `shards` (every byte planned), `tensors` (the bytes), `decode` (read back), `files` (config.json, model card
and the like). `restore` is for runs that go on after a kill and for whoever reads the result.
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
    """A format that it holds, for a sentence that wants one."""
    suffix: ClassVar[str]
    """Where not empty, an OUT that ends so is one file, and its account lies beside it, OUT.whit.json."""
    fuses: ClassVar[bool]
    """Whether engines join linears of one input (q, k, v; gate, up), which then must have one format."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None: ...

    @property
    def reads_back(self) -> bool:
        """Whether `decode` reads what was written: there is such a decoder, and it is installed."""
        ...

    @classmethod
    def fitted(cls, format: Format) -> Format:
        """The variant of a format that the file can hold (float16 scales, say); the same one where there is none."""
        ...

    @classmethod
    def whole(cls, recipe: Recipe) -> Recipe:
        """The recipe as this kind of file means it: a type for everything may stand for a mix."""
        ...

    def adapted(self, target: Target, format: Format) -> tuple[Format | None, str | None]:
        """The format in which the file holds a target that is to have `format` (None: kept), and why another one."""
        ...

    def refuses(self, activations: Activations) -> str | None:
        """Why the file cannot say that inputs are quantized so, in a clause that also says what to do; or None."""
        ...

    def problems(self, formats: Mapping[Target, Format]) -> list[str]:
        """One sentence for each thing that the file cannot hold: *where: what is; what must be; what to do.*

        Without `formats`: whether the file cannot be where nothing is quantized.
        """
        ...

    def weighed(self, by: Importance) -> None:
        """Told before `shards` that columns are weighed by an importance matrix, for files that can say so."""
        ...

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        """Names, shapes and types, in the file, of the tensors that a parameter becomes."""
        ...

    def verbatim(self, parameter: Parameter) -> bool:
        """Whether a kept parameter's own bytes go into the file as they are, in one tensor."""
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
        """The float32 weight (as quantized: target.shape) that a reader of the file makes of the tensors.

        Written from the format's description and from nothing that `tensors` uses; None where there is no such decoder.
        """
        ...

    def shards(self, parameters: Sequence[Parameter], limit: int) -> tuple[Shard, ...]:
        """The files that hold the tensors of `parameters`, in their order; at most `limit` bytes each where it can."""
        ...

    def files(self, outcome: Outcome) -> Mapping[str, bytes]:
        """config.json, README.md and whatever else the file's readers want, by name; they replace MODEL's own."""
        ...

    def takes(self, name: str) -> bool:
        """Whether a small file of MODEL (tokenizer, licence) is copied beside the weights."""
        ...
