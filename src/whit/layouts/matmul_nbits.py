"""The tensors of ONNX Runtime's com.microsoft.MatMulNBits. N out_features, K in_features, s block_size, b bits.

`weight_Qb` uint8 (N, K / s, s b / 8): codes along K, least significant bits first. `weight_scales` (N, K / s), of the
type that the operator computes in. `weight_zero_points` uint8 (N, ceil(K b / (8 s))), packed like the codes; without it
the zero point is 2^(b-1). w[n, k] = scale (q - z). (onnxruntime's docs/ContribOperators.md; names as
its matmul_nbits_quantizer gives them)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from whit.formats.affine import Affine
from whit.formats.numeric import DTYPE_NAMES
from whit.layouts.affine import as_affine, refuse_affine, refuse_ragged, signed, unsigned
from whit.layouts.base import WholeRows
from whit.layouts.stream import pack_stream, unpack_stream
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec

BITS = (2, 4, 8)
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class MatMulNBits(WholeRows):
    """Symmetric, or with integer zero points."""

    name = "matmulnbits"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        if reason := refuse_affine(format, BITS, ("f32", "f16", "bf16")):
            return f"{self.name} {reason}"
        size = format.group_size
        if size < SMALLEST_BLOCK or size & (size - 1):
            return (
                f"{self.name} holds groups of 16, 32, 64 and further powers of two, and not "
                f"{f'of {size}' if size else 'whole rows'}; use -g32 or -g128"
            )
        if reason := refuse_ragged(format, shape):
            return f"{self.name} {reason}"
        return None if len(shape) == 2 else f"{self.name} holds matrices, and this is {list(shape)}"

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        affine = as_affine(format)
        assert affine is not None
        rows, blocks = shape[0], shape[1] // affine.group_size
        specs = {
            f"weight_Q{affine.bits}": TensorSpec((rows, blocks, affine.group_size * affine.bits // 8), torch.uint8),
            "weight_scales": TensorSpec((rows, blocks), DTYPE_NAMES[affine.scale_type]),
        }
        if not affine.symmetric:
            specs["weight_zero_points"] = TensorSpec((rows, -(-blocks * affine.bits // 8)), torch.uint8)
        return specs

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        format, codes, scale, zero = unsigned(quantized)
        blocks = pack_stream(codes, format.bits, 0).reshape(*scale.shape, -1)
        tensors = {f"weight_Q{format.bits}": blocks, "weight_scales": scale.contiguous()}
        if not format.symmetric:
            tensors["weight_zero_points"] = pack_stream(zero, format.bits, 0)
        return PackedWeight(self.name, quantized.format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        format, tensors = packed.format, packed.tensors
        assert isinstance(format, Affine)
        rows, columns = packed.shape
        codes = unpack_stream(tensors[f"weight_Q{format.bits}"].reshape(rows, -1), columns, format.bits, 0)
        scale, zero = tensors["weight_scales"], tensors.get("weight_zero_points")
        if zero is not None:
            zero = unpack_stream(zero, scale.shape[1], format.bits, 0).contiguous()
        return signed(format, packed.shape, codes.contiguous(), scale, zero)
