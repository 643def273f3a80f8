"""GPTQModel's GPTQ, at its own defaults: columns in activation order, which within groups costs nothing."""

from __future__ import annotations

from importlib.metadata import version as installed

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

from adapters import Job, Took, Weights, timed


def quantize(job: Job) -> tuple[Weights, Took]:
    """Quantize in memory and ask each packed module for its weights."""
    row = job.row
    config = QuantizeConfig(
        bits=row.bits,
        group_size=row.group_size or -1,
        sym=row.symmetric,
        desc_act=not row.group_size,  # its group-aware order, the default, wants groups
        offload_to_disk=False,
        device=job.device,
        **job.options,
    )
    model = GPTQModel.load(str(job.model), config, dtype=torch.bfloat16)
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in job.tokens[:, None]]
    _, took = timed(lambda: model.quantize(samples, batch_size=1, backend=BACKEND.GPTQ_TORCH))
    return dequantized(model.model), took


def dequantized(model: torch.nn.Module) -> Weights:
    """The state of the model with every packed module as a plain matrix."""
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            if module.qzero_format() == 1:  # stored one too small
                convert_gptq_v1_to_v2_format_module(module, bits=module.bits, pack_dtype=module.pack_dtype)
            matrix = type(module).dequantize_weight(module)
            weights[f"{name}.weight"] = matrix.T.detach()
    return weights


def version() -> str:
    """What ran."""
    return installed("gptqmodel")
