"""compressed-tensors: pack-quantized (dense words of 0.18 and padded ones before), int-, float- and naive-quantized,
NVFP4, MXFP4 and MXFP8. Which one a linear is in is said by the types of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import SCALE_TYPES, Packed, group_size_of, modules_with, shape_of
from whit.export.readers.gptq import ACT_ORDER, FLOATS
from whit.export.readers.microscaled import EXPONENTS, mxfp4_linear, mxfp8_linear, nvfp4_linear
from whit.formats.act_order import MOST_GROUPS, ActOrder
from whit.formats.affine import Affine
from whit.formats.microfloat import Float8
from whit.layouts.affine import signed
from whit.layouts.gptq import plain_groups
from whit.layouts.words import unpack_padded, unpack_words, word_count
from whit.tensor import QuantizedTensor


def read_compressed_tensors(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Linears with a `weight_packed`, and those with a `weight` of 8 bits and a `weight_scale`."""
    groups = [g for g in dict(config.get("config_groups") or {}).values() if isinstance(g, dict)]
    weights = [g["weights"] for g in groups if isinstance(g.get("weights"), dict)]
    claimed = [int(w["num_bits"]) for w in weights if isinstance(w.get("num_bits"), int)]
    sizes = {w.get("group_size") for w in weights}
    packed = {}
    for module in modules_with(checkpoint, "weight_packed"):
        is_float = checkpoint.entries[f"{module}.weight_packed"].spec.dtype == torch.uint8
        packed[f"{module}.weight"] = (
            _four_bit_floats(checkpoint, module) if is_float else _packed(checkpoint, module, claimed, sizes)
        )
    for module in modules_with(checkpoint, "weight_scale"):
        if f"{module}.weight" in checkpoint:
            packed[f"{module}.weight"] = one_byte(checkpoint, module)
    return packed


