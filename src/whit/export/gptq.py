"""GPTQ checkpoints, versions 1 and 2, for GPTQModel, transformers, vLLM, SGLang and the like.

`quantization_config` and the same in `quantize_config.json`: bits, group_size (-1 for a whole row), sym, desc_act, and
`dynamic` for modules that have a format of their own ("+:regex") or stay in 16 bits ("-:regex").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

import whit
from whit.export import decoders
from whit.export.base import Outcome
from whit.export.folder import to_json
from whit.export.linears import LinearsExport
from whit.layouts import Layout
from whit.layouts.affine import half_scales, integers_of
from whit.layouts.gptq import GPTQLayout
from whit.model.targets import Target, find_targets
from whit.tensor import Format

USAGE = """```python
from transformers import AutoModelForCausalLM  # with gptqmodel and optimum installed

model = AutoModelForCausalLM.from_pretrained("PATH")
```"""


class GPTQ(LinearsExport):
    """Version 1, which every reader knows; symmetric formats only, as it cannot say a zero point of 0."""

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "GPTQ version 1: symmetric integers of 2, 3, 4, 8 bits"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "experts")
    usage: ClassVar[str] = USAGE
    version: ClassVar[int] = 1

    @classmethod
    def fitted(cls, format: Format) -> Format:
        return half_scales(format)

    def layout(self, format: Format) -> Layout:
        return GPTQLayout(self.version)

    def conflicts(self, formats: Mapping[Target, Format]) -> list[str]:
        asymmetric = sorted({str(f) for f in formats.values() if (a := integers_of(f)) is not None and not a.symmetric})
        if self.version == 2 or not asymmetric:
            return []
        return [
            f"{' and '.join(asymmetric)}: a zero point may be 0, which GPTQ version 1 cannot say; "
            "it must be symmetric; use --export gptq-v2"
        ]

    def decode_linear(self, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        return decoders.gptq(**tensors, bits=format.bits, version=self.version)

    def config(self, outcome: Outcome) -> dict[str, Any]:
        return {"quantization_config": self._quantization_config(outcome)}

    def files(self, outcome: Outcome) -> Mapping[str, bytes]:
        return {**super().files(outcome), "quantize_config.json": to_json(self._quantization_config(outcome))}

    def _quantization_config(self, outcome: Outcome) -> dict[str, Any]:
        formats = outcome.formats
        common = Counter(formats.values()).most_common(1)[0][0]
        dynamic: dict[str, Any] = {f"-:{_exactly(name)}": {} for name in self.kept_linears(outcome) if "." in name}
        for p in outcome.parameters:
            if p.target is not None and p.format is not None and p.format != common:
                for module, _ in self.pieces(p.target):
                    dynamic[f"+:{_exactly(module)}"] = _options(p.format)
        heads = {target.holder for target in find_targets(self.model) if target.is_head}
        kind = "gptq" if self.version == 1 else "gptq_v2"
        return {
            **_options(common), "lm_head": bool(heads & formats.keys()), "quant_method": "gptq", "method": "gptq",
            "checkpoint_format": kind, "format": kind, "pack_dtype": "int32", "true_sequential": True,
            **({"dynamic": dynamic} if dynamic else {}), "meta": {"quantizer": [f"whit:{whit.__version__}"]},
        }  # fmt: skip


class GPTQv2(GPTQ):
    """Version 2: also asymmetric formats."""

    name: ClassVar[str] = "gptq-v2"
    summary: ClassVar[str] = "GPTQ version 2: also asymmetric"
    version: ClassVar[int] = 2


def _options(format: Format) -> dict[str, Any]:
    integers = integers_of(format)
    assert integers is not None
    said = {"bits": format.bits, "group_size": integers.group_size or -1, "sym": integers.symmetric}
    return {**said, "desc_act": integers is not format}


def _exactly(module: str) -> str:
    return f"^{re.escape(module)}$"
