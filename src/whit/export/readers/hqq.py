"""HQQ, axis 1 as codes and axis 0 dequantized. What a linear is stands in its own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import SCALE_TYPES, Packed, group_size_of, modules_with
from whit.formats.affine import Affine
from whit.layouts.affine import middle
from whit.layouts.hqq import NAMES, SLICES, HQQLayout, unpack_slices
from whit.tensor import PackedWeight, QuantizedTensor

META = (
    "nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype", "view_as_float",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip


def read_hqq(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every linear with a `W_q`."""
    params = dict(config.get("quant_config") or {}).get("weight_quant_params")
    claimed = params.get("group_size") if isinstance(params, dict) else None
    return {f"{module}.weight": _linear(checkpoint, module, claimed) for module in modules_with(checkpoint, "W_q")}


def _linear(checkpoint: Checkpoint, module: str, claimed: object) -> Packed:
    where = f"{checkpoint.folder}: {module}"

    def number(key: str, default: int | None = None) -> int:
        if f"{module}.{key}" not in checkpoint:
            if default is None:
                raise CheckpointError(f"{where}.{key} is missing; an HQQ linear has it; get the file again")
            return default
        tensor = checkpoint[f"{module}.{key}"]
        if tensor.numel() != 1:
            raise CheckpointError(f"{where}.{key}: {tensor.numel()} numbers; it must be one; get the file again")
        return int(tensor)

    bits, axis = number("nbits"), number("axis")
    missing = [key for key in ("shape", "scale", "zero", "packing") if f"{module}.{key}" not in checkpoint]
    if missing or bits not in SLICES or number("quant_scale", 0) or number("quant_zero", 0):
        what = f"{missing[0]} is missing" if missing else f"{bits} bits, or scales quantized themselves"
        raise CheckpointError(f"{where}: {what}; whit reads HQQ of 1, 2, 3, 4, 8 bits with plain scales; export it so")
    shape = tuple(checkpoint[f"{module}.shape"].tolist())
    name = "".join(map(chr, checkpoint[f"{module}.packing"].tolist()))
    scale, zero = checkpoint[f"{module}.scale"], checkpoint[f"{module}.zero"]
    groups, spec = scale.numel(), checkpoint.entries[f"{module}.W_q"].spec
    stored = spec.nbytes // (4 if bits == 3 else 1) * SLICES[bits]
    fits = len(shape) == 2 and min(shape) > 0 and 0 < groups == zero.numel() and prod(shape) % groups == 0
    line = prod(shape) // max(groups, 1) if axis == 1 else groups  # codes that are packed beside each other
    if not fits or name != NAMES[bits] or stored - prod(shape) not in range(SLICES[bits] * line):
        raise CheckpointError(
            f"{where}: W_q {list(spec.shape)} packed as {name} and {groups} scales do not fit {list(shape)} in {bits} "
            "bits; they must; get the file again"
        )
    keys = tuple(f"{module}.{key}" for key in ("W_q", *META) if f"{module}.{key}" in checkpoint)
    format = (
        _format(bits, shape, scale, zero, claimed) if axis == 1 and shape[1] % (prod(shape) // groups) == 0 else None
    )
    if format is None:
        note = "groups along rows (axis 0), or zero points that float16 does not hold"
        return Packed(keys, shape, None, partial(_dense, checkpoint, module, bits, axis, shape), note)
    return Packed(keys, shape, format, partial(_read, checkpoint, module, format, shape))


def _format(bits: int, shape: tuple[int, ...], scale: Tensor, zero: Tensor, claimed: object) -> Affine | None:
    size = group_size_of(shape[1], scale.numel() // shape[0], "scale", claimed)
    kind = SCALE_TYPES.get(scale.dtype)
    if kind is None or not torch.equal(zero.to(torch.float16).float(), zero.float()):
        return None
    if bool((zero == (0.5 if bits == 1 else middle(bits))).all()):
        return Affine(bits, size, scale_type=kind)
    whole = bool(((zero == zero.round()) & (zero >= 0) & (zero < 1 << bits)).all())
    return Affine(bits, size, False, float_zero=not whole, scale_type=kind)


def _words(checkpoint: Checkpoint, module: str, bits: int) -> Tensor:
    words = checkpoint[f"{module}.W_q"]
    return words.view(torch.int32 if bits == 3 else torch.uint8)  # some are seen as floats


def _read(checkpoint: Checkpoint, module: str, format: Affine, shape: tuple[int, ...]) -> QuantizedTensor:
    tensors = {key: checkpoint[f"{module}.{key}"] for key in ("scale", "zero")}
    tensors["zero"] = tensors["zero"].to(torch.float16)
    tensors["W_q"] = _words(checkpoint, module, format.bits)
    return HQQLayout().unpack(PackedWeight("hqq", format, shape, tensors))


def _dense(checkpoint: Checkpoint, module: str, bits: int, axis: int, shape: tuple[int, ...]) -> Tensor:
    scale, zero = (checkpoint[f"{module}.{key}"].float() for key in ("scale", "zero"))
    size = prod(shape) // scale.numel()
    rows = scale.numel() if axis == 1 else size
    codes = unpack_slices(_words(checkpoint, module, bits), bits, rows).float()
    line = (-1, 1) if axis == 1 else (1, -1)
    return ((codes - zero.reshape(line)) * scale.reshape(line)).reshape(shape)
