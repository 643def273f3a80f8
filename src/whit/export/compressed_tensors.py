"""compressed-tensors checkpoints, for vLLM and transformers: pack-quantized integers, fp8, or int8 for W8A8.

`quantization_config`: `config_groups` give each format its targets; `ignore` names the linears that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from whit.export import decoders
from whit.export.base import Outcome
from whit.export.linears import LinearsExport
from whit.layouts import Layout
from whit.layouts.affine import as_affine
from whit.layouts.compressed_tensors import FloatQuantized, IntQuantized, PackQuantized
from whit.tensor import Format

USAGE = """```python
from transformers import AutoModelForCausalLM  # with compressed-tensors installed; or `vllm serve PATH`

model = AutoModelForCausalLM.from_pretrained("PATH")
```"""


class CompressedTensors(LinearsExport):
    """Integers of 2, 4 and 8 bits in packed words, and fp8; several formats in one file where they differ by module."""

    name: ClassVar[str] = "compressed-tensors"
    summary: ClassVar[str] = "compressed-tensors: integers of 2, 4, 8 bits, fp8"
    usage: ClassVar[str] = USAGE
    activations: ClassVar[dict[str, Any] | None] = None

    def layout(self, format: Format) -> Layout:
        return FloatQuantized() if str(format) == "fp8" else PackQuantized()

    def decode_linear(self, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        scale = tensors["weight_scale"]
        if "weight" in tensors:
            return tensors["weight"].float() * scale.float()
        zero = tensors.get("weight_zero_point")
        return decoders.packed_integers(tensors["weight_packed"], scale, zero, shape, format.bits)

    def config(self, outcome: Outcome) -> dict[str, Any]:
        modules: dict[Format, list[str]] = {}
        for p in outcome.parameters:
            if p.target is not None and p.format is not None:
                modules.setdefault(p.format, []).extend(module for module, _ in self.pieces(p.target))
        groups = {
            f"group_{number}": self._group(format, ["Linear"] if len(modules) == 1 else names)
            for number, (format, names) in enumerate(modules.items())
        }
        kinds = {self.layout(format).name for format in modules}
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
                "quantization_status": "compressed", "config_groups": groups, "ignore": self.kept_linears(outcome),
                "kv_cache_scheme": None, "global_compression_ratio": None,
            }
        }  # fmt: skip

    def _group(self, format: Format, targets: list[str]) -> dict[str, Any]:
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
            "input_activations": self.activations, "output_activations": None, "format": self.layout(format).name,
        }  # fmt: skip


class CompressedTensorsInt8(CompressedTensors):
    """int-quantized: one byte a weight, and the promise that engines quantize activations per token (W8A8)."""

    name: ClassVar[str] = "compressed-tensors-int8"
    summary: ClassVar[str] = "compressed-tensors W8A8: int8 weights, activations quantized as they run"
    activations: ClassVar[dict[str, Any] | None] = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True, "group_size": None,
        "block_structure": None, "actorder": None, "observer": None, "observer_kwargs": {},
    }  # fmt: skip

    def layout(self, format: Format) -> Layout:
        return IntQuantized()
