"""Train the shipped model from scratch: transformers' LlamaForCausalLM, AdamW, a cosine, one CUDA GPU.

The schedule runs over `--epochs`, or over the whole steps that fit in `--minutes` where those are fewer: the
number of steps is planned anew from the measured speed at every validation, so the cosine reaches its end.

    python recipes/shipped_model/train.py --data build/shipped_model --out build/shipped_model/model
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scoring import summary, token_losses
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

VALIDATION_TEXTS = ("wiki_valid", "heldout")

# For a name that it knows no mask for, transformers builds none, and torch masks inside its flash kernel; an
# explicit mask, which some releases build under torch.compile, would send it to a slower one.
CAUSAL = "sdpa_without_mask"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


@dataclass(frozen=True)
class Schedule:
    epochs: float = 12
    minutes: float = 60
    batch: int = 32  # sequences; times context = 65,536 tokens a step
    context: int = 2048
    peak_rate: float = 3e-3
    final_rate: float = 3e-5
    warmup_steps: int = 300
    weight_decay: float = 0.5  # 0.1 for 24 epochs overfits: the loss on other texts rises again from epoch 15
    clip: float = 1.0
    validate_every: int = 500
    seed: int = 0

    def rate(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_rate + (self.peak_rate - self.final_rate) * cosine


def new_model(context: int) -> LlamaForCausalLM:
    """8.13 M parameters, 2.10 M of them the tied embedding; every in_features is a multiple of 256."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation=CAUSAL,
    )
    return LlamaForCausalLM(config)


def batches(stream: torch.Tensor, schedule: Schedule) -> Iterator[torch.Tensor]:
    """(batch, context + 1) for ever; an epoch cuts the stream at a new offset and shuffles its windows."""
    generator = torch.Generator().manual_seed(schedule.seed)
    columns = torch.arange(schedule.context + 1, device=stream.device)
    while True:
        offset = int(torch.randint(schedule.context, (), generator=generator))
        windows = (len(stream) - 1 - offset) // schedule.context
        order = torch.randperm(windows, generator=generator)
        for rows in order.split(schedule.batch)[: windows // schedule.batch]:
            starts = (offset + rows * schedule.context).to(stream.device)
            yield stream[starts[:, None] + columns].long()


def optimizer_for(model: torch.nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def batch_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def quick_validation(model: torch.nn.Module, stream: torch.Tensor, context: int) -> float:
    """Mean loss over the first windows of a validation text, at most 64: for the curve, not for the card."""
    windows = stream[: (len(stream) - 1) // context * context + 1].unfold(0, context + 1, context)
    eights = windows[:64].long().split(8)
    return float(torch.stack([batch_loss(model, batch) for batch in eights if len(batch) == 8]).mean())


class Clock:
    """Plans the number of steps from the time left and the time that a step takes, compilation left out."""

    def __init__(self, schedule: Schedule, wanted_steps: int):
        self.schedule, self.wanted_steps = schedule, wanted_steps
        self.start = self.mark = time.perf_counter()
        self.marked_step = 0

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def begin_timing(self, step: int) -> None:
        self.mark, self.marked_step = time.perf_counter(), step

    def seconds_per_step(self, step: int) -> float:
        return (time.perf_counter() - self.mark) / max(1, step - self.marked_step)

    def plan(self, step: int) -> int:
        left = 0.98 * 60 * self.schedule.minutes - self.elapsed()
        return max(step + 1, min(self.wanted_steps, step + int(left / self.seconds_per_step(step))))


def fit(model: LlamaForCausalLM, streams: dict[str, torch.Tensor], schedule: Schedule) -> dict:
    """Trains in place; returns the log: one row at every validation, and what was run."""
    loss_of = torch.compile(batch_loss, dynamic=False)
    optimizer = optimizer_for(model, schedule)
    tokens_per_step = schedule.batch * schedule.context
    steps = wanted = max(1, round(schedule.epochs * len(streams["train"]) / tokens_per_step))
    clock, curve, recent = Clock(schedule, wanted), [], []
    data = batches(streams["train"], schedule)
    step = 0
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, steps)
        loss = loss_of(model, next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        step += 1
        if step % schedule.validate_every == 0 or step in (50, steps):
            row = {"step": step, "train": float(torch.stack(recent).mean())}
            for name in VALIDATION_TEXTS:
                row[name] = quick_validation(model, streams[name], schedule.context)
            row["seconds"] = clock.elapsed()
            if step == 50:
                clock.begin_timing(step)
            elif step < steps:
                steps = clock.plan(step)
            curve.append({key: round(value, 4) for key, value in row.items()})
            recent.clear()
            print(curve[-1], f"of {steps} steps, {clock.seconds_per_step(step):.4f} s a step", flush=True)
    return {
        "steps": steps,
        "tokens_seen": steps * tokens_per_step,
        "epochs": round(steps * tokens_per_step / len(streams["train"]), 2),
        "seconds": round(clock.elapsed(), 1),
        "schedule": asdict(schedule),
        "curve": curve,
    }


def score(folder: Path, data: Path, device: str) -> dict:
    """The figures of the saved bfloat16 weights, computed in float32, over the whole validation texts."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    sizes = json.loads((data / "sizes.json").read_text())
    figures = {}
    for name in VALIDATION_TEXTS:
        losses = token_losses(model, np.load(data / f"{name}.npy"), model.config.max_position_embeddings)
        figures[name] = summary(float(losses.double().sum()), len(losses), sizes[name]["bytes"])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    for name in ("epochs", "minutes", "peak_rate", "weight_decay"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Schedule, name))
    for name in ("batch", "context", "warmup_steps", "validate_every", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Schedule, name))
    args = vars(parser.parse_args())
    data, out = args.pop("data"), args.pop("out")
    schedule = Schedule(**args)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(schedule.seed)
    torch.set_float32_matmul_precision("high")
    arrays = {name: np.load(data / f"{name}.npy") for name in ("train", *VALIDATION_TEXTS)}
    streams = {name: torch.from_numpy(array.astype(np.int16)).to(device) for name, array in arrays.items()}
    model = new_model(schedule.context).to(device)
    log = {"parameters": model.num_parameters(), **fit(model, streams, schedule)}
    model.to(torch.bfloat16).save_pretrained(out)
    log["scores"] = score(out, data, device)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log["scores"], indent=1))


if __name__ == "__main__":
    main()
