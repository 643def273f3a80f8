"""ggml's blocks: what GGUF files hold. One tensor `data`, uint8 (rows, columns / group_size * bytes per block)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.errors import FormatError
from whit.formats.ggml import KINDS, Kind
from whit.layouts.ggml_fields import FIELDS
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec, matrix_shape, tensor_param

CHUNK = 1 << 22  # weights that are packed at a time


@dataclass(frozen=True)
class GgmlBlocks:
    """Layout `ggml`, of the formats that carry ggml's own names."""

    name = "ggml"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        """None where a tensor of that shape in that format can lie so, else what is and what must be, in a clause."""
        if str(format) not in KINDS:
            return f"{format} is not a type of ggml; it must be one of {', '.join(KINDS)}"
        columns = matrix_shape(shape)[1]
        if columns % format.group_size:
            return f"{columns} columns; {format} holds them in whole groups of {format.group_size}"
        return None

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        """Name, shape and dtype of the tensor that `pack` makes."""
        kind = self._kind(format, shape)
        rows, columns = matrix_shape(shape)
        return {"data": TensorSpec((rows, columns // kind.group_size * kind.bytes_per_group), torch.uint8)}

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        """Codes to bytes, losslessly. FormatError where the last group of a row would not be whole."""
        format, kind = quantized.format, self._kind(quantized.format, quantized.shape)
        rows, columns = matrix_shape(quantized.shape)
        spec = self.specs(format, quantized.shape)["data"]
        data = torch.empty(spec.shape, dtype=spec.dtype, device=quantized.codes.device)
        params = {name: tensor_param(quantized.params, name) for name in quantized.params}
        few = max(CHUNK // max(columns, 1), 1)
        for first in range(0, rows, few):  # not several tensors as large as the codes beside them
            some = slice(first, first + few)
            part = {name: value[some] for name, value in params.items()}
            data[some] = _blocks(quantized.codes[some], part, format, kind)
        return PackedWeight(self.name, format, quantized.shape, {"data": data})

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """Bytes to codes: the inverse of `pack`."""
        format, kind = packed.format, self._kind(packed.format, packed.shape)
        rows, columns = matrix_shape(packed.shape)
        data = packed.tensors["data"].reshape(-1, kind.bytes_per_group)
        values: dict[str, Tensor] = {}
        start = 0
        for field in FIELDS[str(format)]:
            for name, part in field.unpack(data[:, start : start + field.size].contiguous()).items():
                values[name] = values[name] | part if name in values else part
            start += field.size
        codes = (values.pop("codes").to(torch.int16) + kind.low).to(format.code_dtype).reshape(rows, columns)
        params = {
            name: values[name].contiguous().view(spec.dtype).reshape(spec.shape)
            for name, spec in format.param_specs(rows, columns).items()
        }
        return QuantizedTensor(format, packed.shape, codes, params)

    def rows(self, packed: PackedWeight, index: Tensor) -> Tensor:
        """Dequantized float32 rows (len(index), columns) of a matrix: an embedding's look-up."""
        data = packed.tensors["data"][index]
        shape = (len(index), packed.shape[-1])
        return self.unpack(PackedWeight(self.name, packed.format, shape, {"data": data})).dequantize()

    def _kind(self, format: Format, shape: tuple[int, ...]) -> Kind:
        if reason := self.refuses(format, shape):
            raise FormatError(f"layout ggml: {reason}; choose another format or layout")
        return KINDS[str(format)]


def _blocks(codes: Tensor, params: Mapping[str, Tensor], format: Format, kind: Kind) -> Tensor:
    """The bytes of some rows, uint8 (rows, bytes of a row)."""
    rows, columns = codes.shape
    blocks = rows * columns // kind.group_size
    values = {"codes": (codes.to(torch.int16) - kind.low).to(torch.uint8).reshape(blocks, -1)}
    for name, spec in format.param_specs(rows, columns).items():
        value = params[name].to(spec.dtype).contiguous()
        values[name] = value.view(torch.uint8).reshape(blocks, -1)
    return torch.cat([field.pack(values) for field in FIELDS[str(format)]], dim=1).reshape(rows, -1)
