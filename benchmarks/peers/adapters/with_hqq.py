"""HQQ at its own defaults: asymmetric, float zero points (rounded at 4 bits), groups along the rows, no data."""

from __future__ import annotations

from importlib.metadata import version as installed

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from adapters import Job, Took, Weights, linears, load, timed


def quantize(job: Job) -> tuple[Weights, Took]:
    """Quantize each linear and dequantize it again."""
    row = job.row
    if row.symmetric:
        raise ValueError("HQQ has no symmetric mode: its grid always has a zero point")
    model = load(job)
    config = BaseQuantizeConfig(nbits=row.bits, group_size=row.group_size or None, axis=1, **job.options)

    def all_linears() -> dict[str, HQQLinear]:
        return {
            name: HQQLinear(
                module, config, compute_dtype=torch.bfloat16, device=job.device, initialize=True, del_orig=False
            )
            for name, module in linears(model).items()
        }

    quantized, took = timed(all_linears)
    weights = dict(model.state_dict())
    weights |= {f"{name}.weight": module.dequantize() for name, module in quantized.items()}
    return weights, took


def version() -> str:
    """What ran."""
    return installed("hqq")
