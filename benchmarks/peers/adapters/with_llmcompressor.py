"""llm-compressor's GPTQ and AWQ, at their own defaults (static act-order, damping 0.01; 20 grid points).

`batch_size`, one by default there, is of samples that go through a module at once: AWQ's search runs a module 20 times
over all of them for each of its scales, and waits for Python where they go one by one.
"""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier

from adapters import Job, Took, Weights, load, timed


def quantize(job: Job) -> tuple[Weights, Took]:
    """Quantize in memory; the weights are those that its fake quantization gives."""
    reset_session()
    model = load(job)
    samples, context = job.tokens.shape
    ids = job.tokens.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * context] * samples})
    _, took = timed(
        lambda: oneshot(
            model=model,
            dataset=data,
            recipe=recipe(job),
            max_seq_length=context,
            num_calibration_samples=samples,
            batch_size=job.options.get("batch_size", 1),
            shuffle_calibration_samples=False,
        )
    )
    return dequantized(model), took


def recipe(job: Job) -> list[Any]:
    """The modifiers for a row."""
    row = job.row
    size = {"strategy": "group", "group_size": row.group_size} if row.group_size else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=row.bits, type="int", symmetric=row.symmetric, **size)
    shared = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=args)},
        "ignore": ["lm_head"],
    }
    if job.options["method"] == "gptq":
        return [GPTQModifier(**shared)]
    return [AWQModifier(), QuantizationModifier(**shared)]


@torch.no_grad()
def dequantized(model: Any) -> Weights:
    """The model's state, its linears as their codes and scales give them."""
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            zero = getattr(module, "weight_zero_point", None)
            weights[f"{name}.weight"] = fake_quantize(module.weight, module.weight_scale, zero, scheme.weights)
    return weights


def version() -> str:
    """What ran."""
    return installed("llmcompressor")
