"""Ternary weights on Hopper: python benchmarks/ternary_gpu.py [--seconds 60] [--out FOLDER]

Modules first: products against float64, rows that do not depend on others, torch.compile, and the bytes that are saved.
Then 1 to 64 rows beside torch's bf16 product and the kernels that read digits: cold weights in CUDA graphs, medians.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from runs_gpu import random_packed as random_digits
from whit.kernels import reference
from whit.kernels.gpu import GpuRuns, GpuTernary
from whit.layouts import BITS, WHOLE_BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

from gpu_harness import Budget, copies, plain_seconds, random_x, relative_error, seconds_cold
from harness import RESULTS, markdown, save_checked, say_checks

CHECKED = (
    ("ternary-g64", (1000, 4096)), ("ternary-g64", (160, 14336)), ("ternary-g128", (4099, 2048)),
    ("ternary-g64-f32", (1000, 4096)), ("ternary", (1000, 4096)), ("ternary-tensor-absmean", (4099, 2048)),
)  # fmt: skip
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
ROWS = (1, 2, 4, 8, 16, 64)
LIMIT = 4e-3


def random_packed(spec: str, shape: tuple[int, int], generator: torch.Generator) -> PackedWeight:
    """Random digits, with those of no column as a file has them."""
    packed = random_digits(spec, shape, generator)
    unpacked = BITS.unpack_codes(packed.tensors["codes"], shape[1], packed.format)
    tensors = {**packed.tensors, "codes": BITS.pack_codes(unpacked, packed.format)}
    return PackedWeight(packed.layout, packed.format, shape, tensors)


def check(spec: str, shape: tuple[int, int], generator: torch.Generator) -> list[tuple[str, bool]]:
    """What was looked at in a module, and whether it is as it must be."""
    packed, found, name = random_packed(spec, shape, generator), [], "{} {}x{}".format(spec, *shape)
    before = {key: tensor.clone() for key, tensor in packed.tensors.items()}
    exact = reference.dequantize(packed, torch.float32).double()
    bias = torch.nn.Parameter(random_x(1, shape[0], generator)[0], requires_grad=False)
    module = QuantizedLinear(packed, bias, torch.bfloat16)
    for rows in (1, 2, 4, 8, 16, 64, 300):
        x = random_x(rows, shape[1], generator)
        y, wanted = module(x), x.double() @ exact.T + bias.double()
        right = relative_error(y, wanted) < LIMIT and torch.equal(module(x), y) and module.ready(x)[0] == GpuTernary()
        found.append((f"{name} {rows} rows", right))
    found.append((f"{name} in whole bits", module.layout == WHOLE_BITS.name))
    found.append((f"{name} compiled", compiled(module, generator)))
    module.set_deterministic(True)
    x = random_x(70, shape[1], generator)
    found.append((f"{name} rows alone", all(torch.equal(module(x)[i : i + 1], module(x[i : i + 1])) for i in (0, 37))))
    saved = module.state_dict()
    found.append((f"{name} saved", all(torch.equal(saved[key], tensor) for key, tensor in before.items())))
    return found


def compiled(module: QuantizedLinear, generator: torch.Generator) -> bool:
    """Whether torch.compile gives the same bits."""
    torch._dynamo.reset()
    x = random_x(1, module.in_features, generator)
    return torch.equal(torch.compile(module, fullgraph=True)(x), module(x))


def timed(spec: str, shape: tuple[int, int], generator: torch.Generator) -> list[dict[str, Any]]:
    """Seconds of bf16, of codes in whole bits and of digits, by rows."""
    first = random_packed(spec, shape, generator)
    digits = [first, *(random_packed(spec, shape, generator) for _ in range(copies(first.nbytes) - 1))]
    whole, cells = [GpuTernary().prepare(packed) for packed in digits], []
    for rows in ROWS:
        x = random_x(rows, shape[1], generator)
        ours = seconds_cold([lambda w=w, x=x: GpuTernary().linear(x, w, None) for w in whole], 5)
        other = seconds_cold([lambda w=w, x=x: GpuRuns().linear(x, w, None) for w in digits], 5)
        plain, held = plain_seconds(shape, rows, generator), sum(whole[0].tensors[key].nbytes for key in first.tensors)
        cells.append(
            {"spec": spec, "shape": shape, "rows": rows, "bytes": held, "bf16": plain, "us": ours, "digits": other}
        )
        print(
            spec, shape, rows, f"{plain * 1e6:.1f} {ours * 1e6:.1f} {plain / ours:.2f} {plain / other:.2f}", flush=True
        )
    return cells


def table(cells: list[dict[str, Any]]) -> str:
    lines = []
    for cell in cells:
        plain, ours = cell["bf16"], cell["us"]
        times = f"{plain * 1e6:.1f}", f"{ours * 1e6:.1f}", f"{plain / ours:.2f}", f"{plain / cell['digits']:.2f}"
        speed = f"{cell['bytes'] / ours / 1e9:.0f}"
        lines.append((cell["spec"], "{}x{}".format(*cell["shape"]), str(cell["rows"]), *times, speed))
    return markdown(("format", "shape", "rows", "bf16, us", "us", "times bf16", "from digits", "GB/s"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    budget, generator = Budget(given.seconds), torch.Generator("cuda").manual_seed(0)
    checks = []
    for case in CHECKED:
        checks += check(*case, generator)
        print(*case, f"{budget.left:.0f} s left", flush=True)
    say_checks(checks)
    cells: list[dict[str, Any]] = []
    for shape, spec in itertools.product(SHAPES, ("ternary-g64", "ternary")):
        if budget.left > 4:
            cells += timed(spec, shape, generator)
    save_checked("ternary_gpu", checks, cells, table(cells), given.out)


if __name__ == "__main__":
    main()
