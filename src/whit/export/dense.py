"""A plain transformers checkpoint in bfloat16, float16 or float32: what any tool reads."""

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

CARD = """# {name}, in {dtype}

Written by `whit convert --export {export}`: a plain transformers checkpoint. `whit.json` says where each
parameter is from.
"""


class Dense(FolderExport):
    """Every floating-point parameter in bfloat16; nothing is quantized."""

    name: ClassVar[str] = "bf16"
    summary: ClassVar[str] = "a plain transformers checkpoint in bfloat16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16

    def problems(self, formats: Mapping[Target, Format]) -> list[str]:
        asked = ", ".join(dict.fromkeys(map(str, formats.values())))
        said = f"{asked}: {self.name} files are not quantized; every module must be kept; use whit convert --export"
        return [f"{said} {self.name}, or another kind of file"] if formats else []

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        spec = parameter.spec
        return {parameter.name: TensorSpec(spec.shape, self.dtype if spec.dtype.is_floating_point else spec.dtype)}

    def config(self, outcome: Outcome) -> dict[str, Any]:
        return {"dtype": dtype_name(self.dtype)}

    def files(self, outcome: Outcome) -> Mapping[str, bytes]:
        config = {key: value for key, value in outcome.config.items() if key != "torch_dtype"}  # dtype's older name
        return super().files(replace(outcome, config=_in_dtype(config, dtype_name(self.dtype))))

    def card(self, outcome: Outcome) -> str:
        return CARD.format(name=short_name(outcome.model), dtype=dtype_name(self.dtype), export=self.name)


class Float16(Dense):
    """The same in float16."""

    name: ClassVar[str] = "fp16"
    summary: ClassVar[str] = "the same in float16"
    dtype: ClassVar[torch.dtype] = torch.float16


class Float32(Dense):
    """The same in float32."""

    name: ClassVar[str] = "fp32"
    summary: ClassVar[str] = "the same in float32"
    dtype: ClassVar[torch.dtype] = torch.float32


def _in_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration whose parts (`text_config`, `vision_config`) say this dtype, where they said another."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            changed[key] = _in_dtype(value, name)
        else:
            changed[key] = name if key in ("dtype", "torch_dtype") and isinstance(value, str) else value
    return changed
