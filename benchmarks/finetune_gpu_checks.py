"""Whether what finetune_gpu.py times is right here: gradients, that nothing waits for the GPU, a loss that falls."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from finetune_gpu_loop import random_model, whits_loop

FORMATS = ("nf4-dq", "int4-g64", "int3-g64", "int2-g64", "q4_k", "ternary")


def check_gradients(device: str) -> list[dict[str, Any]]:
    """Relative errors of all adapter gradients against float32: whit's in bfloat16, and the dequantized model's."""
    found = []
    for spec in FORMATS:
        errors = {}
        truth = grads(random_model("tiny", spec, device), device, "truth")
        for name in ("packed", "dequantized"):
            got = grads(random_model("tiny", spec, device), device, name)
            assert got.keys() == truth.keys()
            errors[name] = max(float((got[k] - truth[k]).norm() / truth[k].norm()) for k in got)
        entry = {"format": spec, **errors, "ok": errors["packed"] < 1.3 * errors["dequantized"] + 0.003}
        found.append(entry)
        print(entry, flush=True)
    return found


def grads(model: Any, device: str, kind: str) -> dict[str, torch.Tensor]:
    """Gradients of one batch, by name. Both halves of each adapter are random."""
    if kind != "packed":
        from whit.modules import remove_packed

        remove_packed(model, torch.float32 if kind == "truth" else torch.bfloat16)
        model = model.float() if kind == "truth" else model
    loop = whits_loop(model, 2, 64, 1)
    random = torch.Generator().manual_seed(2)
    for p in loop.parameters:
        p.data = (torch.randn(p.shape, generator=random) * 0.02).to(device)
    loop.gradients(0)
    return {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}


def check_waiting(device: str) -> dict[str, Any]:
    """Forward and backward of a step, with torch's warnings of whatever waits for the GPU."""
    if device == "cpu":
        return {"check": "waits", "ok": True, "reason": "no GPU"}
    loop = whits_loop(random_model("tiny", "nf4-dq", device), 2, 64, 1)
    loop.gradients(0)
    batch = loop._batch(loop.work.steps[0][0], loop.work.examples)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        with loop._precision():
            loss = loop.loss(loop.model, batch)
        loss.backward()
        torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{w.filename}:{w.lineno}" for w in heard if "synchroniz" in str(w.message)})
    ours = [place for place in places if "/whit/" in place]  # transformers itself asks once whether rows are packed
    return {"check": "waits", "ok": not ours, "places": [str(Path(p).relative_to(Path(p).parents[2])) for p in places]}


def check_falling(device: str) -> dict[str, Any]:
    """The same two rows for 30 steps: they are learned by heart."""
    loop = whits_loop(random_model("tiny", "nf4-dq", device), 2, 64, 30, learning_rate=5e-3)
    losses = [loop.step(n)["loss"] for n in range(30)]
    return {"check": "loss falls", "ok": losses[-1] < 0.8 * losses[0], "first": losses[0], "last": losses[-1]}
