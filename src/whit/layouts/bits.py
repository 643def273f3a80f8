"""The dense k-bit stream: what whit's own files hold.

Each row of codes is one stream of `bits`-bit unsigned integers (code - code_min), least significant bit first,
padded with zeros to a whole byte: uint8 (rows, ceil(columns * bits / 8)). Codes of a format with a `radix` are the
digits of bytes (`layouts/digits`): uint8 (rows, ceil(columns / 5)) for the three of a ternary one. Integer params are
packed in bits; float params lie as they are; a param that is itself quantized contributes its own tensors under
`<param>_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.capabilities import codes_shape, radix
from whit.formats.bands import banded, places
from whit.layouts.digits import digits_per_byte, pack_digits, unpack_digits
from whit.layouts.stream import pack_stream, unpack_stream
from whit.tensor import Format, PackedWeight, Params, ParamSpec, QuantizedTensor, TensorSpec, matrix_shape


@dataclass(frozen=True)
class Bits:
    """Layout `bits`: `codes` and one tensor per param."""

    name = "bits"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        """Nothing: every format and shape lies so."""
        return None

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes of the tensors that `pack` makes, in their order."""
        rows, columns = matrix_shape(shape)
        specs = {"codes": self._codes_spec(*codes_shape(format, rows, columns), format)}
        for name, param in format.param_specs(rows, columns).items():
            if param.format is not None:
                inner = self.specs(param.format, param.shape)
                specs |= {f"{name}_{key}": spec for key, spec in inner.items()}
            elif _is_packed(param):
                specs[name] = _stream_spec(*param.shape, param.bits)
            else:
                specs[name] = TensorSpec(param.shape, param.dtype)
        return specs

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        """Codes to bytes, losslessly."""
        format = quantized.format
        rows, columns = matrix_shape(quantized.shape)
        tensors = {"codes": self.pack_codes(quantized.codes, format)}
        for name, param in format.param_specs(rows, columns).items():
            value = quantized.params[name]
            if isinstance(value, QuantizedTensor):
                tensors |= {f"{name}_{key}": t for key, t in self.pack(value).tensors.items()}
            else:
                tensors[name] = pack_stream(value, param.bits, 0) if _is_packed(param) else value.contiguous()
        return PackedWeight(self.name, format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """Bytes to codes: the inverse of `pack`."""
        format = packed.format
        columns = codes_shape(format, *matrix_shape(packed.shape))[1]
        codes = self.unpack_codes(packed.tensors["codes"], columns, format)
        return QuantizedTensor(format, packed.shape, codes.to(format.code_dtype), self.params(packed))

    def params(self, packed: PackedWeight) -> Params:
        """The params alone, unpacked."""
        params: dict[str, Tensor | QuantizedTensor] = {}
        for name, param in packed.format.param_specs(*matrix_shape(packed.shape)).items():
            if param.format is not None:
                prefix = f"{name}_"
                inner = {k.removeprefix(prefix): t for k, t in packed.tensors.items() if k.startswith(prefix)}
                params[name] = self.unpack(PackedWeight(self.name, param.format, param.shape, inner))
            elif _is_packed(param):
                params[name] = unpack_stream(packed.tensors[name], param.shape[1], param.bits, 0)
            else:
                params[name] = packed.tensors[name]
        return params

    def rows(self, packed: PackedWeight, index: Tensor) -> Tensor:
        """Dequantized float32 rows (len(index), columns) of a matrix: an embedding's look-up."""
        if (parts := banded(packed)) is not None:
            return self._banded_rows(packed, parts, index)
        format = packed.format
        total, columns = matrix_shape(packed.shape)
        params: dict[str, Tensor | QuantizedTensor] = {}
        for name, value in self.params(packed).items():
            if isinstance(value, QuantizedTensor):
                value = value.dequantize().reshape(total, -1)
            params[name] = value[index] if value.shape[0] == total else value
        codes = self.unpack_codes(packed.tensors["codes"][index], columns, format)
        return format.decode(codes.to(format.code_dtype), params)

    def _banded_rows(self, packed: PackedWeight, parts: tuple[PackedWeight, ...], index: Tensor) -> Tensor:
        """Each row from every band, and of these the one in which it lies: no shape depends on the index."""
        first = 0
        place = places(self.unpack_codes(packed.tensors["codes"], packed.shape[0], packed.format))[index]
        found = torch.zeros(len(index), packed.shape[1], device=index.device)
        for part in parts:
            count = part.shape[0]
            inside = (place >= first) & (place < first + count)
            rows = self.rows(part, (place - first).clamp(0, count - 1))
            found = torch.where(inside[:, None], rows, found)
            first += count
        return found

    def pack_codes(self, codes: Tensor, format: Format) -> Tensor:
        """Integers (rows, columns) to bytes."""
        if (base := radix(format)) is None:
            return pack_stream(codes, format.bits, format.code_min)
        return pack_digits(codes, base, format.code_min)

    def unpack_codes(self, stored: Tensor, columns: int, format: Format) -> Tensor:
        """The inverse, of any rows."""
        if (base := radix(format)) is None:
            return unpack_stream(stored, columns, format.bits, format.code_min)
        return unpack_digits(stored, columns, base, format.code_min)

    def _codes_spec(self, rows: int, columns: int, format: Format) -> TensorSpec:
        if (base := radix(format)) is None:
            return _stream_spec(rows, columns, format.bits)
        return TensorSpec((rows, -(-columns // digits_per_byte(base))), torch.uint8)


@dataclass(frozen=True)
class WholeBits(Bits):
    """Layout `whole-bits`: for codes that are digits in `bits`, and here lie as signed integers of so many bits would.

    No file is written so: a module holds it while a kernel multiplies by it.
    """

    name = "whole-bits"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        """Formats whose codes lie in whole bits anyway."""
        return None if radix(format) else f"{format}: codes are not digits"

    def pack_codes(self, codes: Tensor, format: Format) -> Tensor:
        return pack_stream(codes.to(torch.int8), format.bits, -(1 << format.bits - 1))

    def unpack_codes(self, stored: Tensor, columns: int, format: Format) -> Tensor:
        return unpack_stream(stored, columns, format.bits, -(1 << format.bits - 1))

    def _codes_spec(self, rows: int, columns: int, format: Format) -> TensorSpec:
        return _stream_spec(rows, columns, format.bits)


def _is_packed(param: ParamSpec) -> bool:
    return not param.dtype.is_floating_point


def _stream_spec(rows: int, columns: int, bits: int) -> TensorSpec:
    if bits == 16:
        return TensorSpec((rows, columns), torch.int16)
    return TensorSpec((rows, -(-columns * bits // 8)), torch.uint8)
