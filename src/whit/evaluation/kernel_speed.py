"""How fast packed products run here: seconds per call beside the machine's own limits and the installed peers.

Weights are cold: every call takes the next of enough copies to fill COLD bytes, twice the last cache or more, so that
none comes from a cache. All candidates of a case take turns within each round, so that they see the same noise. The
limit of a case is the longer of the time to read the packed bytes once and the time of its products in bfloat16. One
row is measured beside a plain reading of as many bytes (READING), as memory is not equally fast all the time. After its
turn every candidate is called again and again with one of its weights: that is hot as far as a cache has room for it.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from whit.activations import SCHEMES, parse_activations
from whit.arrays import quantize_tensor
from whit.evaluation.kernel_peers import Peer, peers_of
from whit.kernels.base import Kernel
from whit.kernels.cpu import Cpu8, library
from whit.kernels.cpu.binding import Library
from whit.kernels.cpu.memory import in_huge_pages
from whit.kernels.dispatch import select
from whit.kernels.reference import Reference
from whit.layouts import BITS
from whit.tensor import PackedWeight

SHAPES = ((4096, 4096), (11008, 4096), (4096, 14336))
FORMATS = ("int4-g128", "nf4", "int3-g128", "int2-g128", "int8-channel")
ROWS = (1, 16, 512)
INPUTS = ("int8", "int8-g32")
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # such as "32768K"
COLD = max(320 << 20, 2 * int(CACHE.read_text().strip().rstrip("K")) << 10 if CACHE.exists() else 0)
READ = 512 << 20
AHEAD = (0, 8192, 16384)  # bytes asked for in advance; the fastest way of reading is the limit
READING = "as many bytes read"  # by as many threads, and nothing done with them: what memory gives in the same turns
TURN = 0.2  # seconds after which the next kernel has its turn
AGAIN = 20  # calls in a row with one weight, of which the first one is not counted

Call = Callable[[Tensor], object]
Turn = Callable[[float], list[float]]  # calls for about so many seconds: what each took


@dataclass(frozen=True)
class Limits:
    """Bytes per second of streaming reads from huge pages; multiply-adds counted twice per second in bfloat16."""

    read_bytes_per_second: float
    matmul_flops: float


@dataclass(frozen=True)
class Speed:
    """One measured case; `share_of_limit` is 1 where a kernel is as fast as the machine allows.

    `hot_seconds`: the same with one weight again and again; None where that was not measured.
    """

    kernel: str
    format: str
    shape: tuple[int, int]
    rows: int
    dtype: str
    seconds: float
    bytes: int
    ratio_to_bf16: float
    share_of_limit: float
    hot_seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_limits(rounds: int = 5) -> Limits:
    """The machine's read bandwidth and its bfloat16 product, with torch's number of threads."""
    area = in_huge_pages(torch.ones(READ, dtype=torch.uint8))
    compiled = library()
    if isinstance(compiled, str):
        words = area.view(torch.int64)
        read = min(_timed(lambda: words.sum()) for _ in range(rounds))
    else:
        threads = torch.get_num_threads()
        # An Intel Xeon reads faster where memory is asked for in advance, as the kernels do; a Zen 4 slower.
        ways = (ahead for _ in range(rounds) for ahead in AHEAD)
        read = min(compiled.read(area.data_ptr(), READ, compiled.parallel, ahead, threads) for ahead in ways)
    a, b = torch.ones(512, 4096, dtype=torch.bfloat16), torch.ones(4096, 4096, dtype=torch.bfloat16)
    product = min(_timed(lambda: torch.nn.functional.linear(a, b)) for _ in range(rounds))
    return Limits(READ / read, 2 * 512 * 4096 * 4096 / product)


def measure(
    format: str, shape: tuple[int, int], rows: int, limits: Limits, rounds: int = 5, peers: bool = True,
    others: Mapping[str, tuple[Turn, int]] = MappingProxyType({}),
) -> list[Speed]:  # fmt: skip
    """whit's kernels, torch's bfloat16 product and the peers that have a weight of about this format.

    `format` may be a scheme (w8a8). A peer that does not take the shape is left out with a warning. `others` are
    further candidates, which run somewhere else: their turns, and the bytes of a weight.
    """
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random) / shape[1] ** 0.5
    x = torch.randn(rows, shape[1], generator=random).to(torch.bfloat16)
    candidates = {"torch bf16": _plain(weight.bfloat16())} | _own(weight, format, x)
    if peers:
        candidates |= _beside(weight, format, x)
    turns = {name: (turn_of(calls, x), size) for name, (calls, size) in candidates.items()} | dict(others)
    again = {name: turn_of(calls[:1] * AGAIN, x) for name, (calls, _) in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    hot: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds + 1):
        for name, (run, _) in turns.items():
            took = run(TURN)
            seconds[name] += took if turn else []  # the first one warms up
            hot[name] += again[name](TURN)[1:] if turn and name in again else []
    plain = statistics.median(seconds["torch bf16"])
    flops = 2 * rows * shape[0] * shape[1]
    found = []
    for name, (_, size) in turns.items():
        if not seconds[name]:  # another program's error, which its owner has said
            continue
        median = statistics.median(seconds[name])
        floor = max(size / limits.read_bytes_per_second, flops / limits.matmul_flops)
        warm = statistics.median(hot[name]) if hot[name] else None
        found.append(Speed(name, format, shape, rows, "bfloat16", median, size, plain / median, floor / median, warm))
    return found


def _own(weight: Tensor, format: str, x: Tensor) -> dict[str, Peer]:
    """The kernel that such a weight takes and, of one whose inputs are floats, those for rounded inputs too."""
    spec, inputs = SCHEMES.get(format.lower(), (format, ""))
    packed = BITS.pack(quantize_tensor(weight, spec))
    found = {}
    if inputs:
        how = parse_activations(inputs)
        static = {key: torch.full(s.shape, 4 / 127).to(s.dtype) for key, s in how.specs.items()}
        packed = replace(packed, activations=how, tensors={**packed.tensors, **static})
        kernel = select(packed, x)
        return {f"{kernel.name}, {inputs} inputs": _ours(kernel, packed)} | _read(packed, x)
    for kernel in {select(packed, x), Reference()} if len(x) > 1 else {select(packed, x)}:
        if kernel.supports(packed, x) is None:
            found[kernel.name] = _ours(kernel, packed)
    for inputs in INPUTS:
        how = parse_activations(inputs)
        rounded = replace(packed, activations=how)
        if how.fits(packed.format) and Cpu8().supports(rounded, x) is None:
            found[f"cpu, {inputs} inputs"] = _ours(Cpu8(), rounded)
    return found | _read(packed, x)


def _read(packed: PackedWeight, x: Tensor) -> dict[str, Peer]:
    compiled = library()
    return {} if len(x) > 1 or isinstance(compiled, str) else {READING: reading(packed.nbytes, compiled)}


def _beside(weight: Tensor, format: str, x: Tensor) -> dict[str, Peer]:
    """The peers that multiply by such a weight; a warning says which one does not take its shape, and why."""
    found = {}
    for name, make in peers_of(format).items():
        try:
            calls, size = make(weight, copies_of)
            calls[0](x)
        except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"{name} is left out for {format} {weight.shape[0]}x{weight.shape[1]}: {said}", stacklevel=3)
            continue
        found[name] = calls, size
    return found


def turn_of(calls: list[Call], x: Tensor) -> Turn:
    """All calls once, or as many as fit into the seconds; the next turn goes on where this one ended."""
    upcoming = cycle(calls)

    def run(seconds: float) -> list[float]:
        found: list[float] = []
        while len(found) < len(calls) and sum(found) <= seconds:
            call = next(upcoming)
            found.append(_timed(lambda call=call: call(x)))  # type: ignore[misc]
        return found

    return run


def copies_of(size: int) -> int:
    """How many weights of so many bytes are cold, one after the other."""
    return max(-(-COLD // size), 2)


def _timed(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def _plain(weight: Tensor) -> tuple[list[Call], int]:
    size = 2 * weight.numel()
    copies = [in_huge_pages(weight.clone()) for _ in range(copies_of(size))]
    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in copies], size  # type: ignore[misc]


def _ours(kernel: Kernel, packed: PackedWeight) -> tuple[list[Call], int]:
    copies = []
    for _ in range(copies_of(packed.nbytes)):
        tensors = {key: tensor.clone() for key, tensor in packed.tensors.items()}
        copies.append(kernel.prepare(replace(packed, tensors=tensors)))
    return [lambda x, w=w: kernel.linear(x, w, None) for w in copies], packed.nbytes  # type: ignore[misc]


def reading(size: int, compiled: Library) -> tuple[list[Call], int]:
    """Calls that read `size` cold bytes by torch's threads and do nothing with them, and `size`."""
    threads, count = torch.get_num_threads(), copies_of(size)
    area = in_huge_pages(torch.ones(count * size, dtype=torch.uint8))
    ahead = min(AHEAD, key=lambda ahead: compiled.read(area.data_ptr(), len(area), compiled.parallel, ahead, threads))
    parts = [area[i * size : (i + 1) * size] for i in range(count)]

    def reads(part: Tensor) -> Call:  # which holds the area as long as it may be called
        return lambda x: compiled.read(part.data_ptr() & ~63, size, compiled.parallel, ahead, threads)

    return [reads(part) for part in parts], size


def table(speeds: Sequence[Speed]) -> list[tuple[str, ...]]:
    """Lines for a table: case, kernel, milliseconds, ratio to bfloat16, share of the limit, milliseconds hot."""
    return [
        (
            f"{s.format} {s.shape[0]}x{s.shape[1]}", str(s.rows), s.kernel, f"{1e3 * s.seconds:.3f}",
            f"{s.ratio_to_bf16:.2f}", f"{100 * s.share_of_limit:.0f} %",
            "" if s.hot_seconds is None else f"{1e3 * s.hot_seconds:.3f}",
        )
        for s in speeds
    ]  # fmt: skip


HEADER = ("weight", "rows", "kernel", "ms", "x bf16", "of the limit", "ms, hot")
