"""Random adapters, as PEFT saves them."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(model: Path, folder: Path, size: float = 0.02, **options) -> Path:
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    base = AutoModelForCausalLM.from_pretrained(model)
    base = base.dequantize() if options.get("use_dora") and hasattr(base, "hf_quantizer") else base
    made = peft.get_peft_model(base, peft.LoraConfig(**chosen))
    g = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = size * torch.randn(parameter.shape, generator=g) * (10 if "lora_A" in name else 1)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=g)
    made.save_pretrained(folder)
    return folder
