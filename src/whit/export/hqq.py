"""HQQ checkpoints: each linear with all that HQQLinear.load_state_dict wants, axis 1, float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from whit.export import decoders
from whit.export.base import Outcome
from whit.export.linears import LinearsExport, one_format
from whit.formats.affine import Affine
from whit.layouts import Layout
from whit.layouts.affine import with_scales
from whit.layouts.hqq import HQQLayout
from whit.model.targets import Target
from whit.tensor import Format

USAGE = """Load it with the hqq library (each linear is the state of an `HQQLinear`), or with `import whit`."""


class HQQFile(LinearsExport):
    """One affine format with float16 scales, symmetric, asymmetric or with float zero points."""

    name: ClassVar[str] = "hqq"
    summary: ClassVar[str] = "HQQ: integers of 1, 2, 3, 4, 8 bits"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    usage: ClassVar[str] = USAGE

    @classmethod
    def fitted(cls, format: Format) -> Format:
        return with_scales(format, "f16") if isinstance(format, Affine) else format

    def layout(self, format: Format) -> Layout:
        return HQQLayout()

    def conflicts(self, formats: Mapping[Target, Format]) -> list[str]:
        return one_format("hqq", formats.values())

    def decode_linear(self, tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        return decoders.hqq(tensors["W_q"], tensors["scale"], tensors["zero"], int(tensors["nbits"])).reshape(shape)

    def config(self, outcome: Outcome) -> dict[str, Any]:
        format = next(iter(outcome.formats.values()))
        params = {
            "nbits": format.bits, "channel_wise": True, "group_size": format.group_size or None, "optimize": False,
            "round_zero": False, "axis": 1, "view_as_float": False,
        }  # fmt: skip
        said = {
            "weight_quant_params": params, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False,
        }  # fmt: skip
        skipped = self.kept_linears(outcome)
        return {"quantization_config": {"quant_method": "hqq", "quant_config": said, "skip_modules": skipped}}