def packing(columns: int, words: int, claimed: list[int]) -> tuple[int, bool] | None:
    """(bits, dense) that put `columns` integers into `words`; the claimed widths only. None where none does."""
    for bits in claimed:
        if 1 <= bits <= 8 and word_count(columns, bits) == words:
            return bits, True
        if 1 <= bits <= 8 and -(-columns // (32 // bits)) == words:
            return bits, False
    return None


def _packed(checkpoint: Checkpoint, module: str, claimed: list[int], sizes: set[Any]) -> Packed:
    where = f"{checkpoint.folder}: {module}"
    rows, words = shape_of(checkpoint, f"{module}.weight_packed", 2, (torch.int32,))
    shape_of(checkpoint, f"{module}.weight_shape", 1, (torch.int64, torch.int32))
    said = checkpoint[f"{module}.weight_shape"].tolist()
    scales = shape_of(checkpoint, f"{module}.weight_scale", 2, FLOATS)
    found = packing(said[1], words, claimed) if len(said) == 2 and 0 < said[1] <= 32 * words else None
    if found is None or said[0] != rows or scales[0] != rows:
        raise CheckpointError(
            f"{where}: weight_packed {[rows, words]} and weight_scale {list(scales)} do not fit weight_shape {said} in "
            f"{' or '.join(map(str, claimed)) or 'no'} bits; they must; correct config.json or get the file again"
        )
    (bits, dense), columns = found, said[1]
    unpack = unpack_words if dense else unpack_padded
    keys = ["weight_packed", "weight_scale", "weight_shape"]
    keys += [key for key in ("weight_zero_point", "weight_g_idx") if f"{module}.{key}" in checkpoint]
    names = tuple(f"{module}.{key}" for key in keys)
    size = group_size_of(columns, scales[1], where, columns if columns in sizes else None)
    index = checkpoint[f"{module}.weight_g_idx"] if "weight_g_idx" in keys else None
    plain = index is None or bool((index < 0).all()) or torch.equal(index.int(), plain_groups(columns, size))
    dtype = checkpoint.entries[f"{module}.weight_scale"].spec.dtype
    format = Affine(bits, size, "weight_zero_point" not in keys, scale_type=SCALE_TYPES[dtype])
    read = partial(_read, checkpoint, module, format, (rows, columns), unpack)
    if plain or index is None:
        return Packed(names, (rows, columns), format, read)
    if bool((index < 0).any()) or bool((index >= scales[1]).any()) or not 0 < scales[1] <= MOST_GROUPS:
        raise CheckpointError(
            f"{where}: weight_g_idx names groups beyond the {scales[1]} there are, or beyond {MOST_GROUPS}; "
            "get the file again"
        )
    return Packed(names, (rows, columns), ActOrder(format), partial(_by_index, read, index), ACT_ORDER)


def _read(
    checkpoint: Checkpoint,
    module: str,
    format: Affine,
    shape: tuple[int, int],
    unpack: Callable[[Tensor, int, int], Tensor],
) -> QuantizedTensor:
    codes = unpack(checkpoint[f"{module}.weight_packed"], shape[1], format.bits)
    scale, zero = checkpoint[f"{module}.weight_scale"], None
    if not format.symmetric:
        stored = checkpoint[f"{module}.weight_zero_point"]
        if stored.dtype == torch.int32 and stored.shape != scale.shape:
            zero = unpack(stored.t().contiguous(), shape[0], format.bits).t().contiguous()
        else:  # older files: signed, one an element
            if stored.shape == scale.shape and (outside := beyond(stored, format.bits)):
                raise CheckpointError(
                    f"{module}.weight_zero_point: {outside} of {stored.numel()} are out of range; all must be codes of "
                    f"{format.bits} bits; quantize again"
                )
            zero = (stored.to(torch.int16) + (1 << (format.bits - 1))).to(torch.uint8)
        if zero.shape != scale.shape:
            raise CheckpointError(f"{module}.weight_zero_point: {list(zero.shape)} for {list(scale.shape)} scales")
    return signed(format, shape, codes, scale, zero)


def beyond(zero: Tensor, bits: int) -> int:
    """How many signed zero points are not codes of that many bits."""
    half = 1 << (bits - 1)
    return int(((zero < -half) | (zero >= half)).sum())


def _by_index(read: Callable[[], QuantizedTensor], index: Tensor) -> QuantizedTensor:
    """The weight where columns of a group lie apart."""
    value = read()
    assert isinstance(value.format, Affine)
    params = {**value.params, "group": index.to(torch.int16).reshape(1, -1)}
    return QuantizedTensor(ActOrder(value.format), value.shape, value.codes, params)


def _four_bit_floats(checkpoint: Checkpoint, module: str) -> Packed:
    """NVFP4 where the whole matrix has a scale too, else MXFP4."""
    weight, scale, whole, inputs = (
        f"{module}.{key}" for key in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    )
    others = (inputs,) if inputs in checkpoint else ()
    if f"{module}.weight_zero_point" in checkpoint:
        raise CheckpointError(
            f"{checkpoint.folder}: {module}: 4-bit floats with zero points; whit reads them without; use the original "
            "model"
        )
    if whole in checkpoint:
        return nvfp4_linear(checkpoint, (weight, scale, whole), divides=True, others=others)
    return mxfp4_linear(checkpoint, weight, scale, others)


def one_byte(checkpoint: Checkpoint, module: str) -> Packed:
    """A linear with a `weight` of 8 bits and a `weight_scale`."""
    rows, columns = shape_of(checkpoint, f"{module}.weight", 2, (torch.int8, torch.float8_e4m3fn))
    entry = checkpoint.entries[f"{module}.weight_scale"]
    if entry.spec.dtype in EXPONENTS:
        return mxfp8_linear(checkpoint, f"{module}.weight", f"{module}.weight_scale")
    keys = ["weight", "weight_scale"]
    keys += [k for k in ("weight_zero_point", "input_scale", "input_zero_point") if f"{module}.{k}" in checkpoint]
    names = tuple(f"{module}.{key}" for key in keys)
    shape, count = (rows, columns), entry.spec.nbytes // entry.spec.dtype.itemsize
    is_float = checkpoint.entries[f"{module}.weight"].spec.dtype == torch.float8_e4m3fn
    shifted = "weight_zero_point" in keys and bool(checkpoint[f"{module}.weight_zero_point"].any())
    if count not in (1, rows) or shifted or entry.spec.dtype not in SCALE_TYPES:
        note = "scales per group or tile, or zero points, with a byte a weight"
        return Packed(names, shape, None, partial(_dense, checkpoint, module, shifted), note)
    kind = SCALE_TYPES[entry.spec.dtype]
    format = Float8() if is_float else Affine(8, 0, True, count == 1 and rows > 1, scale_type=kind)

    def read() -> QuantizedTensor:
        weight, scale = checkpoint[f"{module}.weight"], checkpoint[f"{module}.weight_scale"].reshape(-1, 1)
        if is_float:
            return QuantizedTensor(
                format, shape, weight.view(torch.uint8), {"scale": scale.float().expand(rows, 1).contiguous()}
            )
        return QuantizedTensor(format, shape, weight, {"scale": scale})

    return Packed(names, shape, format, read)


def _dense(checkpoint: Checkpoint, module: str, shifted: bool) -> Tensor:
    """Scales (n, m) each stand for a tile of (rows / n, columns / m)."""
    weight, scale = checkpoint[f"{module}.weight"].float(), checkpoint[f"{module}.weight_scale"].float()
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    if shifted:
        weight = weight - _tiled(checkpoint[f"{module}.weight_zero_point"].float().reshape(scale.shape), weight.shape)
    return weight * _tiled(scale, weight.shape)


def _tiled(values: Tensor, shape: torch.Size) -> Tensor:
    for dimension in (0, 1):
        step, rest = divmod(shape[dimension], values.shape[dimension])
        if rest:
            raise CheckpointError(f"weight_scale {list(values.shape)}: tiles do not divide {list(shape)}; they must")
        values = values.repeat_interleave(step, dim=dimension)
    return values
