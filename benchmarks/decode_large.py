"""A random Llama of 3 B parameters at int4-g128 on the processor: decoding, memory and start; `decode.py --large`.

The checkpoint (Llama 3.2's shapes, 1.9 GB) is made once, in --work. Three processes take it up, one after the other:
without prepared weights, with them for the first time (it writes the file), and mapping that file. Each says how long
it took from the finished imports to the first token, what it held at the most, and at what share of the read
bandwidth, measured between its own rounds, it decodes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from harness import machine, markdown, resident, save

SHAPE = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}
LAYERS, VOCABULARY, NEW = 28, 32000, 24
CANDIDATES = ("plain", "prepared, first", "prepared, later")


def make(folder: Path, layers: int) -> None:
    """The checkpoint as `whit quantize` would write it, 128 rows of every matrix repeated: values do not matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import whit
    from whit.checkpoint.header import file_order
    from whit.checkpoint.writer import Writer, index_json, plan_shards
    from whit.layouts import BITS
    from whit.tensor import TensorSpec

    recipe = whit.Recipe("rtn", [("*", "int4-g128"), ("lm_head", "int8-g128"), ("model.embed_tokens", "bf16")])
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=VOCABULARY, head_dim=128, dtype=torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    random = torch.Generator().manual_seed(0)
    formats, specs, small = {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            spec = formats[name] = "int8-g128" if name == "lm_head" else "int4-g128"
            key = (module.in_features, spec)
            if key not in small:
                some = torch.randn(128, module.in_features, generator=random) / 64
                small[key] = BITS.pack(whit.quantize_tensor(some, spec)).tensors
            for part, tensor in small[key].items():
                specs[f"{name}.{part}"] = TensorSpec((module.out_features, tensor.shape[1]), tensor.dtype)
        else:
            for part, tensor in module.named_parameters(name, recurse=False):
                specs[part] = TensorSpec(tuple(tensor.shape), torch.bfloat16)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    quantization = whit.QuantizationConfig(recipe)
    quantization.formats = formats
    config.quantization_config = quantization.to_dict()
    config.save_pretrained(part)
    shards = plan_shards(specs.items(), 1_000_000_000)
    with Writer(part, shards) as writer:
        for name in (name for shard in shards for name in file_order(shard.specs)):
            holder, _, key = name.rpartition(".")
            wanted = specs[name]
            if holder in formats:
                tensors = small[model.get_submodule(holder).in_features, formats[holder]]
                rows = wanted.shape[0]
                writer.write(name, tensors[key].repeat(-(-rows // 128), 1)[:rows])
            else:
                norm = len(wanted.shape) == 1
                writer.write(name, (torch.randn(wanted.shape, generator=random) * 0.02 + norm).to(torch.bfloat16))
    for name, content in index_json(shards).items():
        (part / name).write_bytes(content)
    part.rename(folder)


def child(folder: str, prepared: str, rounds: int, threads: int) -> None:
    """One process; the last line that it prints is what it found."""
    torch.set_num_threads(threads)
    from transformers import LlamaForCausalLM  # noqa: F401  (libraries are not the model's memory)

    bare = resident("VmRSS")
    import whit
    from whit.evaluation.kernel_speed import measure_limits
    from whit.evaluation.model_speed import Transformers
    from whit.integrations.loading import load_causal_lm

    torch.nn.functional.linear(torch.ones(512, 64).bfloat16(), torch.ones(64, 64).bfloat16())
    before, start = resident("VmRSS"), time.perf_counter()
    model = load_causal_lm(folder, device="cpu")
    loaded = time.perf_counter()
    whit.compile(model, strict=True, **({"prepared": prepared} if prepared else {}))
    model.generate(torch.tensor([[5] * 8]), max_new_tokens=1, do_sample=False)
    first = time.perf_counter()
    one = Transformers(model, compiled=True)
    one.decode(8, 8)
    peak = resident("VmHWM")
    shares, speeds, reads = [], [], []
    for _ in range(rounds):
        limit = measure_limits(3).read_bytes_per_second
        took = one.decode(8, NEW) / NEW
        shares.append(one.nbytes / limit / took)
        speeds.append(1 / took)
        reads.append(limit)
    found = {
        "load_seconds": loaded - start, "first_token_seconds": first - start, "peak_bytes": peak,
        "bare_bytes": bare, "libraries_bytes": before, "read_bytes_per_second": reads, "tokens_per_second": speeds,
        "shares_of_limit": shares, "bytes_per_token": one.nbytes,
    }  # fmt: skip
    print(json.dumps(found), flush=True)


def large(args: argparse.Namespace) -> None:
    folder, prepared = args.work / f"llama-3b-{args.layers}", args.work / "prepared"
    args.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(prepared, ignore_errors=True)
    if not folder.exists():
        make(folder, args.layers)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    found: dict[str, dict[str, Any]] = {}
    rows = []
    for name in CANDIDATES:
        place = "" if name == "plain" else str(prepared)
        rounds = 0 if name == "prepared, first" else args.rounds
        command = [sys.executable, __file__, str(folder), place, str(rounds), str(args.threads)]
        search = os.pathsep.join([*filter(None, (os.environ.get("PYTHONPATH"),)), str(Path(__file__).parent)])
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, check=True, stdout=subprocess.PIPE)
        found[name] = said = json.loads(done.stdout.splitlines()[-1])
        speed = statistics.median(said["tokens_per_second"]) if rounds else 0
        share = statistics.median(said["shares_of_limit"]) if rounds else 0
        peak = said["peak_bytes"]
        rows.append(
            (name, f"{size / 1e9:.2f}", f"{said['load_seconds']:.2f}", f"{said['first_token_seconds']:.2f}",
             f"{peak / 1e9:.2f}", f"{peak / size:.2f}", f"{(peak - said['libraries_bytes']) / size:.2f}",
             f"{speed:.2f}" if rounds else "", f"{100 * share:.0f} %" if rounds else "")
        )  # fmt: skip
        print(*rows[-1], flush=True)
    header = (
        "weights", "file, GB", "load, s", "first token, s", "peak, GB", "peak / file", "beyond libraries / file",
        "tokens/s", "of the limit",
    )  # fmt: skip
    reads = [read / 1e9 for said in found.values() for read in said["read_bytes_per_second"]]
    note = (
        f"\n{args.threads} threads; peaks until 9 tokens were decoded, all of the process and less what the imported "
        f"libraries held; seconds from the imports on. The machine read {min(reads):.1f} to {max(reads):.1f} GB/s."
    )
    result = {"machine": machine(), "file_bytes": size, "layers": args.layers, "candidates": found}
    save("decode_large", result, markdown(header, rows) + "\n" + note)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
