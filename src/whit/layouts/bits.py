"""The dense k-bit stream: what whit's own files hold.

Each row of codes is one stream of `bits`-bit unsigned integers (code - code_min), least significant bit first,
padded with zeros to a whole byte: uint8 (rows, ceil(columns * bits / 8)). Integer params are packed alike; float
params lie as they are; a param that is itself quantized contributes its own tensors under `<param>_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.tensor import (
    Format,
    PackedWeight,
    Params,
    ParamSpec,
    QuantizedTensor,
    TensorSpec,
    matrix_shape,
)


@dataclass(frozen=True)
class Bits:
    """Layout `bits`: `codes` and one tensor per param."""

    name = "bits"

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes of the tensors that `pack` makes, in their order."""
        rows, columns = matrix_shape(shape)
        specs = {"codes": _stream_spec(rows, columns, format.bits)}
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
        tensors = {"codes": pack_stream(quantized.codes, format.bits, format.code_min)}
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
        columns = matrix_shape(packed.shape)[1]
        codes = unpack_stream(packed.tensors["codes"], columns, format.bits, format.code_min)
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
        format = packed.format
        total, columns = matrix_shape(packed.shape)
        params: dict[str, Tensor | QuantizedTensor] = {}
        for name, value in self.params(packed).items():
            if isinstance(value, QuantizedTensor):
                value = value.dequantize().reshape(total, -1)
            params[name] = value[index] if value.shape[0] == total else value
        codes = unpack_stream(packed.tensors["codes"][index], columns, format.bits, format.code_min)
        return format.decode(codes.to(format.code_dtype), params)


def _is_packed(param: ParamSpec) -> bool:
    return not param.dtype.is_floating_point


def _stream_spec(rows: int, columns: int, bits: int) -> TensorSpec:
    if bits == 16:
        return TensorSpec((rows, columns), torch.int16)
    return TensorSpec((rows, -(-columns * bits // 8)), torch.uint8)


def pack_stream(codes: Tensor, bits: int, code_min: int) -> Tensor:
    """Integers (rows, columns) in [code_min, code_min + 2^bits) to uint8 (rows, ceil(columns * bits / 8))."""
    if bits == 16:
        return codes.contiguous()
    rows, columns = codes.shape
    unsigned = codes.view(torch.uint8) - torch.tensor(code_min, dtype=torch.int16).to(torch.uint8)  # wraps
    if bits == 8:
        return unsigned
    if missing := -columns % 8:
        unsigned = torch.nn.functional.pad(unsigned, (0, missing))
    octets = unsigned.reshape(rows, unsigned.shape[1] // 8, 8)
    # Eight codes fill `bits` bytes; byte b gathers every code that overlaps bits [8b, 8b + 8).
    out = torch.zeros(rows, octets.shape[1], bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        out[..., first] |= octets[..., i] << shift
        if shift + bits > 8:
            out[..., first + 1] |= octets[..., i] >> (8 - shift)
    return out.reshape(rows, out.shape[1] * bits)[:, : -(-columns * bits // 8)].contiguous()


def unpack_stream(stream: Tensor, columns: int, bits: int, code_min: int) -> Tensor:
    """The inverse of `pack_stream`: integers of the stream's width (uint8, or int8 where code_min < 0)."""
    if bits == 16:
        return stream
    rows = stream.shape[0]
    if bits < 8:
        if missing := -stream.shape[1] % bits:
            stream = torch.nn.functional.pad(stream, (0, missing))
        chunks = stream.reshape(rows, stream.shape[1] // bits, bits)
        octets = torch.empty(rows, chunks.shape[1], 8, dtype=torch.uint8, device=stream.device)
        for i in range(8):
            first, shift = divmod(i * bits, 8)
            code = chunks[..., first] >> shift
            if shift + bits > 8:
                code = code | (chunks[..., first + 1] << (8 - shift))
            octets[..., i] = code & ((1 << bits) - 1)
        stream = octets.reshape(rows, octets.shape[1] * 8)[:, :columns]
    if not code_min:
        return stream
    return (stream + torch.tensor(code_min, dtype=torch.int16).to(torch.uint8).to(stream.device)).view(torch.int8)
