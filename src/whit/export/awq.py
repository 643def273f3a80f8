"""AWQ checkpoints, version gemm, 4 bits: for AutoAWQ, transformers, vLLM, SGLang and the like.

Symmetric codes are written with zero points of 8: readers of this format always subtract one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from whit.export import decoders
from whit.export.base import Outcome
from whit.export.linears import LinearsExport, one_format
from whit.layouts import Layout
from whit.layouts.affine import half_scales
from whit.layouts.awq import AWQLayout
from whit.model.targets import Target
from whit.tensor import Format

USAGE = """```python
from transformers import AutoModelForCausalLM  # with gptqmodel installed

model = AutoModelForCausalLM.from_pretrained("PATH")
```"""


class AWQ(LinearsExport):
    """One 4-bit affine format with float16 scales."""

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "AWQ gemm: integers of 4 bits"
    usage: ClassVar[str] = USAGE

    @classmethod
    def fitted(cls, format: Format) -> Format:
        return half_scales(format)

    def layout(self, format: Format) -> Layout:
        return AWQLayout()

    def conflicts(self, formats: Mapping[Target, Format]) -> list[str]:
        return one_format("awq", formats.values())

    def decode_linear(self, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        return decoders.awq(**tensors)

    def config(self, outcome: Outcome) -> dict[str, Any]:
        format = next(iter(outcome.formats.values()))
        return {
            "quantization_config": {
                "quant_method": "awq", "bits": 4, "group_size": format.group_size or -1, "zero_point": True,
                "version": "gemm", "modules_to_not_convert": self.kept_linears(outcome),
            }
        }  # fmt: skip
