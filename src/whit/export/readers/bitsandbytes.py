"""bitsandbytes: 4-bit linears with their `quant_state`, and 8-bit ones with their `SCB`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import Packed, modules_with, shape_of
from whit.formats.absmax import Absmax8
from whit.formats.codebook import TABLES, Codebook
from whit.layouts.bitsandbytes import OFFSET, Bnb4Bit, Bnb8Bit
from whit.tensor import PackedWeight, QuantizedTensor

STATE = ".weight.quant_state.bitsandbytes__"


def read_bitsandbytes(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Linears of both widths."""
    packed = {f"{module}.weight": _int8(checkpoint, module) for module in modules_with(checkpoint, "SCB")}
    for name in checkpoint:
        module, found, _ = name.partition(STATE)
        if found:
            packed[f"{module}.weight"] = _four_bits(checkpoint, module, name)
    return packed


def _int8(checkpoint: Checkpoint, module: str) -> Packed:
    rows, columns = shape_of(checkpoint, f"{module}.weight", 2, (torch.int8,))
    if shape_of(checkpoint, f"{module}.SCB", 1, (torch.float32,)) != (rows,):
        raise CheckpointError(f"{checkpoint.folder}: {module}.SCB: not one for each of {rows} rows; get the file again")
    keys = [f"{module}.weight", f"{module}.SCB"]
    keys += [key for key in (f"{module}.weight_format",) if key in checkpoint]

    def read() -> QuantizedTensor:
        tensors = {"weight": checkpoint[f"{module}.weight"], "SCB": checkpoint[f"{module}.SCB"]}
        return Bnb8Bit().unpack(PackedWeight("", Absmax8(), (rows, columns), tensors))

    return Packed(tuple(keys), (rows, columns), Absmax8(), read)


def _four_bits(checkpoint: Checkpoint, module: str, state_key: str) -> Packed:
    prefix = f"{module}.weight"
    state = _state(checkpoint, state_key)
    shape, size = tuple(state["shape"]), int(state["blocksize"])
    nested = f"{prefix}.nested_absmax" in checkpoint
    keys = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    names = (prefix, *(f"{prefix}.{key}" for key in keys), state_key)
    missing = [name for name in names if name not in checkpoint]
    stored = 0 if missing else checkpoint.entries[prefix].spec.nbytes
    if (
        missing
        or stored != -(-prod(shape) // 2)
        or checkpoint.entries[f"{prefix}.absmax"].spec.shape != (-(-prod(shape) // size),)
    ):
        raise CheckpointError(
            f"{checkpoint.folder}: {prefix}: {stored} bytes and {len(missing)} tensors missing for a 4-bit "
            f"{list(shape)} in blocks of {size}; all must be there and fit; get the file again"
        )
    levels = tuple(checkpoint[f"{prefix}.quant_map"].tolist())
    table = next((t for t in TABLES.values() if torch.equal(torch.tensor(t), torch.tensor(levels))), levels)
    fits = len(shape) == 2 and shape[1] % size == 0 and (not nested or _usual(checkpoint, prefix, state))
    format = Codebook(table, size, nested)
    if fits:
        return Packed(names, shape, format, partial(_read, checkpoint, prefix, format, shape, state))
    note = f"its blocks of {size} do not divide the rows of {list(shape)}, or its nested table is an unusual one"
    return Packed(names, shape, None, partial(_dense, checkpoint, prefix, table, shape, state), note)


def _state(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    try:
        found = json.loads(bytes(checkpoint[key].tolist()))
        shape = found["shape"]
        counts = [*shape, found["blocksize"]]
        if not all(isinstance(n, int) and 0 < n < 1 << 40 for n in counts) or len(shape) != 2:
            raise ValueError(f"shape {shape}, blocksize {found['blocksize']}")
        return dict(found)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {key}: not the state of a 4-bit linear ({error}); it must be; get the file again"
        ) from None


def _usual(checkpoint: Checkpoint, prefix: str, state: Mapping[str, Any]) -> bool:
    table = torch.tensor(TABLES["dynamic8"])
    return state.get("nested_blocksize") == 256 and torch.equal(checkpoint[f"{prefix}.nested_quant_map"], table)


def _tensors(checkpoint: Checkpoint, prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    keys = ("absmax", "nested_absmax", "nested_quant_map", "quant_map")
    tensors = {f"weight.{key}": checkpoint[f"{prefix}.{key}"] for key in keys if f"{prefix}.{key}" in checkpoint}
    tensors["weight"] = checkpoint[prefix].reshape(-1).view(torch.uint8)
    return {**tensors, OFFSET: torch.tensor(float(state.get("nested_offset", 0.0)))}


def _read(
    checkpoint: Checkpoint, prefix: str, format: Codebook, shape: tuple[int, ...], state: Mapping[str, Any]
) -> QuantizedTensor:
    return Bnb4Bit().unpack(PackedWeight("", format, shape, _tensors(checkpoint, prefix, state)))


def _dense(
    checkpoint: Checkpoint, prefix: str, table: tuple[float, ...], shape: tuple[int, ...], state: Mapping[str, Any]
) -> Tensor:
    """The weight where blocks run on from row to row."""
    tensors, size, count = _tensors(checkpoint, prefix, state), int(state["blocksize"]), prod(shape)
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" in tensors:
        scale = tensors["weight.nested_absmax"].repeat_interleave(int(state["nested_blocksize"]))[: absmax.numel()]
        absmax = tensors["weight.nested_quant_map"][absmax.long()] * scale + tensors[OFFSET]
    flat = tensors["weight"]
    codes = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:count]
    levels = torch.tensor(table, dtype=torch.float32)[codes.long()]
    return (levels * absmax.repeat_interleave(size)[:count]).reshape(shape)
