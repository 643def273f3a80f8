"""Other projects' products of packed weights on a GPU, beside torch's and whit's in one run.

    python benchmarks/gpu_peers.py --peers DIR --seconds 90 --out FOLDER

DIR holds what the machine has not installed: bitsandbytes and gemlite as they lie in their wheels, and marlin, which
is IST-DASLab's marlin_cuda_kernel.cu behind one C function (below, `marlin`). gemlite, which compiles while it runs,
has a process of its own. One that cannot be loaded, or hangs, is told and the others go on. A time counts only where
the product was right: each is compared with the product of what its own codes stand for, on one shape. marlin
multiplies float16, all others bfloat16.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import json
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_many import prepare_now
from whit.kernels import Gpu, dequantize

from gpu_harness import Budget, Kitchen, copies, random_packed, random_x, relative_error, seconds_cold
from harness import machine, markdown

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
ROWS = (1, 16, 64, 256, 1024)
GROUP = 128
LIMIT = 1e-2
Call = Callable[[Tensor], Tensor]
Made = tuple[Call, Tensor]  # the product, and the weight (outs, columns) that it stands for


def codes_and_scales(shape: tuple[int, int], bits: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unsigned codes (outs, columns) and bfloat16 scales (outs, groups)."""
    codes = torch.randint(0, 1 << bits, shape, device="cuda", dtype=torch.uint8, generator=random)
    scales = torch.rand(shape[0], shape[1] // GROUP, device="cuda", generator=random) * 0.02 + 0.01
    return codes, scales.bfloat16()


def decoded(codes: Tensor, scales: Tensor, zero: int) -> Tensor:
    return (codes.float() - zero) * scales.float().repeat_interleave(GROUP, 1)


def torch_plain(shape: tuple[int, int], random: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> Made:
    weight = random_x(*shape, random, dtype)
    return lambda x: torch.nn.functional.linear(x, weight), weight


def torch_half(shape: tuple[int, int], random: torch.Generator) -> Made:
    return torch_plain(shape, random, torch.float16)


def tinygemm(shape: tuple[int, int], random: torch.Generator) -> Made:
    """torch's int4 kernel: two codes to a byte, the first one above; scales beside values of code 8."""
    codes, scales = codes_and_scales(shape, 4, random)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    both = torch.stack([scales.t(), torch.zeros_like(scales.t())], 2).contiguous()
    return lambda x: torch._weight_int4pack_mm(x, packed, GROUP, both), decoded(codes, scales, 8)


def bitsandbytes_nf4(shape: tuple[int, int], random: torch.Generator) -> Made:
    bnb: Any = importlib.import_module("bitsandbytes")
    codes, state = bnb.functional.quantize_4bit(random_x(*shape, random) * 0.02, blocksize=64, quant_type="nf4")
    weight = bnb.functional.dequantize_4bit(codes, state)
    return lambda x: bnb.matmul_4bit(x, codes.t(), quant_state=state), weight


def gemlite(shape: tuple[int, int], random: torch.Generator, bits: int = 4) -> Made:
    helper: Any = importlib.import_module("gemlite.helper")
    codes, scales = codes_and_scales(shape, bits, random)
    zero = 1 << (bits - 1)
    zeros = torch.full_like(scales, zero)
    layer = helper.A16Wn(device="cuda:0", dtype=torch.bfloat16).from_weights(codes, scales, zeros, bits, GROUP)
    return lambda x: layer(x), decoded(codes, scales, zero)


def gemlite_2(shape: tuple[int, int], random: torch.Generator) -> Made:
    return gemlite(shape, random, 2)


@lru_cache(maxsize=1)
def marlin_sample(kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales as marlin lays them out, and the weight they stand for; packing goes through numpy."""
    outs, columns = SHAPES[0]
    codes, scales = codes_and_scales((outs, columns), 4, torch.Generator("cuda").manual_seed(1))
    layer = kind(columns, outs, groupsize=GROUP)
    linear = torch.nn.Linear(columns, outs, bias=False, device="cuda", dtype=torch.float16)
    linear.weight.data = decoded(codes, scales, 8).half()
    layer.cuda().pack(linear, scales.half())
    return layer.B, layer.s, linear.weight.data


def marlin(shape: tuple[int, int], random: torch.Generator) -> Made:
    """`marlin_run(A, B, C, scales, rows, outs, columns, workspace, group, stream)` of marlin.so calls `marlin_cuda`."""
    sys.modules["marlin_cuda"] = types.ModuleType("marlin_cuda")
    module: Any = importlib.import_module("marlin")
    library = ctypes.CDLL(str(Path(module.__file__).with_name("marlin.so")))
    outs, columns = shape
    layer = module.Layer(columns, outs, groupsize=GROUP).cuda()
    weight = torch.empty(0, device="cuda")
    if shape == SHAPES[0]:
        layer.B, layer.s, weight = marlin_sample(module.Layer)
        layer.B, layer.s = layer.B.clone(), layer.s.clone()
    else:
        layer.B.random_(generator=random)
        layer.s.uniform_(0.01, 0.03, generator=random)
    layer.workspace = layer.workspace.cuda()

    def call(x: Tensor) -> Tensor:
        y = torch.empty(len(x), outs, dtype=x.dtype, device=x.device)
        where = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, layer.B, y, layer.s)]
        sizes = [ctypes.c_int(n) for n in (len(x), outs, columns)]
        at = ctypes.c_void_p(layer.workspace.data_ptr())
        status = library.marlin_run(*pointers, *sizes, at, ctypes.c_int(GROUP), where)
        assert status == 0, f"marlin: {status}"
        return y

    return call, weight


def whit(spec: str) -> Callable[[tuple[int, int], torch.Generator], Made]:
    def make(shape: tuple[int, int], random: torch.Generator) -> Made:
        packed = random_packed(spec, shape, random)
        small = shape == SHAPES[0]
        weight = dequantize(packed, torch.bfloat16) if small else torch.empty(0, device="cuda")
        return lambda x: Gpu().linear(x, packed, None), weight

    return make


PEERS: dict[str, tuple[Callable[[tuple[int, int], torch.Generator], Made], torch.dtype, float]] = {
    "torch bf16": (torch_plain, torch.bfloat16, 16),
    "torch fp16": (torch_half, torch.float16, 16),
    "whit int4-g128": (whit("int4-g128"), torch.bfloat16, 4.125),
    "whit nf4": (whit("nf4"), torch.bfloat16, 4.5),
    "torch tinygemm int4-g128": (tinygemm, torch.bfloat16, 4.25),
    "marlin int4-g128 fp16": (marlin, torch.float16, 4.125),
    "bitsandbytes nf4": (bitsandbytes_nf4, torch.bfloat16, 4.5),
    "gemlite int4-g128": (gemlite, torch.bfloat16, 4.25),
    "gemlite int2-g128": (gemlite_2, torch.bfloat16, 2.25),
}


def compile_ours(names: Sequence[str], rows: Sequence[int]) -> None:
    """What whit takes is compiled side by side, before CUDA is used."""
    specs = [name.split()[1] for name in names if name.startswith("whit")]
    if not specs:
        return
    kitchen = Kitchen()
    prepare_now(kitchen, itertools.product(specs, SHAPES, rows))
    kitchen.pool.terminate()


def measure(name: str, rows: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Seconds by shape and rows of one of them, as far as time allows."""
    make, dtype, bits = PEERS[name]
    random, budget, found = torch.Generator("cuda").manual_seed(0), Budget(seconds), []
    for shape in SHAPES:
        made = [make(shape, random) for _ in range(copies(int(shape[0] * shape[1] * bits / 8)))]
        calls = [call for call, _ in made]
        weight = made[0][1].clone() if shape == SHAPES[0] else None
        del made
        for n in rows:
            if budget.left < 1:
                print(f"{name}: no time left for {shape} {n}", flush=True)
                continue
            x = random_x(n, shape[1], random, dtype)
            entry: dict[str, Any] = {"kernel": name, "shape": shape, "rows": n}
            try:
                y = calls[0](x)
                if weight is not None:
                    entry["error"] = relative_error(y, x.float() @ weight.float().T)
                    assert entry["error"] < LIMIT, f"relative error {entry['error']:.1e}"
                entry["seconds"] = seconds_cold([lambda c=c, x=x: c(x) for c in calls], 5)
            except Exception as problem:
                entry["failure"] = f"{type(problem).__name__}: {str(problem)[:300]}"
                print(f"FAIL {name} {shape} {n}: {entry['failure']}", flush=True)
            found.append(entry)
    return found


def measure_parts(names: Sequence[str], rows: Sequence[int], seconds: float, into: Path) -> None:
    """All of these one after the other in this process; what is found is kept on the way."""
    budget, found = Budget(seconds), []
    compile_ours(names, rows)
    for name, left in zip(names, itertools.count(len(names), -1), strict=False):
        try:
            found += measure(name, rows, budget.left / left * 1.5)
        except Exception as problem:
            print(f"{name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
        torch.cuda.empty_cache()
        into.write_text(json.dumps(found))
        print(f"{name}: {budget.left:.0f} s left", flush=True)


def table(entries: Sequence[dict[str, Any]], shape: tuple[int, int]) -> str:
    """Times torch's bf16 product, by rows; its own microseconds in brackets."""
    times = {(e["kernel"], e["rows"]): e["seconds"] for e in entries if tuple(e["shape"]) == shape and "seconds" in e}
    rows = sorted({n for _, n in times})
    body = []
    for name in PEERS:
        cells = []
        for n in rows:
            own, plain = times.get((name, n)), times.get(("torch bf16", n))
            shown = "" if own is None or plain is None else f"{plain / own:.2f}"
            cells.append(f"({own * 1e6:.1f})" if name == "torch bf16" and own else shown)
        body.append([name, *cells])
    return markdown([f"{shape[0]}x{shape[1]}", *(f"rows {n}" for n in rows)], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--only", default=",".join(PEERS))
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.append(str(given.peers.resolve()))
    if given.part:
        measure_parts(given.part.split(","), [int(n) for n in given.rows.split(",")], given.seconds, given.out)
        return
    budget, entries = Budget(given.seconds), []
    given.out.mkdir(parents=True, exist_ok=True)
    known = [name for name in given.only.split(",") if not name.startswith("gemlite")]
    others = [name for name in given.only.split(",") if name.startswith("gemlite")]
    for names, share in ((known, 0.65 if others else 1.0), (others, 1.0)):
        limit, into = budget.left * share, given.out / "part.json"
        if not names or limit < 10:
            continue
        into.unlink(missing_ok=True)
        options = {"--part": ",".join(names), "--seconds": str(limit - 4), "--rows": given.rows}
        options |= {"--peers": str(given.peers), "--out": str(into)}
        try:
            command = [sys.executable, __file__, *itertools.chain(*options.items())]
            subprocess.run(command, timeout=limit, check=True)
        except (subprocess.SubprocessError, OSError) as problem:
            print(f"{names}: {type(problem).__name__}, {budget.left:.0f} s left", flush=True)
        entries += json.loads(into.read_text()) if into.exists() else []
        result = {"machine": machine(), "rows": entries}
        (given.out / "gpu_peers.json").write_text(json.dumps(result, indent=1) + "\n")
    text = "\n\n".join(table(entries, shape) for shape in SHAPES)
    (given.out / "gpu_peers.md").write_text(text + "\n")
    print(text, f"\ndone, {budget.left:.0f} s left", flush=True)


if __name__ == "__main__":
    main()
