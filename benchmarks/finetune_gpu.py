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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import nn

import whit
from whit.formats import parse_format
from whit.layouts import BITS
from whit.model.targets import find_targets
from whit.modules import Dtypes, QuantizedLinear, install
from whit.tensor import PackedWeight
from whit.training import prepare_for_training
from whit.training.adapters import adapters, add_adapters
from whit.training.data import Example
from whit.training.loop import Loop, Work
from whit.training.loss import ResponseLoss
from whit.training.packing import plan_steps
from whit.training.ranks import Ranks

from harness import RESULTS, machine, markdown

FORMATS = ("nf4-dq", "int4-g64", "int3-g64", "int2-g64", "q4_k", "ternary")
LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 8192}
SHAPES = {
    "llama-3-8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
             "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 8192},
}  # fmt: skip
RANK, ALPHA = 16, 16.0
LIMIT_BYTES = 12e9
Stepper = Callable[[int], float]  # the number of a step to its loss, in which the step has ended


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
