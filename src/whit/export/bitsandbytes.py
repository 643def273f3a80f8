"""bitsandbytes checkpoints: NF4, FP4, double quantization, LLM.int8. transformers reads them wherever it runs.

The `quant_state` of a 4-bit linear is JSON in a tensor: quant_type, blocksize, dtype, shape, and under double
quantization nested_blocksize, nested_dtype and nested_offset. The length of a tensor is planned before that offset is
known, so this JSON ends in spaces up to a fixed length; bitsandbytes' own has none, and reads both alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from whit.activations import THRESHOLD, Activations
from whit.export import decoders
from whit.export.base import Outcome, Parameter
from whit.export.linears import LinearsExport, one_format
from whit.formats import parse_format
from whit.formats.codebook import Codebook
from whit.formats.numeric import dtype_name
from whit.layouts import Layout
from whit.layouts.bitsandbytes import OFFSET, Bnb4Bit, Bnb8Bit, table_name
from whit.model.targets import Target
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec

LONGEST = 24  # characters of a float64 in JSON
USAGE = """```python
from transformers import AutoModelForCausalLM  # with bitsandbytes installed

model = AutoModelForCausalLM.from_pretrained("PATH")
```"""


class BitsAndBytes(LinearsExport):
    """One format: a 4-bit table or int8-absmax."""

    name: ClassVar[str] = "bitsandbytes"
    summary: ClassVar[str] = "bitsandbytes: nf4, fp4, their -dq, int8"
    example: ClassVar[str] = "nf4"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    usage: ClassVar[str] = USAGE

    @classmethod
    def fitted(cls, format: Format) -> Format:
        return parse_format("int8-absmax") if str(format) == "int8-channel" else format

    def refuses(self, activations: Activations) -> str | None:
        plain = activations.kind == "dynamic" and activations.type == "int8" and activations.symmetric
        if plain and activations.granularity == "token" and not activations.exact:
            return None
        return "bitsandbytes quantizes per token, with or without outlier columns; use int8 or int8-outliers"

    def layout(self, format: Format) -> Layout:
        return Bnb8Bit() if str(format).startswith("int8") else Bnb4Bit()

    def conflicts(self, formats: Mapping[Target, Format]) -> list[str]:
        return one_format("bitsandbytes", formats.values())

    def linear_specs(self, parameter: Parameter, shape: tuple[int, int]) -> Mapping[str, TensorSpec]:
        specs = dict(super().linear_specs(parameter, shape))
        if (key := _state_key(parameter.format)) is not None:
            specs[key] = TensorSpec((len(_state(parameter, shape, 0.0)),), torch.uint8)
        return specs

    def linear_tensors(self, parameter: Parameter, quantized: QuantizedTensor) -> Mapping[str, Tensor]:
        tensors = dict(super().linear_tensors(parameter, quantized))
        offset = tensors.pop(OFFSET, None)
        if (key := _state_key(parameter.format)) is not None:
            rows, columns = quantized.shape
            said = _state(parameter, (rows, columns), 0.0 if offset is None else float(offset))
            tensors[key] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        return tensors

    def linear_restored(self, parameter: Parameter, packed: PackedWeight) -> QuantizedTensor:
        tensors = dict(packed.tensors)
        if (key := _state_key(parameter.format)) is not None:
            said = json.loads(bytes(tensors.pop(key).tolist()))
            tensors[OFFSET] = torch.tensor(said.get("nested_offset", 0.0), dtype=torch.float32)
        return super().linear_restored(parameter, PackedWeight(packed.layout, packed.format, packed.shape, tensors))

    def decode_linear(self, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        if "SCB" in tensors:
            return tensors["weight"].float() * (tensors["SCB"] * (1 / 127)).unsqueeze(1)
        absmax = tensors["weight.absmax"]
        if "weight.nested_absmax" in tensors:
            (said,) = (json.loads(bytes(t.tolist())) for key, t in tensors.items() if "quant_state" in key)
            scale = tensors["weight.nested_absmax"].repeat_interleave(256)[: absmax.numel()]
            absmax = tensors["weight.nested_quant_map"][absmax.long()] * scale + said["nested_offset"]
        return decoders.bitsandbytes_4bit(tensors["weight"], absmax, tensors["weight.quant_map"], shape)

    def config(self, outcome: Outcome) -> dict[str, Any]:
        format = next(iter(outcome.formats.values()))
        kind = table_name(format)
        threshold = next((how.threshold for how in outcome.inputs.values()), THRESHOLD)  # it always has one
        dtype = next(p.spec.dtype for p in outcome.parameters if p.format is not None)
        return {
            "quantization_config": {
                "quant_method": "bitsandbytes", "_load_in_4bit": kind is not None, "_load_in_8bit": kind is None,
                "load_in_4bit": kind is not None, "load_in_8bit": kind is None,
                "bnb_4bit_quant_type": kind or "fp4",
                "bnb_4bit_use_double_quant": isinstance(format, Codebook) and format.double_quant,
                "bnb_4bit_compute_dtype": dtype_name(dtype), "bnb_4bit_quant_storage": "uint8",
                "llm_int8_threshold": threshold, "llm_int8_skip_modules": self.kept_linears(outcome),
                "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
            }
        }  # fmt: skip


def _state_key(format: Format | None) -> str | None:
    table = None if format is None else table_name(format)
    return None if table is None else f"weight.quant_state.bitsandbytes__{table}"


def _state(parameter: Parameter, shape: tuple[int, int], offset: float) -> bytes:
    format = parameter.format
    assert isinstance(format, Codebook)
    said: dict[str, Any] = {
        "quant_type": table_name(format), "blocksize": format.group_size, "dtype": dtype_name(parameter.spec.dtype),
        "shape": shape,
    }  # fmt: skip
    if not format.double_quant:
        return json.dumps(said).encode()
    nested = {"nested_blocksize": 256, "nested_dtype": "float32"}
    longest = len(json.dumps({**said, **nested, "nested_offset": 0})) - 1 + LONGEST
    return json.dumps({**said, **nested, "nested_offset": offset}).ljust(longest).encode()
