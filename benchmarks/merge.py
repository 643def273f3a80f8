"""What each way of merging an adapter costs: python benchmarks/merge.py MODEL INSTRUCT.jsonl [--format int4-g64]

MODEL is quantized, an adapter is trained on it by PEFT in a short loop (loss on responses), and merged by every route.
Each row is the mean KL divergence from the base with its adapter beside it, on the pairs that were not trained on.
`rounded to nearest` is PEFT's way: dequantize, add, quantize again. The adapter is kept in --folder for later runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import whit
from whit.integrations.loading import load_causal_lm, load_tokenizer
from whit.merging import Merge, Text, measure_routes, merge

import harness

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HELD_OUT = 200
HEADER = ("route", "KL", "share of rounding's", "likeliest token agrees")


def pairs(path: Path) -> list[dict[str, str]]:
    """The records of a JSONL file of prompts and responses."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def example(record: dict[str, str], tokenizer: Any, context: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels (context,); nothing is learnt from the prompt."""
    prompt = tokenizer(record["prompt"] + "\n", add_special_tokens=False)["input_ids"]
    response = tokenizer(record["response"] + "\n\n", add_special_tokens=False)["input_ids"]
    ids = (prompt + response)[:context]
    labels = ([-100] * len(prompt) + response)[:context]
    padding = context - len(ids)
    return torch.tensor(ids + [0] * padding), torch.tensor(labels + [-100] * padding)


def train(base: Path, folder: Path, records: list[dict[str, str]], args: argparse.Namespace) -> dict[str, float]:
    """Train and save an adapter; the mean loss of the first and of the last tenth of the steps."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(base))
    network = load_causal_lm(str(base), device=args.device)
    model = whit.prepare_for_training(network, gradient_checkpointing=args.device != "cpu")
    options = {"r": args.rank, "lora_alpha": 2 * args.rank, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.rate)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).repeat(100)
    losses = []
    for step in range(args.steps):
        chosen = [records[int(i)] for i in order[step * args.batch : (step + 1) * args.batch]]
        ids, labels = (torch.stack(part).to(model.device) for part in zip(
            *(example(record, tokenizer, args.context) for record in chosen), strict=True
        ))  # fmt: skip
        optimizer.param_groups[0]["lr"] = args.rate * min(1.0, (step + 1) / 10) * (1 - step / args.steps)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: {losses[-1]:.4f}", flush=True)
    model.save_pretrained(folder)
    part = max(len(losses) // 10, 1)
    return {"first": sum(losses[:part]) / part, "last": sum(losses[-part:]) / part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("instruct", type=Path)
    parser.add_argument("--format", default="int4-g64")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--routes", nargs="+", default=("sidecar", "bf16", "requantize", "requantize-anew", "source"))
    parser.add_argument("--name", default="merge")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    records = pairs(args.instruct)
    calibration = args.folder / "calibration.jsonl"
    calibration.write_text("\n".join(json.dumps(r) for r in records[HELD_OUT:]))
    heldout = args.folder / "heldout.txt"
    heldout.write_text("\n\n".join(f"{r['prompt']}\n{r['response']}" for r in records[:HELD_OUT]))
    seen = whit.Calibration(calibration, args.samples, args.context)
    base, adapter, options = args.folder / "base", args.folder / "adapter", whit.Options(device=args.device)
    recipe = whit.Recipe(args.method, [("*", args.format)])
    whit.quantize(args.model, base, recipe, calibration=seen if recipe.needs_stats else None, options=options)
    losses = None if (adapter / "adapter_config.json").exists() else train(base, adapter, records[HELD_OUT:], args)
    wanted = {
        "sidecar": Merge("sidecar"),
        "bf16": Merge("bf16"),
        "requantize": Merge("requantize", calibration=seen),
        "requantize-anew": Merge("requantize", args.format, calibration=seen),  # GPTQ, as for a new model
        "source": Merge("requantize", source=args.model, calibration=seen),
    }
    wanted = {name: wanted[name] for name in args.routes}
    outs = {name: args.folder / name for name in wanted}
    notes = {}
    for name, how in wanted.items():
        start = time.monotonic()
        account = merge(base, adapter, outs[name], how, options)
        reasons = sorted({e.reason for e in account.parameters if e.reason and "change lies" in e.reason})
        notes[name] = {"seconds": time.monotonic() - start, "bits_per_weight": account.bits_per_weight,
                       "reasons": reasons[:3]}  # fmt: skip
        print(name, notes[name], flush=True)
    found = measure_routes(base, adapter, outs, Text(str(heldout), args.context, args.tokens), args.device)
    rounded = next(m.kl for m in found if m.route.startswith("rounded"))
    rows = [(m.route, f"{m.kl:.5f}", f"{m.kl / rounded:.3f}", f"{100 * m.agreement:.2f} %") for m in found]
    about = (
        f"{Path(args.model).name} in {args.format} by {args.method}, an adapter of rank {args.rank} after {args.steps} "
        f"steps of {args.batch} x {args.context} tokens at {args.rate:g}; {args.tokens} tokens of held-out pairs."
    )
    result = {
        "setting": {k: str(v) for k, v in vars(args).items() if k not in ("folder", "model", "instruct")},
        "losses": losses, "routes": [vars(m) for m in found], "runs": notes, "machine": harness.machine(),
    }  # fmt: skip
    harness.save(args.name, result, f"{about}\n\n{harness.markdown(HEADER, rows)}")


if __name__ == "__main__":
    main()
