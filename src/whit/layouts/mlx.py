"""MLX's affine tensors: `weight` uint32 (N, K b / 32), dense; `scales` and `biases` (N, K / s); w = q scale + bias.

Symmetric codes are stored plus 2^(b-1), with the bias -2^(b-1) scale: exact in any floating-point type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from whit.errors import CheckpointError
from whit.formats.affine import Affine
from whit.formats.numeric import DTYPE_NAMES
from whit.formats.offset import Offset
from whit.layouts.affine import middle, signed, unsigned
from whit.layouts.base import WholeRows
from whit.layouts.words import pack_words, unpack_words, word_count
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec, tensor_param

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def as_mlx(format: Format) -> Affine | Offset | None:
    """The format where MLX can hold it: symmetric, or with an offset."""
    plain = isinstance(format, Affine) and format.symmetric and not format.per_tensor
    fits = (plain or isinstance(format, Offset)) and format.bits in BITS and format.group_size in GROUPS
    return format if fits and isinstance(format, Affine | Offset) else None


@dataclass(frozen=True)
class MLXLayout(WholeRows):
    """Mode affine."""

    name = "mlx"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        if as_mlx(format) is None:
            return (
                "mlx holds integers of 2, 3, 4, 5, 6, 8 bits in groups of 32, 64 or 128, symmetric or with an offset; "
                "use int4-g64 or int4-g64-offset"
            )
        if shape[-1] % format.group_size:
            return f"mlx holds whole groups, and {shape[-1]} columns are not a multiple of {format.group_size}"
        return None if len(shape) == 2 else f"mlx holds matrices, and this is {list(shape)}"

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        fits = as_mlx(format)
        assert fits is not None
        params = TensorSpec((shape[0], shape[1] // fits.group_size), DTYPE_NAMES[fits.scale_type])
        words = TensorSpec((shape[0], word_count(shape[1], fits.bits)), torch.uint32)
        return {"weight": words, "scales": params, "biases": params}

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        scale = tensor_param(quantized.params, "scale")
        if "offset" in quantized.params:
            codes, offset = quantized.codes, tensor_param(quantized.params, "offset")
        else:
            codes = unsigned(quantized)[1]
            offset = -scale * middle(quantized.format.bits)
        words = pack_words(codes, quantized.format.bits).view(torch.uint32)
        tensors = {"weight": words, "scales": scale.contiguous(), "biases": offset.contiguous()}
        return PackedWeight(self.name, quantized.format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        format, tensors = packed.format, packed.tensors
        codes = unpack_words(tensors["weight"].view(torch.int32), packed.shape[1], format.bits)
        scale, offset = tensors["scales"], tensors["biases"]
        if isinstance(format, Offset):
            return QuantizedTensor(format, packed.shape, codes, {"scale": scale, "offset": offset})
        assert isinstance(format, Affine)
        if not torch.equal(offset, -scale * middle(format.bits)):
            raise CheckpointError(f"{format}: biases that are not -{middle(format.bits)} scales; read it as -offset")
        return signed(format, packed.shape, codes, scale, None)
