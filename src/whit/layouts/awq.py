"""AWQ's tensors in the `gemm` version. K in_features, N out_features, G groups; 4 bits.

`qweight` int32 (K, N / 8) and `qzeros` int32 (G, N / 8): nibble i of a word holds column (0,2,4,6,1,3,5,7)[i] of
eight. `scales` float16 (G, N). Zero points are the true ones: w[n, k] = scales[g, n] (q[k, n] - z[g, n]).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.formats.grouping import group_count
from whit.layouts.affine import refuse_affine, refuse_ragged, signed, unsigned
from whit.layouts.base import WholeRows
from whit.layouts.words import AWQ_INVERSE, AWQ_ORDER, pack_words, reorder, unpack_words
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec


@dataclass(frozen=True)
class AWQLayout(WholeRows):
    """Also for symmetric codes, whose zero points are all 8."""

    name = "awq"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        if reason := refuse_affine(format, (4,), ("f16",)) or refuse_ragged(format, shape):
            return f"awq {reason}"
        return (
            None
            if len(shape) == 2 and shape[0] % 8 == 0
            else f"awq packs 8 rows a word, which {list(shape)} does not fill"
        )

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        rows, columns = shape
        groups = group_count(columns, format.group_size)
        return {
            "qweight": TensorSpec((columns, rows // 8), torch.int32),
            "qzeros": TensorSpec((groups, rows // 8), torch.int32),
            "scales": TensorSpec((groups, rows), torch.float16),
        }

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        format, codes, scale, zero = unsigned(quantized)
        tensors = {"qweight": _pack(codes), "qzeros": _pack(zero), "scales": scale.t().contiguous()}
        return PackedWeight(self.name, format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        codes, zero = (_unpack(packed.tensors[key]) for key in ("qweight", "qzeros"))
        scale = packed.tensors["scales"].t().contiguous()
        return signed(packed.format, packed.shape, codes, scale, zero)


def _pack(values: Tensor) -> Tensor:
    return pack_words(reorder(values.t(), AWQ_ORDER), 4)


def _unpack(words: Tensor) -> Tensor:
    return reorder(unpack_words(words, 8 * words.shape[1], 4), AWQ_INVERSE).t().contiguous()
