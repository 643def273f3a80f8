"""Llama models with random weights, made where they run, for benchmarks of decoding."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from whit.formats import parse_format
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
SMALL = LLAMA | {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2}
FORMATS = ("bf16", "int4-g128", "nf4-dq")


def random_packed(spec: str, shape: tuple[int, int], device: str, random: torch.Generator) -> PackedWeight:
    """Random codes and params such that weights are about 0.02."""
    format, tensors = parse_format(spec), {}
    for name, want in BITS.specs(format, shape).items():
        if want.dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, want.shape, dtype=torch.uint8, device=device, generator=random)
        else:
            low = 0.004 if name == "scale" else 0.02
            values = torch.rand(want.shape, device=device, generator=random) * low + low / 2
            tensors[name] = values.to(want.dtype)
    return PackedWeight(BITS.name, format, shape, tensors)


def random_model(spec: str, options: dict[str, Any], device: str, seed: int = 0) -> Any:
    """A Llama with random weights made where it will run; linears of the blocks in a format."""
    config = transformers.LlamaConfig(**options, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    random = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            if spec != "bf16" and name != "lm_head":
                new: nn.Module = QuantizedLinear(random_packed(spec, shape, device, random), None, torch.bfloat16)
            else:
                new = nn.Linear(1, 1, bias=False)
                weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=random)
                new.weight = nn.Parameter(weight, requires_grad=False)
                new.out_features, new.in_features = shape
            setattr(parent, name.rpartition(".")[2], new)
        elif isinstance(module, nn.Embedding):
            weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(generator=random)
            module.weight = nn.Parameter(weight, requires_grad=False)
        elif type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device))
    model.requires_grad_(False)
    return model
