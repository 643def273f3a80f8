"""What qat.py measures of a model: perplexity and divergence of held-out text, tasks; and the bits of its file."""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qat_text
from whit.evaluation.listener import Silent
from whit.evaluation.tasks import builtin
from whit.evaluation.text import cut_windows
from whit.evaluation.zeroshot import Scorer, run_task
from whit.integrations.loading import load_causal_lm, load_tokenizer, maximum_context
from whit.modules import PackedModule, remove_packed
from whit.qat import Training
from whit.qat.losses import divergence, text_loss
from whit.tensor import QuantizedTensor

TASKS = ("piqa", "arc_easy")


def on_gpu(args: argparse.Namespace) -> bool:
    return torch.cuda.is_available() and args.device != "cpu"


def load(args: argparse.Namespace, folder: Path | str) -> Any:
    """A model in bfloat16 (float32 on a CPU), dequantized."""
    gpu = on_gpu(args)
    model = load_causal_lm(str(folder), device="cuda" if gpu else "cpu", dtype="bfloat16" if gpu else "float32")
    remove_packed(model, model.dtype)
    return model


def filled(args: argparse.Namespace, training: Training, values: Mapping[str, QuantizedTensor | Tensor]) -> Any:
    """The unquantized model with trained values, as `load` gives it once it is written."""
    model = load(args, args.model)
    items = {item.name: item for item in training.job.plan.items}
    for name, value in values.items():
        value = value.to(model.device)
        near = items[name].parameter(value.dequantize()) if isinstance(value, QuantizedTensor) else value
        model.get_parameter(name).data.copy_(near)
    return model


def equal(folder: Path, training: Training, values: Mapping[str, QuantizedTensor | Tensor]) -> bool:
    """Whether the packed model has the bits that were trained."""
    device = training.job.device
    model = load_causal_lm(str(folder), device=device.type)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    items = {item.name: item for item in training.job.plan.items}
    found = [
        torch.equal(packed[name.removesuffix(".weight")].dequantize(torch.float32), value.to(device).dequantize())
        for name, value in values.items()
        if isinstance(value, QuantizedTensor) and not items[name].target.transposed
    ]
    return bool(found) and all(found)


def measure(args: argparse.Namespace, model: Any, baseline: Any | None) -> dict[str, Any]:
    """Perplexities, divergences and tasks of a model."""
    began = time.monotonic()
    found: dict[str, Any] = {}
    for name, most in ((qat_text.TEST, args.test_tokens), (qat_text.VALID, args.valid_tokens)):
        cut = cut_windows(qat_text.stream(args.out / "tokens", name, most), args.context).to(model.device)
        perplexity, kl = compare(model, baseline, cut)
        found[name] = {"perplexity": perplexity, "kl": kl, "tokens": cut[:, 1:].numel()}
    try:
        found |= zero_shot(args, model)
    except Exception as error:  # the rest is known, and worth more
        traceback.print_exc()
        found |= {"tasks": {}, "average": None, "tasks_failed": str(error)}
    return found | {"measuring_seconds": time.monotonic() - began}


def compare(model: Any, baseline: Any | None, cut: Tensor) -> tuple[float, float]:
    """Perplexity of windows, and the mean KL from the baseline."""
    kl = loss = torch.zeros((), dtype=torch.float64, device=cut.device)
    with torch.inference_mode():
        for batch in torch.split(cut, max(4096 // cut.shape[1], 1)):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = loss + text_loss(logits, batch[:, 1:].flatten())
            if baseline is not None:
                kl = kl + divergence(logits, baseline(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1))
    count = cut[:, 1:].numel()
    return math.exp(float(loss) / count), float(kl) / count


def zero_shot(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The first items of each task."""
    scorer = Scorer(model, load_tokenizer(args.model), maximum_context(model.config))
    tasks = {}
    for name in TASKS if args.items else ():
        task = builtin(name)
        assert task is not None
        result = run_task(task, task.read(args.shared / "data", args.items), scorer, Silent())
        tasks[name] = {"accuracy": result.accuracy, "stderr": result.stderr, "items": result.items}
    average = sum(t["accuracy"] for t in tasks.values()) / len(tasks) if tasks else None
    return {"tasks": tasks, "average": average}
