"""HQQ's tensors, axis 1: codes seen as R rows of one group each, packed over slices of these rows.

`W_q`: 8 bits uint8 (R, s); 4, 2, 1 bits uint8 (R / 2, R / 4, R / 8; s), the first slice in the highest bits; 3 bits
int32 (ceil(R / 10), s), ten slices from bit 27 down, the last rows zeros. `scale`, `zero` (R, 1);
w = (q - zero) scale. Ten more tensors hold what a configuration would: numbers as int32, truths as uint8, words as
the codes of their letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.errors import CheckpointError
from whit.formats.affine import Affine
from whit.formats.grouping import group_count
from whit.layouts.affine import middle
from whit.layouts.base import WholeRows
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec, tensor_param

SLICES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
NAMES = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
TRUTHS = {
    "view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "encoded_state_dict": 1,
    "stores_quant_config": 1, "channel_wise": 1, "optimize": 0, "round_zero": 0,
}  # fmt: skip


@dataclass(frozen=True)
class HQQLayout(WholeRows):
    """Affine integers with zero points of any kind; scale and zero point in float16."""

    name = "hqq"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        fits = isinstance(format, Affine) and not format.per_tensor and format.bits in SLICES
        if not fits or not isinstance(format, Affine) or format.scale_type != "f16":
            return "hqq holds affine integers of 1, 2, 3, 4, 8 bits with float16 scales; use int4-g64-asym-fz-f16"
        if format.group_size and shape[-1] % format.group_size:
            return f"hqq holds whole groups, and {shape[-1]} columns are not a multiple of {format.group_size}"
        rows = shape[0] * group_count(shape[1], format.group_size)
        if len(shape) != 2 or (format.bits != 3 and rows % SLICES[format.bits]):
            return f"hqq packs {SLICES[format.bits]} groups together, of which {list(shape)} has {rows}"
        return None

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        rows, columns = shape
        count = rows * group_count(columns, format.group_size)
        size = rows * columns // count
        lines = -(-count // SLICES[format.bits])
        codes = TensorSpec((lines, size), torch.int32 if format.bits == 3 else torch.uint8)
        floats = TensorSpec((count, 1), torch.float16)
        said = _said(format.bits, size, (rows, columns))
        more = {key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in said.items()}
        return {"W_q": codes, "scale": floats, "zero": floats, **more}

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        format = quantized.format
        assert isinstance(format, Affine)
        rows, columns = quantized.shape
        scale = tensor_param(quantized.params, "scale").reshape(-1, 1)
        size = columns // (scale.shape[0] // rows)
        codes = (quantized.codes.to(torch.int16) - format.code_min).reshape(-1, size)
        if format.symmetric:
            zero = torch.full_like(scale, 0.5 if format.bits == 1 else middle(format.bits))
        else:
            zero = tensor_param(quantized.params, "zero_point").reshape(-1, 1).to(torch.float16)
        tensors = {"W_q": pack_slices(codes, format.bits), "scale": scale.contiguous(), "zero": zero.contiguous()}
        tensors |= _said(format.bits, size, (rows, columns))
        return PackedWeight(self.name, format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        format, (rows, columns), tensors = packed.format, packed.shape, packed.tensors
        assert isinstance(format, Affine)
        scale, zero = tensors["scale"].reshape(rows, -1), tensors["zero"].reshape(rows, -1)
        codes = unpack_slices(tensors["W_q"], format.bits, scale.numel()).reshape(rows, columns)
        if not format.symmetric:
            kept = zero if format.float_zero else zero.to(torch.uint8)
            return QuantizedTensor(format, packed.shape, codes, {"scale": scale, "zero_point": kept})
        if not bool((zero == (0.5 if format.bits == 1 else middle(format.bits))).all()):
            raise CheckpointError(f"{format}: zero points beside the middle; a symmetric format has none")
        shifted = (codes.to(torch.int16) + format.code_min).to(format.code_dtype)
        return QuantizedTensor(format, packed.shape, shifted, {"scale": scale})


def pack_slices(codes: Tensor, bits: int) -> Tensor:
    """Unsigned integers (R, s) to (ceil(R / slices), s): slice i of the rows in the i-th highest bits."""
    slices = SLICES[bits]
    wide = torch.nn.functional.pad(codes.to(torch.int32), (0, 0, 0, -len(codes) % slices))
    parts = wide.reshape(slices, -1, codes.shape[1])
    words = torch.zeros_like(parts[0])
    for i in range(slices):
        words |= parts[i] << (bits * (slices - 1 - i))
    return words if bits == 3 else words.to(torch.uint8)


def unpack_slices(words: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_slices`: uint8 (rows, s)."""
    slices, mask = SLICES[bits], (1 << bits) - 1
    parts = [(words >> (bits * (slices - 1 - i))) & mask for i in range(slices)]
    return torch.cat(parts)[:rows].to(torch.uint8)


def _said(bits: int, size: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors that stand for a configuration."""

    def letters(word: str) -> Tensor:
        return torch.tensor([ord(letter) for letter in word], dtype=torch.uint8)

    numbers = {"nbits": bits, "group_size": size, "axis": 1}
    return {
        **{key: torch.tensor(value, dtype=torch.int32) for key, value in numbers.items()},
        "shape": torch.tensor(shape, dtype=torch.int64),
        "packing": letters(NAMES[bits]),
        "unpack_view_dtype": letters("torch.int32" if bits == 3 else "torch.uint8"),
        "compute_dtype": letters("torch.float16"),
        **{key: torch.tensor(value, dtype=torch.uint8) for key, value in TRUTHS.items()},
    }
