"""The tensors of bitsandbytes' linears; n = rows x columns, s columns share an absmax.

4 bits: `weight` uint8 (n / 2, 1), element 2 i in the HIGH nibble of byte i; `weight.absmax` float32 (n / s,);
`weight.quant_map` float32 (16,), the levels. With double quantization absmax is uint8, and there are
`weight.nested_absmax` float32 (ceil(n / s / 256),) and `weight.nested_quant_map` float32 (256,). The mean that was
subtracted, and shape and type, stand in a tensor of JSON that the exporter adds: `weight.quant_state...`.
8 bits: `weight` int8 (N, K), `SCB` float32 (N,), `weight_format` uint8 () = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.formats.codebook import FP4, NF4, Codebook
from whit.layouts.base import WholeRows
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec, matrix_shape, tensor_param

TABLES = {"nf4": NF4, "fp4": FP4}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
OFFSET = "nested_offset"  # not a tensor of the file


def table_name(format: Format) -> str | None:
    """nf4 or fp4; None for other formats."""
    if not isinstance(format, Codebook) or format.centered:
        return None
    return next((name for name, levels in TABLES.items() if levels == format.levels), None)


@dataclass(frozen=True)
class Bnb4Bit(WholeRows):
    """NF4 and FP4. Packing adds `nested_offset`, which the exporter writes in its own way."""

    name = "bitsandbytes-4bit"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        if table_name(format) is None or format.group_size not in BLOCKS:
            sizes = ", ".join(map(str, BLOCKS))
            return f"bitsandbytes holds nf4 and fp4 in groups of {sizes}, with or without -dq, and int8; use nf4"
        if len(shape) != 2 or shape[1] % format.group_size:
            return (
                f"bitsandbytes groups run on from row to row, which {list(shape)} is not made for; use a smaller group"
            )
        return None

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        assert isinstance(format, Codebook)
        count = shape[0] * shape[1]
        groups = count // format.group_size
        specs = {
            "weight": TensorSpec((count // 2, 1), torch.uint8),
            "weight.absmax": TensorSpec((groups,), torch.uint8 if format.double_quant else torch.float32),
            "weight.quant_map": TensorSpec((16,), torch.float32),
        }
        if format.double_quant:
            specs["weight.nested_absmax"] = TensorSpec((-(-groups // 256),), torch.float32)
            specs["weight.nested_quant_map"] = TensorSpec((256,), torch.float32)
        return specs

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        format = quantized.format
        assert isinstance(format, Codebook)
        flat = quantized.codes.reshape(-1, 2)
        tensors = {"weight": ((flat[:, :1] << 4) | flat[:, 1:]).contiguous()}
        absmax = quantized.params["absmax"]
        if isinstance(absmax, QuantizedTensor):
            inner = absmax.format
            assert isinstance(inner, Codebook)
            tensors["weight.absmax"] = absmax.codes.reshape(-1)
            tensors["weight.nested_absmax"] = tensor_param(absmax.params, "absmax").reshape(-1)
            tensors["weight.nested_quant_map"] = torch.tensor(inner.levels, dtype=torch.float32)
            tensors[OFFSET] = tensor_param(absmax.params, "offset").reshape(())
        else:
            tensors["weight.absmax"] = absmax.reshape(-1)
        tensors["weight.quant_map"] = torch.tensor(format.levels, dtype=torch.float32)
        return PackedWeight(self.name, format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        format, tensors = packed.format, packed.tensors
        assert isinstance(format, Codebook)
        rows, columns = matrix_shape(packed.shape)
        flat = tensors["weight"].reshape(-1)
        codes = torch.stack([flat >> 4, flat & 15], dim=1).reshape(rows, columns)
        absmax: Tensor | QuantizedTensor = tensors["weight.absmax"].reshape(rows, -1)
        if format.double_quant:
            inner = {
                "absmax": tensors["weight.nested_absmax"].reshape(1, -1),
                "offset": tensors[OFFSET].to(torch.float32).reshape(1, 1),
            }
            row = tensors["weight.absmax"].reshape(1, -1)
            absmax = QuantizedTensor(format.nested, tuple(row.shape), row, inner)
        return QuantizedTensor(format, packed.shape, codes, {"absmax": absmax})


@dataclass(frozen=True)
class Bnb8Bit(WholeRows):
    """LLM.int8's rows."""

    name = "bitsandbytes-8bit"

    def refuses(self, format: Format, shape: tuple[int, ...]) -> str | None:
        if str(format) != "int8-absmax":
            return "bitsandbytes divides int8 rows by 127; use int8-absmax"
        return None if len(shape) == 2 else f"bitsandbytes holds matrices, and this is {list(shape)}"

    def specs(self, format: Format, shape: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        return {
            "weight": TensorSpec((shape[0], shape[1]), torch.int8),
            "SCB": TensorSpec((shape[0],), torch.float32),
            "weight_format": TensorSpec((), torch.uint8),
        }

    def pack(self, quantized: QuantizedTensor) -> PackedWeight:
        tensors = {
            "weight": quantized.codes,
            "SCB": tensor_param(quantized.params, "absmax").reshape(-1),
            "weight_format": torch.zeros((), dtype=torch.uint8),
        }
        return PackedWeight(self.name, quantized.format, quantized.shape, tensors)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        params = {"absmax": packed.tensors["SCB"].reshape(-1, 1)}
        return QuantizedTensor(packed.format, packed.shape, packed.tensors["weight"], params)
