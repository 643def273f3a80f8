"""QLoRA's loop for finetune_gpu.py: a model of random packed weights, random tokens, adapters on all linears."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

import whit
from whit.formats import parse_format
from whit.layouts import BITS
from whit.model.targets import find_targets
from whit.modules import Dtypes, install
from whit.tensor import PackedWeight
from whit.training.adapters import adapters, add_adapters
from whit.training.data import Example
from whit.training.loop import Loop, Work
from whit.training.loss import ResponseLoss
from whit.training.packing import plan_steps
from whit.training.ranks import Ranks

LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 8192}
SHAPES = {
    "llama-3-8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
             "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 8192},
}  # fmt: skip
RANK, ALPHA = 16, 16.0


def random_model(shape: str, spec: str, device: str) -> Any:
    """Llama with packed linears of random codes; scales such that weights are about 0.02 in size."""
    config = hf.LlamaConfig(**SHAPES[shape], tie_word_embeddings=False)
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config).to(torch.bfloat16)
    random = torch.Generator(device).manual_seed(0)
    for target in find_targets(model):
        if target.kind == "linear" and not target.kept_by_default:
            packed = random_packed(spec, target.shape, random, device)
            install(model, target, packed, Dtypes(torch.bfloat16))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.device.type == "meta":
                new = torch.ones(p.shape, dtype=p.dtype, device=device)
                if p.dim() == 2:
                    new.normal_(0, 0.02, generator=random)
                setattr(module, name, nn.Parameter(new, requires_grad=False))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def random_packed(spec: str, shape: tuple[int, ...], random: torch.Generator, device: str) -> PackedWeight:
    """Random bytes as nf4-dq lies; for other formats random weights, quantized."""
    format = parse_format(spec)
    if spec != "nf4-dq":
        return BITS.pack(whit.quantize_tensor(torch.randn(shape, generator=random, device=device) * 0.02, format))
    tensors = {}
    for name, want in BITS.specs(format, shape).items():
        if want.dtype.is_floating_point:
            values = 0.01 * (1 + torch.rand(want.shape, generator=random, device=device))
            tensors[name] = (values + 0.02 if name.endswith("offset") else values).to(want.dtype)
        else:
            tensors[name] = torch.randint(0, 256, want.shape, generator=random, device=device).to(want.dtype)
    return PackedWeight(BITS.name, format, shape, tensors)


def work(config: Any, batch: int, context: int, steps: int) -> Work:
    """Random tokens, all of which count, one example a row."""
    random = torch.Generator().manual_seed(1)
    rows = torch.randint(10, config.vocab_size, (batch, context), generator=random)
    examples = tuple(Example(row, torch.ones(context, dtype=torch.bool), i) for i, row in enumerate(rows))
    plan = plan_steps([context] * batch, tuning(batch, context, steps).portion, 0)
    return Work(examples, plan, (), (), 0)


def tuning(batch: int, context: int, steps: int, **more: Any) -> whit.Tuning:
    given = {"rank": RANK, "alpha": ALPHA, "learning_rate": 1e-3, "packing": False, "dtype": "bfloat16"}
    return whit.Tuning(batch=batch, context=context, steps=steps, accumulate=1, holdout=0.0, **(given | more))


def whits_loop(model: Any, batch: int, context: int, steps: int, **more: Any) -> Loop:
    chosen = tuning(batch, context, steps, **more)
    add_adapters(model, chosen, 0)
    parameters = adapters(model)
    optimizer = torch.optim.AdamW(parameters, lr=chosen.learning_rate, weight_decay=0.0)
    loss = ResponseLoss.of(model.eval())
    return Loop(model, parameters, optimizer, loss, work(model.config, batch, context, steps), chosen, 0, Ranks(), int)
