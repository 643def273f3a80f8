"""Predicted against measured peak memory on a GPU: python benchmarks/memory_peak_gpu.py [--limit SECONDS]

A random model of a well-known shape is made here, quantized, and each result is loaded in a process of its own, which
generates after a prompt, or makes a training step with adapters; nothing is downloaded. Measured: what the driver says
the process took at its peak (its context, libraries and torch's reserved blocks), and torch's peaks of allocated and
reserved bytes. The first check is that weights in memory are the bytes that were predicted. Writes
results/memory_peak_gpu.json and .md; `--device cpu --shape whit:tiny` tries the script itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf

import whit
from whit.memory import Planner, Situation, find_shape, find_subject
from whit.memory.needs import OVERHEAD

import harness

CONTEXT, NEW, RANK = 2048, 16, 16
FORMATS = ("bf16", "int8", "int4-g128", "nf4-dq")
TRAINED = ("nf4-dq",)
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "num_hidden_layers": 2,
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 4096, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
CHILD = """
import json, sys, time, torch, whit
from whit.integrations.loading import load_causal_lm
from whit.report.energy import Meter
folder, device, kind, context, new, rank = sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:])
cuda = device == "cuda"
def peak_memory():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
def driver():  # bytes that the driver counts; the GPU must be this process's alone
    free, total = torch.cuda.mem_get_info()
    return total - free
said = {"before": 0, "context": 0}
if cuda:
    said["before"] = driver()  # the context is there already; what others hold is in it too
    ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    ones @ ones
    said["context"] = driver() - torch.cuda.memory_reserved()
    del ones
network = load_causal_lm(folder, device=device)
held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*network.parameters(), *network.buffers()]}
said["weights"] = sum(held.values())
said["loading_allocated"] = torch.cuda.max_memory_allocated() if cuda else 0
meter = Meter(network.device)
ids = torch.arange(3, 3 + context - new)[None].to(network.device) % 500
if kind == "generate":
    before, start = meter.read(), time.perf_counter()
    with torch.inference_mode():
        out = network.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert out.shape[1] == context
    after = meter.read()
    said["generate_seconds"] = time.perf_counter() - start
    said["generate_joules"] = None if before is None or after is None else after - before
else:
    import peft
    network = whit.prepare_for_training(network)
    network.config.use_cache = False
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    network = peft.get_peft_model(network, peft.LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for _ in range(2):
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
said["energy_note"] = meter.note
said["host_peak"] = peak_memory()
if cuda:
    torch.cuda.synchronize()
    said["allocated"], said["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    said["context_after"] = driver() - torch.cuda.memory_reserved()
    said["peak"] = said["context_after"] + said["reserved"]
    said["peak_of_allocated"] = said["context_after"] + said["allocated"]
else:
    said["allocated"] = said["reserved"] = 0
    said["peak"] = said["peak_of_allocated"] = said["host_peak"]
print(json.dumps(said))
"""


def apart(work: Callable[..., None], *args: Any) -> None:
    """Do it in a process of its own: what it held on the GPU would be counted as the measured one's context."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(work, *args).result()


def write_quantized(model: Path, written: Path, spec: str) -> None:
    """The model in a format."""
    whit.quantize(str(model), str(written), whit.Recipe(rules=[("*", spec)]))


def make_model(shape: str, folder: Path, device: str) -> None:
    """A random bfloat16 model with a config.json of that shape."""
    found = None if shape == "whit:tiny" else find_shape(shape)
    if found is None and shape != "whit:tiny":
        raise SystemExit(f"{shape}: no shape of that name; it must be one of whit's; see whit/memory/shapes.py")
    values = dict(TINY if found is None else found.config)
    config = hf.AutoConfig.for_model(**values)
    config.architectures = values["architectures"]
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        network = hf.AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(torch.float32)
    network.save_pretrained(folder)


def measure(folder: Path, device: str, kind: str, seconds: float) -> dict[str, Any]:
    """What a process of its own says of itself."""
    command = [sys.executable, "-c", CHILD, str(folder), device, kind, str(CONTEXT), str(NEW), str(RANK)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(model: Path, spec: str, kind: str, device: str, end: float) -> dict[str, Any]:
    """Predicted and measured bytes for one format."""
    situation = Situation(context=CONTEXT, device=device)
    if kind == "train":
        situation = replace(situation, train="qlora", rank=RANK)
    planner = Planner(find_subject(str(model)), situation)
    need = planner.need(planner.weights(spec), checkpointing=True if kind == "train" else None)
    written = model
    if spec != "bf16":
        written = model.parent / spec
        apart(write_quantized, model, written, spec)
    found = measure(written, device, kind, end - time.monotonic())
    row = {"format": spec, "kind": kind, "predicted": need.to_json(), **found}
    if "error" not in row:
        share = found["weights"] / need.weights_bytes
        assert 0.97 < share < 1.03, f"{spec}: {found['weights']} bytes of weights held, {need.weights_bytes} predicted"
    return row


def table(rows: list[dict[str, Any]], device: str) -> str:
    """Predicted beside measured: the whole, and what torch allocated beside the prediction without its overhead."""
    names = ("predicted MB", "peak MB", "ratio", "allocated MB", "ratio", "context MB", "reserved MB")
    header, cells = ("format", "what", *names), []
    for row in rows:
        if "error" in row:
            cells.append((row["format"], row["kind"], row["error"][:80], *("" for _ in header[3:])))
            continue
        total = row["predicted"]["total_bytes"]
        above = total - OVERHEAD[device]
        allocated = row["allocated"] or row["peak"] - OVERHEAD[device]
        if "peak_of_allocated" not in row:
            whole = ("not measured", "")
        else:
            whole = (f"{row['peak_of_allocated'] / 1e6:.0f}", f"{total / row['peak_of_allocated']:.3f}")
        cells.append((
            row["format"], row["kind"], f"{total / 1e6:.0f}", *whole, f"{allocated / 1e6:.0f}",
            f"{above / allocated:.3f}",
            f"{row['context_after'] / 1e6:.0f}" if "context_after" in row else "", f"{row['reserved'] / 1e6:.0f}",
        ))  # fmt: skip
    return harness.markdown(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="Llama-3.2-1B")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--train", default=",".join(TRAINED), help="formats for a QLoRA step; empty: none")
    parser.add_argument("--limit", type=float, default=170, help="seconds in all")
    args = parser.parse_args()
    end = time.monotonic() + args.limit
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        apart(make_model, args.shape, model, args.device)
        wanted = [(spec, "generate") for spec in args.formats.split(",") if spec]
        for spec, kind in [*wanted, *((spec, "train") for spec in args.train.split(",") if spec)]:
            rows.append(compare(model, spec, kind, args.device, end))
            print(json.dumps(rows[-1]), flush=True)
    note = (
        f"\n{args.shape}, random weights, on {args.device}: {CONTEXT} tokens, {NEW} of them generated; or two steps of "
        f"QLoRA over {CONTEXT - NEW} tokens, rank {RANK}, checkpointing. Peak: context and libraries, and what torch "
        "allocated at most."
    )
    result = {"machine": harness.machine(), "shape": args.shape, "device": args.device, "rows": rows}
    if args.device == "cuda":
        harness.save("memory_peak_gpu", result, table(rows, args.device) + "\n" + note)
    else:
        print(table(rows, args.device) + "\n" + note)


if __name__ == "__main__":
    main()
