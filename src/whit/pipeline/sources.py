"""Where a run's parameters come from: what it asks of a checkpoint, of whatever kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whit.activations import Activations
from whit.checkpoint.header import Entry
from whit.checkpoint.reader import Tensors
from whit.formats.numeric import check_finite, is_finite
from whit.model.skeleton import computed
from whit.model.source import NOT_STORED, Origin
from whit.tensor import Format, QuantizedTensor


class Source(Protocol):
    """Where parameters come from: a checkpoint of transformers, or one of whit's that is dequantized."""

    model: PreTrainedModel
    tied: dict[str, str]
    dropped: dict[str, str]

    @property
    def checkpoint(self) -> Tensors:
        """The files that it reads."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json."""
        ...

    @property
    def origins(self) -> Mapping[str, Origin]: ...
    def read(self, name: str) -> Tensor: ...
    def entry(self, name: str) -> Entry | None: ...


@runtime_checkable
class Coded(Source, Protocol):
    """A source of a quantized model: parameters can be had as codes, as they are in the file."""

    def format(self, name: str) -> Format | None:
        """The format in which a parameter is stored and can be had exactly; None where there is none."""
        ...

    def quantized(self, name: str) -> QuantizedTensor:
        """A parameter in its `format`, codes and params as they are in the file."""
        ...

    def note(self, name: str) -> str | None:
        """Why a parameter that is quantized in the file has no format."""
        ...

    def coded(self, name: str) -> bool:
        """Whether a parameter lies in the file as codes, of some format or of none; it is read in float32 then."""
        ...

    def input_rounding(self, name: str) -> tuple[Activations, Mapping[str, Tensor]] | None:
        """How the inputs of a parameter with a `format` are rounded, None where they stay as they are; with static
        scales where the source reads them. CheckpointError where whit cannot round so."""
        ...


def floats_dtype(source: Source, name: str) -> torch.dtype:
    """What a parameter is as floats: what it is in the file, or the model's own type where codes stand for it there."""
    if not (isinstance(source, Coded) and source.coded(name)):
        return source.origins[name].spec.dtype
    return source.model.config.dtype or torch.bfloat16


@runtime_checkable
class Widening(Protocol):
    """A source that reads every parameter in float32, in which the blocks then run."""

    widens: bool


def run_dtype(source: Source, name: str) -> torch.dtype:
    """What a parameter is where blocks run."""
    return torch.float32 if isinstance(source, Widening) else floats_dtype(source, name)


def read_to_run(source: Source, name: str) -> Tensor:
    """A parameter as a block computes with it: `read_finite`, in the type of the floats around it.

    One that no checkpoint holds (Marian's sinusoids of positions) is computed as transformers does on loading.
    """
    if source.dropped.get(name) == NOT_STORED and name in dict(source.model.named_parameters()):
        return computed(source.model, name)
    values = read_finite(source, name)
    is_coded = isinstance(source, Coded) and source.coded(name)  # what codes stand for comes in float32
    return values.to(run_dtype(source, name)) if is_coded else values


def read_finite(source: Source, name: str) -> Tensor:
    """A parameter as `Source.read` gives it. NonFiniteError where it holds a NaN or an infinity.

    A buffer may: a causal mask holds infinities.
    """
    values = source.read(name)
    if not is_finite(values) and name not in {buffer for buffer, _ in source.model.named_buffers()}:
        check_finite(values, name)
    return values
