"""A checkpoint of any size with random weights, written one tensor at a time: for measurements that need no values."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from whit.checkpoint.header import count_parameters, file_order
from whit.checkpoint.writer import Writer, index_json, plan_shards
from whit.tensor import TensorSpec


def write_random(folder: Path, config: PretrainedConfig, shard_size: int = 5_000_000_000, device: str = "cpu") -> int:
    """Weights in bfloat16, normal with a standard deviation of 0.02, norms 1; returns the number of parameters.

    `config` is that of a causal language model; a tied head is left out. The tokenizer is the caller's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    names = dict(model.named_parameters())  # tied ones once
    specs = {name: TensorSpec(tuple(tensor.shape), torch.bfloat16) for name, tensor in names.items()}
    shards = plan_shards(specs.items(), shard_size)
    generator = torch.Generator(device).manual_seed(0)
    with Writer(folder, shards) as writer:
        for name in (name for shard in shards for name in file_order(shard.specs)):
            shape = specs[name].shape
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.02)
            writer.write(name, (torch.ones_like(values) if len(shape) == 1 else values).cpu())
        writer.sync()
    for name, content in index_json(shards).items():
        (folder / name).write_bytes(content)
    return count_parameters(specs)
