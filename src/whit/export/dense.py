"""A plain transformers checkpoint in bfloat16: what any tool reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from whit.export.base import Outcome, Parameter
from whit.export.folder import FolderExport, short_name
from whit.formats.numeric import dtype_name
from whit.model.targets import Target
from whit.tensor import Format, TensorSpec

CARD = """# {name}, in bfloat16

Written by `whit convert --export bf16`: a plain transformers checkpoint. `whit.json` says where each parameter is from.
"""


class Dense(FolderExport):
    """Every floating-point parameter in bfloat16; nothing is quantized."""

    name: ClassVar[str] = "bf16"
    summary: ClassVar[str] = "a plain transformers checkpoint"
    dtype: ClassVar[torch.dtype] = torch.bfloat16

    def problems(self, formats: Mapping[Target, Format]) -> list[str]:
        return [
            f"{target.holder}: {format} in a bf16 file; it must be kept; drop the rule"
            for target, format in formats.items()
        ]

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        spec = parameter.spec
        return {parameter.name: TensorSpec(spec.shape, self.dtype if spec.dtype.is_floating_point else spec.dtype)}

    def config(self, outcome: Outcome) -> dict[str, Any]:
        return {"dtype": dtype_name(self.dtype)}

    def files(self, outcome: Outcome) -> Mapping[str, bytes]:
        config = {key: value for key, value in outcome.config.items() if key != "torch_dtype"}  # dtype's older name
        return super().files(replace(outcome, config=config))

    def card(self, outcome: Outcome) -> str:
        return CARD.format(name=short_name(outcome.model))


class Float16(Dense):
    """The same in float16."""

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16


class Float32(Dense):
    """The same in float32."""

    name: ClassVar[str] = "fp32"
    dtype: ClassVar[torch.dtype] = torch.float32
