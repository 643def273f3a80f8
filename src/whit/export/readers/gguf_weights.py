"""The weights of a .gguf file: codes where a type is a format of whit, floats where it is not.

What llama.cpp stores otherwise than transformers is undone: the order of q's and k's rows, Gemma's norms, GPT-2's
matrices, experts in stacks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.gguf import GgufHeader, GgufTensor
from whit.checkpoint.header import Entry
from whit.checkpoint.reader import TensorFiles
from whit.errors import CheckpointError
from whit.export.gguf.architectures import Architecture
from whit.export.gguf.metadata import head_width
from whit.export.linears import put_rows
from whit.export.readers.base import Packed
from whit.formats import parse_format
from whit.formats.ggml import KINDS
from whit.layouts import GGML
from whit.tensor import PackedWeight, QuantizedTensor, TensorSpec

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GgufCheckpoint(TensorFiles):
    """The attributes of a Checkpoint that sources use. Tensors have the file's own names, quantized ones are bytes."""

    def __init__(self, header: GgufHeader, folder: TemporaryDirectory[str]) -> None:
        super().__init__()
        self.header, self.shards = header, header.paths
        self._temporary = folder  # lives as long as this
        self.folder = next(Path(folder.name).iterdir())
        for tensor in header.tensors.values():
            dtype = DTYPES.get(tensor.type)
            shape = tensor.shape if dtype is not None else (tensor.stop - tensor.start,)
            spec = TensorSpec(shape, dtype or torch.uint8)
            self.entries[tensor.name] = Entry(tensor.path, spec, tensor.start, tensor.stop)


def packed_of(checkpoint: GgufCheckpoint, tensor: GgufTensor, architecture: Architecture, config: Any) -> Packed | None:
    """What is behind a tensor; None where transformers has the same bytes."""
    order = _order(tensor, architecture, config)
    kind = tensor.type.lower()
    if kind in KINDS:
        format = parse_format(kind)
        return Packed((tensor.name,), tensor.shape, format, partial(_codes, checkpoint, tensor, order))
    if tensor.type not in DTYPES:
        note = f"{tensor.type} is decoded by gguf-py and is not a format of whit"
        return Packed((tensor.name,), tensor.shape, None, partial(_decoded, checkpoint, tensor, order), note)
    offset = architecture.norm_offset if tensor.name.endswith("norm.weight") else 0.0
    turned = architecture.name == "gpt2" and tensor.name.startswith("blk.") and len(tensor.shape) > 1
    if order is None and not offset and not turned:
        return None
    read: Callable[[], Tensor] = partial(_floats, checkpoint, tensor, order, offset)
    dtype = torch.float32 if offset else DTYPES[tensor.type]  # what is exact
    return Packed((tensor.name,), tensor.shape, None, read, "stored otherwise than transformers does", dtype)


def experts_of(checkpoint: GgufCheckpoint, tensor: GgufTensor, architecture: Architecture) -> dict[str, Packed]:
    """The matrices of a stack, one by one under the hub's names; none where a tensor is not a stack."""
    names = architecture.expert_names(tensor.name, tensor.shape[0])
    if not names or len(tensor.shape) != 3:
        return {}
    shape, kind, found = tensor.shape[1:], tensor.type.lower(), {}
    for number, name in enumerate(names):
        rows = torch.arange(number * shape[0], (number + 1) * shape[0])
        if kind in KINDS:
            read: Callable[[], QuantizedTensor | Tensor] = partial(_codes, checkpoint, tensor, rows)
            found[name] = Packed((tensor.name,), shape, parse_format(kind), read)
        else:
            load = _floats if tensor.type in DTYPES else _decoded
            note = "one of a stack of experts" if tensor.type in DTYPES else f"{tensor.type} is not a format of whit"
            args = (checkpoint, tensor, rows, 0.0) if tensor.type in DTYPES else (checkpoint, tensor, rows)
            dtype = DTYPES.get(tensor.type)
            found[name] = Packed((tensor.name,), shape, None, partial(load, *args), note, dtype)
    return found


