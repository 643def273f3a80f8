"""What a product costs the host of a GPU: python benchmarks/gpu_host.py [--seconds 60] [--out FOLDER]

Calls of small packed linears, whose kernels take the device less than a call takes the host, beside torch's linear in
bfloat16, in turns; and with launches made anew for each call instead of those that the weight keeps. Then tokens a
second of transformers' own `generate`, without whit.compile, of a Llama of eight 8B-shaped layers in bfloat16,
int4-g128 and nf4-dq.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import whit
from decode_models import LLAMA, random_model
from whit.activations import parse_activations
from whit.kernels import dequantize
from whit.kernels.gpu.again import Prepared
from whit.modules import QuantizedLinear

from gpu_harness import Budget, relative_error
from harness import RESULTS, interleaved, markdown, save_checked, say_checks

SPECS = ("int4-g128", "nf4", "nf4-dq", "int8", "int2-g64", "int5-g64", "q4_k", "w8a8", "llm.int8")
INPUTS = {"w8a8": "int8", "llm.int8": "int8-outliers"}
SHAPE, ROWS = (256, 512), (1, 16, 64)
CALLS, ROUNDS = 200, 9
LAYERS, NEW = 8, 32
LIMIT = 2e-2  # of inputs rounded to 8 bits


def linear(spec: str) -> QuantizedLinear:
    """A packed linear of random weights."""
    values = torch.randn(SHAPE, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    how = INPUTS.get(spec)
    quantized = whit.quantize_tensor(values, "int8-channel" if how else spec)
    return QuantizedLinear.from_quantized(
        quantized, dtype=torch.bfloat16, activations=parse_activations(how) if how else None
    )


def forget(module: QuantizedLinear) -> None:
    """Let go of the launches that its weight keeps."""
    for _, packed in module._ready.values():
        if isinstance(packed, Prepared):
            packed.kept.clear()


def calls(module: nn.Module, x: Tensor, before: Callable[[], None] | None = None) -> Callable[[], None]:
    """So many calls in a row, started on an idle device."""

    def work() -> None:
        for _ in range(CALLS):
            if before is not None:
                before()
            module(x)

    return work


def timed(spec: str, rows: int) -> tuple[dict[str, Any], bool]:
    """Microseconds of a call, of one with its launch made anew, and of torch's; whether results are right."""
    module, plain = linear(spec), nn.Linear(SHAPE[1], SHAPE[0], bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, SHAPE[1], device="cuda", dtype=torch.bfloat16)
    tasks = {"whit": calls(module, x), "anew": calls(module, x, lambda: forget(module)), "torch": calls(plain, x)}
    took: dict[str, list[float]] = {name: [] for name in tasks}
    with torch.inference_mode():
        first, again = module(x), module(x)
        right = relative_error(again, x.double() @ dequantize(module.packed, torch.float32).double().T) < LIMIT
        for _ in range(ROUNDS):
            for name, seconds in interleaved(tasks, 1).items():
                took[name] += seconds
                torch.cuda.synchronize()
    found = {name: statistics.median(seconds) / CALLS * 1e6 for name, seconds in took.items()}
    least = {f"{name}_least": min(seconds) / CALLS * 1e6 for name, seconds in took.items()}
    return {"spec": spec, "rows": rows, **found, **least}, right and torch.equal(first, again)


def tokens_per_second(spec: str) -> dict[str, Any]:
    """Of transformers' own greedy generate at batch 1, with its dynamic cache; again with launches made anew."""
    model = random_model(spec, LLAMA | {"num_hidden_layers": LAYERS}, "cuda")
    prompt = torch.randint(3, 1000, (1, 32), device="cuda")
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}

    def rate() -> float:
        seconds = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return NEW / statistics.median(seconds[1:])

    found: dict[str, Any] = {"spec": spec, "tokens_per_second": rate()}
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for module in packed:
        module.register_forward_pre_hook(lambda module, _: forget(module))
    return found | ({"anew": rate()} if packed else {})


def table(cells: list[dict[str, Any]], models: list[dict[str, Any]]) -> str:
    """Microseconds by format and rows, then tokens a second."""
    lines = [
        (cell["spec"], str(cell["rows"]), *(f"{cell[name]:.1f}" for name in ("torch", "whit", "anew")))
        for cell in cells
    ]
    rates = [
        (one["spec"], f"{one['tokens_per_second']:.1f}", f"{one['anew']:.1f}" if "anew" in one else "")
        for one in models
    ]
    return "\n\n".join(
        (
            markdown(("linear", "rows", "torch bf16, us", "whit, us", "launch made anew, us"), lines),
            markdown(("8 layers, batch 1", "tokens/s", "launches made anew"), rates),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    budget, cells, checks = Budget(given.seconds), [], []
    for spec, rows in itertools.product(SPECS, ROWS):
        if budget.left > 10:
            cell, right = timed(spec, rows)
            cells.append(cell)
            checks.append((f"{spec} {rows} rows", right))
            print(cell, flush=True)
    say_checks(checks)
    models = [tokens_per_second(spec) for spec in ("bf16", "int4-g128", "nf4-dq") if budget.left > 8]
    save_checked("gpu_host", checks, [*cells, *models], table(cells, models), given.out)


if __name__ == "__main__":
    main()
