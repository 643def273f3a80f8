"""A foreign checkpoint seen as a plain one: each quantized linear shows the `weight` that it stands for, dequantized.

What reads plain checkpoints (`model.source`) then finds names, conversions, ties and missing parameters as always;
`packed` keeps what is behind each such weight, for whoever wants the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from whit.activations import Activations
from whit.checkpoint.header import Entry
from whit.checkpoint.reader import Checkpoint, Tensors
from whit.errors import CheckpointError, reason_of
from whit.formats.numeric import dtype_name
from whit.tensor import Format, QuantizedTensor, TensorSpec, turned


@dataclass(frozen=True)
class Packed:
    """A quantized matrix in a file. `keys` are its tensors; `format` is None where no format of whit holds it exactly,
    for the reason in `note`; `load` gives the value, floats in that case. `dtype` is theirs where the file
    has floats; those of codes are float32. `inputs` says how a linear's inputs are rounded where its own tensors do
    (CheckpointError: in a way that whit has not); where it is None, config.json does."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    format: Format | None
    load: Callable[[], QuantizedTensor | Tensor]
    note: str | None = None
    dtype: torch.dtype | None = None
    inputs: Callable[[], Activations | None] | None = None

    def read(self) -> QuantizedTensor | Tensor:
        """The value. CheckpointError where the tensors do not fit together."""
        with sentences(self.keys[0]):
            return self.load()

    def floats(self) -> Tensor:
        """The weight, in float32 or in its `dtype`."""
        with sentences(self.keys[0]):
            value = self.load()
            return value.dequantize() if isinstance(value, QuantizedTensor) else value


@contextmanager
def sentences(where: str) -> Iterator[None]:
    """Whatever a damaged file or configuration makes Python or torch say, as a CheckpointError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: its tensors and config.json do not fit together ({reason_of(error)}); "
            "they must; get the file again"
        ) from error


Reader: TypeAlias = Callable[[Mapping[str, Any], Checkpoint], dict[str, Packed]]
"""(quantization_config, tensors) to weight name and what is behind it; reads no codes."""


class Foreign(Mapping[str, Tensor]):
    """A checkpoint whose quantized tensors are shown as the weights that they stand for."""

    def __init__(self, checkpoint: Tensors, packed: dict[str, Packed]) -> None:
        self.checkpoint, self.packed = checkpoint, packed
        self.folder, self.shards = checkpoint.folder, checkpoint.shards
        hidden = {key for item in packed.values() for key in item.keys}
        self.entries = {name: entry for name, entry in checkpoint.entries.items() if name not in hidden}
        for name, item in packed.items():
            spec = TensorSpec(item.shape, item.dtype or torch.float32)
            self.entries[name] = Entry(checkpoint.entries[item.keys[0]].path, spec, 0, 0)
        self._transposed: set[str] = set()

    def transpose(self, name: str) -> None:
        """Show a quantized weight (out, in) as (in, out), as a Conv1D holds it; experts of a stack each so."""
        entry = self.entries[name]
        self.entries[name] = replace(entry, spec=TensorSpec(turned(entry.spec.shape), entry.spec.dtype))
        self._transposed.add(name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.packed:
            return self.checkpoint[name]
        floats = self.packed[name].floats()
        return floats.mT.contiguous() if name in self._transposed else floats

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def descriptor(self, path: Path) -> int:
        """Of a file with tensors that are not quantized."""
        return self.checkpoint.descriptor(path)

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()


def modules_with(checkpoint: Checkpoint, suffix: str) -> list[str]:
    """Modules that have a tensor of that name."""
    return [name.removesuffix(f".{suffix}") for name in checkpoint if name.endswith(f".{suffix}")]


def shape_of(checkpoint: Checkpoint, key: str, dimensions: int, dtypes: tuple[torch.dtype, ...]) -> tuple[int, ...]:
    """The shape of a tensor that must be there, or CheckpointError."""
    entry = checkpoint.entries.get(key)
    kinds = " or ".join(dtype_name(dtype) for dtype in dtypes)
    if entry is None:
        raise CheckpointError(f"{checkpoint.folder}: {key} is missing; a quantized linear has it; get the file again")
    if len(entry.spec.shape) != dimensions or entry.spec.dtype not in dtypes:
        raise CheckpointError(
            f"{checkpoint.folder}: {key} is {entry.spec.dtype} {list(entry.spec.shape)}; it must be {kinds} with "
            f"{dimensions} dimensions; get the file again"
        )
    return entry.spec.shape


def group_size_of(columns: int, groups: int, where: str, claimed: object = None) -> int:
    """Columns per group, 0 for the whole row; CheckpointError where they do not divide.

    One group may be either: it is a group where the configuration claims groups of just this size.
    """
    if groups < 1 or columns % groups:
        raise CheckpointError(f"{where}: {columns} columns in {groups} groups; they must divide; get the file again")
    return 0 if groups == 1 and claimed != columns else columns // groups


SCALE_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
