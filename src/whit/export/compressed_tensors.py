"""compressed-tensors checkpoints, for vLLM and transformers: pack-quantized integers, fp8, or int8 for W8A8.

`quantization_config`: `config_groups` give each format its targets; `ignore` names the linears that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from whit.activations import Activations
from whit.export import decoders
from whit.export.base import Outcome, Parameter
from whit.export.linears import LinearsExport
from whit.layouts import Layout
from whit.layouts.affine import as_affine
from whit.layouts.compressed_tensors import FloatQuantized, IntQuantized, PackQuantized
from whit.tensor import Format, TensorSpec

USAGE = """```python
from transformers import AutoModelForCausalLM  # with compressed-tensors installed; or `vllm serve PATH`

model = AutoModelForCausalLM.from_pretrained("PATH")
```"""


class CompressedTensors(LinearsExport):
    """Integers of 2, 4 and 8 bits in packed words, and fp8; several formats in one file where they differ by module."""

    name: ClassVar[str] = "compressed-tensors"
    summary: ClassVar[str] = "compressed-tensors: integers of 2, 4, 8 bits, fp8"
    usage: ClassVar[str] = USAGE
    promised: ClassVar[Activations | None] = None  # where a recipe says nothing of activations
    types: ClassVar[tuple[str, str]] = (
        "fp8",
        "they belong to int8 weights; use --export compressed-tensors-int8",
    )

    def refuses(self, activations: Activations) -> str | None:
        if activations.threshold or activations.exact:
            return "compressed-tensors knows no outlier columns; write a whit or bitsandbytes file"
        return None if activations.type == self.types[0] else self.types[1]

    def inputs(self, parameter: Parameter, scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert parameter.target is not None
        return {f"{module}.{key}": t for module, _ in self.pieces(parameter.target) for key, t in scales.items()}

    def linear_specs(self, parameter: Parameter, shape: tuple[int, int]) -> Mapping[str, TensorSpec]:
        beside = {} if parameter.activations is None else parameter.activations.specs
        return {**super().linear_specs(parameter, shape), **beside}

    def layout(self, format: Format) -> Layout:
        return FloatQuantized() if str(format) == "fp8" else PackQuantized()

    def decode_linear(self, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        scale = tensors["weight_scale"]
        if "weight" in tensors:
            return tensors["weight"].float() * scale.float()
        zero = tensors.get("weight_zero_point")
        return decoders.packed_integers(tensors["weight_packed"], scale, zero, shape, format.bits)

    def config(self, outcome: Outcome) -> dict[str, Any]:
        modules: dict[tuple[Format, Activations | None], list[str]] = {}
        for p in outcome.parameters:
            if p.target is not None and p.format is not None:
                how = p.activations or self.promised
                modules.setdefault((p.format, how), []).extend(module for module, _ in self.pieces(p.target))
        groups = {
            f"group_{number}": self._group(format, how, ["Linear"] if len(modules) == 1 else names)
            for number, ((format, how), names) in enumerate(modules.items())
        }
        kinds = {self.layout(format).name for format, _ in modules}
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
                "quantization_status": "compressed", "config_groups": groups, "ignore": self.kept_linears(outcome),
                "kv_cache_scheme": None, "global_compression_ratio": None,
            }
        }  # fmt: skip

    def _group(self, format: Format, how: Activations | None, targets: list[str]) -> dict[str, Any]:
        affine = as_affine(format)
        return {
            "targets": targets,
            "weights": {
                "num_bits": format.bits, "type": "float" if affine is None else "int",
                "symmetric": affine is None or affine.symmetric,
                "strategy": "group" if format.group_size else "channel", "group_size": format.group_size or None,
                "block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax",
                "observer_kwargs": {},
            },
            "input_activations": None if how is None else _arguments(how), "output_activations": None,
            "format": self.layout(format).name,
        }  # fmt: skip


class CompressedTensorsInt8(CompressedTensors):
    """int-quantized: one byte a weight, and the promise that engines quantize activations per token (W8A8)."""

    name: ClassVar[str] = "compressed-tensors-int8"
    summary: ClassVar[str] = "compressed-tensors W8A8: int8 weights, activations quantized as they run"
    example: ClassVar[str] = "int8"
    promised: ClassVar[Activations | None] = Activations()
    types: ClassVar[tuple[str, str]] = ("int8", "fp8 activations belong to fp8 weights; write compressed-tensors")

    def layout(self, format: Format) -> Layout:
        return IntQuantized()


def _arguments(how: Activations) -> dict[str, Any]:
    """How activations are quantized, in compressed-tensors' words."""
    dynamic = how.kind == "dynamic"
    return {
        "num_bits": 8, "type": "int" if how.type == "int8" else "float", "symmetric": how.symmetric,
        "strategy": how.granularity, "dynamic": dynamic, "group_size": None, "block_structure": None,
        "actorder": None, "observer": None if dynamic else "minmax", "observer_kwargs": {},
    }  # fmt: skip
