"""The tensors of compressed-tensors: `pack-quantized`, `int-quantized` and `float-quantized`. G groups, b bits.

pack-quantized: `weight_packed` int32 (N, ceil(K b / 32)), q + 2^(b-1) of signed codes; `weight_scale` (N, G);
`weight_shape` int64 (2,); asymmetric ones have `weight_zero_point` int32 (ceil(N b / 32), G), packed along rows.
The others: `weight` int8 or float8_e4m3fn (N, K), `weight_scale` (N, 1).
Unsigned codes and zero points of whit are theirs plus 2^(b-1): both store the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from whit.formats.grouping import group_count
from whit.formats.numeric import DTYPE_NAMES
from whit.layouts.affine import as_affine, refuse_affine, refuse_ragged, signed, unsigned
from whit.layouts.base import WholeRows
from whit.layouts.words import pack_words, unpack_words, word_count
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec, tensor_param

SCALES = ("bf16", "f16", "f32")


@dataclass(frozen=True)
class PackQuantized(WholeRows):
    """Integers in dense words. Of 3, 5, 6 and 7 bits older readers expect padded words, so they are not written."""

    name = "pack-quantized"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        if reason := refuse_affine(format, (2, 4, 8), SCALES) or refuse_ragged(format, shape):
            return f"pack-quantized {reason}"
        return None if len(shape) == 2 else f"pack-quantized holds matrices, and this is {list(shape)}"

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        rows, columns = shape
        affine = as_affine(format)
        assert affine is not None
        groups = group_count(columns, format.group_size)
        specs = {
            "weight_packed": TensorSpec((rows, word_count(columns, format.bits)), torch.int32),
            "weight_scale": TensorSpec((rows, groups), DTYPE_NAMES[affine.scale_type]),
            "weight_shape": TensorSpec((2,), torch.int64),
        }
        if not affine.symmetric:
            specs["weight_zero_point"] = TensorSpec((word_count(rows, format.bits), groups), torch.int32)
        return specs

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        format, codes, scale, zero = unsigned(quantized)
        tensors = {
            "weight_packed": pack_words(codes, format.bits),
            "weight_scale": scale.contiguous(),
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        if not format.symmetric:
            tensors["weight_zero_point"] = pack_words(zero.t(), format.bits).t().contiguous()
        return PackedWeight(self.name, format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        tensors, (rows, columns), bits = packed.tensors, packed.shape, packed.format.bits
        codes = unpack_words(tensors["weight_packed"], columns, bits)
        zero = None
        if "weight_zero_point" in tensors:
            zero = unpack_words(tensors["weight_zero_point"].t(), rows, bits).t().contiguous()
        return signed(packed.format, packed.shape, codes, tensors["weight_scale"], zero)


@dataclass(frozen=True)
class IntQuantized(WholeRows):
    """8-bit symmetric integers, one a byte."""

    name = "int-quantized"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        affine = as_affine(format)
        if affine is None or affine.bits != 8 or not affine.symmetric or affine.group_size:
            return "int-quantized holds symmetric 8-bit integers with one scale per row; use int8"
        return None if len(shape) == 2 else f"int-quantized holds matrices, and this is {list(shape)}"

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        affine = as_affine(format)
        assert affine is not None
        scale = TensorSpec((shape[0], 1), DTYPE_NAMES[affine.scale_type])
        return {"weight": TensorSpec((shape[0], shape[1]), torch.int8), "weight_scale": scale}

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        tensors = {"weight": quantized.codes, "weight_scale": tensor_param(quantized.params, "scale")}
        return PackedWeight(self.name, quantized.format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        params = {"scale": packed.tensors["weight_scale"]}
        return QuantizedTensor(packed.format, packed.shape, packed.tensors["weight"], params)


@dataclass(frozen=True)
class FloatQuantized(WholeRows):
    """FP8 E4M3, one scale per row."""

    name = "float-quantized"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        if str(format) != "fp8":
            return "float-quantized holds fp8; use that"
        return None if len(shape) == 2 else f"float-quantized holds matrices, and this is {list(shape)}"

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        scale = TensorSpec((shape[0], 1), torch.float32)
        return {"weight": TensorSpec((shape[0], shape[1]), torch.float8_e4m3fn), "weight_scale": scale}

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        codes = quantized.codes.contiguous().view(torch.float8_e4m3fn)
        tensors = {"weight": codes, "weight_scale": tensor_param(quantized.params, "scale")}
        return PackedWeight(self.name, quantized.format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        codes, params = packed.tensors["weight"].view(torch.uint8), {"scale": packed.tensors["weight_scale"]}
        return QuantizedTensor(packed.format, packed.shape, codes, params)
