"""GPTQ's tensors, as AutoGPTQ and GPTQModel store them. K in_features, N out_features, G groups, b bits.

`qweight` int32 (K b / 32, N): codes packed along K. `qzeros` int32 (G, N b / 32): zero points packed along N.
`scales` float16 (G, N). `g_idx` int32 (K,): the group of each column.
w[n, k] = scales[g, n] (q[k, n] - z[g, n]),  g = g_idx[k].

Version 1 stores z - 1 in each field, so that a zero point of 0 cannot be said; version 2 stores z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.errors import FormatError
from whit.formats.grouping import group_count
from whit.layouts.affine import integers_of, refuse_affine, refuse_ragged, signed, unsigned
from whit.layouts.base import WholeRows
from whit.layouts.words import pack_words, unpack_words, word_count
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GPTQLayout(WholeRows):
    """`version` 1 or 2."""

    version: int = 1

    @property
    def name(self) -> str:
        return "gptq" if self.version == 1 else "gptq-v2"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        reason = refuse_affine(integers_of(format) or format, BITS, ("f16",)) or refuse_ragged(format, shape)
        if reason:
            return f"{self.name} {reason}"
        uneven = [n for n in shape if n * format.bits % 32]
        if len(shape) != 2 or uneven:
            return f"{self.name} fills words of 32 bits both ways, which {list(shape)} does not do"
        return None

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        rows, columns = shape
        integers = integers_of(format)
        assert integers is not None
        groups = group_count(columns, integers.group_size)
        return {
            "qweight": TensorSpec((word_count(columns, format.bits), rows), torch.int32),
            "qzeros": TensorSpec((groups, word_count(rows, format.bits)), torch.int32),
            "scales": TensorSpec((groups, rows), torch.float16),
            "g_idx": TensorSpec((columns,), torch.int32),
        }

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        format, codes, scale, zero = unsigned(quantized)
        if self.version == 1:
            if not bool(zero.all()):
                raise FormatError(
                    "gptq: a zero point is 0, which version 1 of the format cannot say; it must be 1 or more; "
                    "use --export gptq-v2"
                )
            zero = zero - 1
        group = quantized.params.get("group")
        index = plain_groups(codes.shape[1], format.group_size)
        tensors = {
            "qweight": pack_words(codes, format.bits).t().contiguous(),
            "qzeros": pack_words(zero.t(), format.bits),
            "scales": scale.t().contiguous(),
            "g_idx": group.reshape(-1).to(torch.int32) if isinstance(group, Tensor) else index.to(codes.device),
        }
        return PackedWeight(self.name, quantized.format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        format, (rows, columns) = packed.format, packed.shape
        tensors = packed.tensors
        codes = unpack_words(tensors["qweight"].t(), columns, format.bits)
        zero = unpack_words(tensors["qzeros"], rows, format.bits)
        if self.version == 1:
            zero = (zero + 1) & ((1 << format.bits) - 1)
        scale = tensors["scales"].t().contiguous()
        return signed(format, packed.shape, codes, scale, zero.t().contiguous(), tensors.get("g_idx"))


def plain_groups(columns: int, group_size: int) -> Tensor:
    """The group of each column where groups are runs of neighbours."""
    index = torch.arange(columns, dtype=torch.int32)
    return index // group_size if group_size else torch.zeros_like(index)
