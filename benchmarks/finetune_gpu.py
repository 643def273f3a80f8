"""QLoRA on one GPU: what is computed, how fast, in how much memory, beside bitsandbytes + PEFT where that is installed.

    python benchmarks/finetune_gpu.py [--minutes 10] [--out results/finetune_gpu.json]

First checks: gradients of every kind of format in bfloat16 are as near to float32 as those of the dequantized model
with PEFT's own LoRA; nothing of whit's waits for the GPU; the loss falls. Then a Llama-3-8B-shaped model with random
nf4-dq weights, made on the device as they are stored, r = 16 on all linears, checkpointing: tokens per second and peak
memory at batch 4 x 2048, peak at 4 x 512. The rows: whit (its LoRA layer, its loss), the same packed weights with
PEFT's own layer and transformers' loss, and bitsandbytes. All see the same tokens, the same adapters and the same
weights (bitsandbytes quantizes the dequantized ones, which lie on its grid).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from finetune_gpu_checks import check_falling, check_gradients, check_waiting
from finetune_gpu_loop import ALPHA, RANK, SHAPES, random_model, tuning, whits_loop, work
from whit.modules import QuantizedLinear
from whit.training import prepare_for_training
from whit.training.adapters import adapters

from harness import RESULTS, machine, markdown

LIMIT_BYTES = 12e9
Stepper = Callable[[int], float]  # the number of a step to its loss, in which the step has ended


def whit_row(model: Any, batch: int, context: int, steps: int) -> Stepper:
    loop = whits_loop(model, batch, context, steps)
    return lambda number: loop.step(number)["loss"]


def peft_row(model: Any, batch: int, context: int, steps: int) -> Stepper:
    """Packed weights of whit's with PEFT's own LoRA layer and the loss of transformers."""
    return plain_steps(prepare_for_training(model), batch, context, steps)


def bitsandbytes_row(model: Any, batch: int, context: int, steps: int) -> Stepper:
    """Linear4bit in place of every packed linear, and PEFT's own preparation."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            weight = module.dequantize(torch.bfloat16)
            options = {"compress_statistics": True, "quant_type": "nf4"}
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, False, torch.bfloat16, **options, device="meta"
            )
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(weight.device)
            new.support_avx512bf16_for_cpu = False
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    model.is_loaded_in_4bit = True
    options = {"use_reentrant": False}
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
    return plain_steps(model, batch, context, steps)


def plain_steps(model: Any, batch: int, context: int, steps: int) -> Stepper:
    """The loop of any tutorial: autocast, transformers' loss, clipping, AdamW."""
    data, chosen = work(model.config, batch, context, steps), tuning(batch, context, steps)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        adapted = peft.get_peft_model(model, config).train()
    parameters = adapters(adapted)
    optimizer = torch.optim.AdamW(parameters, lr=chosen.learning_rate, weight_decay=0.0)
    device = parameters[0].device

    def step(number: int) -> float:
        tokens = torch.stack([data.examples[i].tokens for rows in data.steps[number] for (i,) in rows]).to(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, chosen.clip)
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate(number, steps)
        optimizer.step()
        return float(loss.detach())

    return step


ROWS = {"whit": whit_row, "whit's weights, PEFT's layer": peft_row, "bitsandbytes + PEFT": bitsandbytes_row}


@contextlib.contextmanager
def fresh(device: str) -> Iterator[None]:
    """Memory as if nothing had been before."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()


def measure(name: str, args: argparse.Namespace, context: int, steps: int) -> dict[str, Any]:
    """Seconds of each step after two, peak bytes, losses; or why it did not run."""
    entry: dict[str, Any] = {"row": name, "batch": args.batch, "context": context}
    with fresh(args.device):
        try:
            began = time.monotonic()
            step = ROWS[name](random_model(args.shape, "nf4-dq", args.device), args.batch, context, steps)
            entry["ready_seconds"] = time.monotonic() - began
            seconds, losses = [], []
            for number in range(steps):
                began = time.perf_counter()
                losses.append(step(number))
                seconds.append(time.perf_counter() - began)
            middle = statistics.median(seconds[2:] or seconds)
            entry |= {"step_seconds": seconds, "tokens_per_second": args.batch * context / middle, "losses": losses}
            if args.device != "cpu":
                entry["peak_bytes"] = torch.cuda.max_memory_allocated()
                entry["reserved_bytes"] = torch.cuda.max_memory_reserved()
            assert all(map(math.isfinite, losses))
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    print({k: v for k, v in entry.items() if k != "step_seconds"}, flush=True)
    return entry


def table(entries: list[dict[str, Any]]) -> str:
    """Tokens per second and memory, each beside the other rows."""
    body = []
    for e in entries:
        told = (
            [e["error"], "", ""]
            if "error" in e
            else [f"{e['tokens_per_second']:,.0f}", f"{e.get('peak_bytes', 0) / 1e9:.2f}", f"{e['losses'][-1]:.4f}"]
        )
        body.append([e["row"], f"{e['batch']} x {e['context']}", *told])
    return markdown(["", "batch", "tokens/s", "peak GB", "last loss"], body)


def page(result: dict[str, Any]) -> str:
    """The table with what it was made on; an earlier run's beside it, where the file keeps one."""
    said = f"{result['shape']} with random weights in nf4-dq, r = {result['rank']} on all linears, checkpointing"
    parts = [table(result["rows"]), f"{result['machine'].get('gpu', 'cpu')}, {said}; medians of the steps after two."]
    if (earlier := result.get("earlier")) is not None:
        parts += [f"{earlier['machine'].get('gpu', 'cpu')}, {earlier['note']}:", table(earlier["rows"])]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune_gpu.json")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    checks = (
        []
        if args.skip_checks
        else [*check_gradients(args.device), check_waiting(args.device), check_falling(args.device)]
    )
    print(checks[-2:], flush=True)
    result: dict[str, Any] = {"machine": machine(), "shape": args.shape, "rank": RANK, "checks": checks, "rows": []}
    for context in args.contexts:
        for name in ROWS:
            if time.monotonic() > end:
                result["rows"].append({"row": name, "batch": args.batch, "context": context, "error": "no time left"})
                continue
            result["rows"].append(measure(name, args, context, args.steps if context == args.contexts[0] else 3))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    last = [e["peak_bytes"] for e in result["rows"] if e["row"] == "whit" and e["context"] == 512 and "peak_bytes" in e]
    result["fits_12_GB_at_4_x_512"] = bool(last) and last[0] < LIMIT_BYTES
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page(result) + "\n")
    print(table(result["rows"]))
    if any(not check["ok"] for check in checks):
        raise SystemExit("checks failed")


if __name__ == "__main__":
    main()