def stacks_of(checkpoint: GgufCheckpoint, architecture: Architecture) -> dict[str, Packed]:
    """Stacks of experts, and their biases, that the hub has whole, and llama.cpp perhaps in parts."""
    tensors = checkpoint.header.tensors
    found = {}
    names = map(architecture.stack_parameter, tensors) if architecture.woven else ()
    for name in dict.fromkeys(filter(None, names)):
        parts = [tensors[part] for part in architecture.stack_names(name) if part in tensors]
        if len(parts) < len(architecture.stack_names(name)) or len({part.shape for part in parts}) > 1:
            raise CheckpointError(
                f"{checkpoint.header.path}: {', '.join(architecture.stack_names(name))}: not all there in one shape; "
                "they must be; get another copy"
            )
        experts, rows, *rest = parts[0].shape
        shape, kinds = (experts, len(parts) * rows, *rest), {part.type for part in parts}
        order = architecture.part_order(experts, shape[1], len(parts))
        kind = parts[0].type.lower() if len(kinds) == 1 else ""
        keys = tuple(part.name for part in parts)
        if kind in KINDS:
            read: Callable[[], QuantizedTensor | Tensor] = partial(_joined_codes, checkpoint, parts, order, shape)
            found[name] = Packed(keys, shape, parse_format(kind), read)
        else:
            dtype = DTYPES.get(parts[0].type) if len(kinds) == 1 else None
            read = partial(_joined_floats, checkpoint, parts, order, shape)
            found[name] = Packed(keys, shape, None, read, f"{' and '.join(sorted(kinds))} in a stack", dtype)
    return found


def _joined_codes(
    checkpoint: GgufCheckpoint, parts: Sequence[GgufTensor], order: Tensor, shape: tuple[int, ...]
) -> QuantizedTensor:
    pieces = [_codes(checkpoint, part, None) for part in parts]
    return put_rows(list(zip(order.chunk(len(parts)), pieces, strict=True)), shape)


def _joined_floats(
    checkpoint: GgufCheckpoint, parts: Sequence[GgufTensor], order: Tensor, shape: tuple[int, ...]
) -> Tensor:
    rows = [_any_floats(checkpoint, part).reshape(len(order) // len(parts), -1) for part in parts]
    kind = rows[0].dtype if len({part.dtype for part in rows}) == 1 else torch.float32
    return torch.cat([part.to(kind) for part in rows])[order.argsort()].reshape(shape)


def _any_floats(checkpoint: GgufCheckpoint, tensor: GgufTensor) -> Tensor:
    if tensor.type in DTYPES:
        return checkpoint[tensor.name]
    if tensor.type.lower() in KINDS:
        return _codes(checkpoint, tensor, None).dequantize()
    return _decoded(checkpoint, tensor, None)


def _order(tensor: GgufTensor, architecture: Architecture, config: Any) -> Tensor | None:
    """Which row of the file each row of the model is."""
    if not architecture.interleaved or tensor.name.split(".")[-2] not in ("attn_q", "attn_k"):
        return None
    rows = tensor.shape[0]
    return torch.arange(rows).reshape(-1, head_width(config) // 2, 2).transpose(1, 2).reshape(rows)


def _codes(checkpoint: GgufCheckpoint, tensor: GgufTensor, order: Tensor | None) -> QuantizedTensor:
    data = checkpoint[tensor.name].reshape(prod(tensor.shape[:-1]), -1)
    data = data if order is None else data[order]
    shape = (len(data), tensor.shape[-1])
    return GGML.unpack(PackedWeight(GGML.name, parse_format(tensor.type.lower()), shape, {"data": data}))


def _decoded(checkpoint: GgufCheckpoint, tensor: GgufTensor, order: Tensor | None) -> Tensor:
    quants, constants = importlib.import_module("gguf.quants"), importlib.import_module("gguf.constants")
    data = checkpoint[tensor.name].reshape(prod(tensor.shape[:-1]), -1)
    floats = torch.from_numpy(quants.dequantize(data.numpy(), constants.GGMLQuantizationType[tensor.type]))
    return floats if order is None else floats[order]


def _floats(checkpoint: GgufCheckpoint, tensor: GgufTensor, order: Tensor | None, offset: float) -> Tensor:
    floats = checkpoint[tensor.name]
    if offset:
        floats = floats.to(torch.float32) - offset
    if len(tensor.shape) == 3:  # experts below each other
        floats = floats.reshape(-1, tensor.shape[-1])
    return floats if order is None else floats[order]
