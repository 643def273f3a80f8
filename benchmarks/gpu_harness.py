"""What the GPU benchmark's parts share: kernels compiled side by side, random weights, cold timings, a budget."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.formats import parse_format
from whit.kernels import reference
from whit.kernels.gpu import Gpu, decoding, nvrtc, stream, tiled
from whit.kernels.gpu.stream import Config, Scheme
from whit.layouts import BITS
from whit.tensor import PackedWeight

COLD_BYTES = 400 << 20  # weights that are read between two uses of one: many times the L2 cache
Job = tuple[str, tuple[str, ...], str]
T = TypeVar("T")


class Budget:
    """Seconds left of what was given."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def compile_job(job: Job) -> bytes | str:
    source, options, architecture = job
    try:
        return nvrtc_compile(source, options, architecture)
    except KernelError as error:
        return str(error)


nvrtc_compile = nvrtc.compile_source


class Kitchen:
    """Compiles ahead in processes of its own: NVRTC takes a second per kernel, and one process does one at a time.

    Make it before CUDA is used: the processes are forks.
    """

    def __init__(self) -> None:
        self.pool: Pool = multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, 16))
        self.done: dict[Job, bytes | str] = {}
        nvrtc.compile_source = self.lookup  # whoever builds a kernel finds it compiled

    def lookup(self, source: str, options: Sequence[str], architecture: str) -> bytes:
        job = (source, tuple(options), architecture)
        if job not in self.done:
            self.done[job] = compile_job(job)
        found = self.done[job]
        if isinstance(found, str):
            raise KernelError(found)
        return found

    def prepare(self, sources: Iterable[tuple[Path, Iterable[tuple[str, int]]]]) -> None:
        """Compile all of these (a source file and its macros)."""
        target = nvrtc.architecture(0)
        jobs = {(nvrtc.text(path), tuple(f"-D{k}={v}" for k, v in macros), target) for path, macros in sources}
        fresh = [job for job in jobs if job not in self.done]
        self.done |= zip(fresh, self.pool.map(compile_job, fresh, chunksize=1), strict=True)

    def prepare_streams(self, wanted: Iterable[tuple[Scheme, Config, bool, int]]) -> None:
        """Compile the fused kernel for each (scheme, configuration, half, rows)."""
        self.prepare((stream.SOURCE, stream.macros(*each).items()) for each in wanted)

    def prepare_tiled(self, wanted: Iterable[tuple[Scheme, tiled.Config, bool, bool]]) -> None:
        """Compile the kernel for more rows for each (scheme, configuration, half, wgmma)."""
        every = list(wanted)
        self.prepare((tiled.SOURCE, tiled.macros(*each).items()) for each in every)
        layouts = {(scheme, config.row_tiles) for scheme, config, *_ in every}
        self.prepare((tiled.ARRANGE, tiled.arrange_macros(*each).items()) for each in layouts)


def random_packed(spec: str, shape: tuple[int, int], generator: torch.Generator) -> PackedWeight:
    """A weight of random codes and small random params on the GPU, as it lies in a file."""
    format = parse_format(spec)
    tensors = {}
    for name, want in BITS.specs(format, shape).items():
        if want.dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, want.shape, dtype=torch.uint8, device="cuda", generator=generator)
        else:
            values = torch.rand(want.shape, device="cuda", generator=generator) * 0.02 + 0.01
            tensors[name] = values.to(want.dtype)
    return Gpu().prepare(PackedWeight(BITS.name, format, shape, tensors))


def copies(nbytes: int) -> int:
    """How many distinct weights make a pass over them cold."""
    return max(-(-COLD_BYTES // nbytes), 2)


def random_weights(spec: str, shape: tuple[int, int], generator: torch.Generator) -> list[PackedWeight]:
    first = random_packed(spec, shape, generator)
    return [first, *(random_packed(spec, shape, generator) for _ in range(copies(first.nbytes) - 1))]


def random_x(rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, columns, device="cuda", generator=generator).to(dtype)


def seconds_cold(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median seconds per call, all calls of a pass in one CUDA graph, each on its own weight."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return statistics.median(times) / 1e3 / len(calls)


def scheme_of(spec: str, columns: int = 4096) -> Scheme:
    """What a kernel knows of a format when it is built."""
    found = stream.scheme(parse_format(spec), columns)
    assert not isinstance(found, str), found
    return found


def right_product(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in float64, of the weight as it is."""
    found = x.double() @ reference.dequantize(packed, torch.float32).double().T
    return found if bias is None else found + bias.double()


def plain_seconds(shape: tuple[int, int], rows: int, generator: torch.Generator) -> float:
    """torch's bf16 product, its weights cold."""
    weights = [random_x(*shape, generator) for _ in range(copies(2 * shape[0] * shape[1]))]
    x = random_x(rows, shape[1], generator)
    return seconds_cold([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])  # type: ignore[misc]


def ranked(
    cuts: Iterable[T], product: Callable[[PackedWeight, T], object], weights: Sequence[PackedWeight], replays: int = 5
) -> list[tuple[float, T]]:
    """Seconds and cut, fastest first: `product(weight, cut)` over distinct weights."""
    timed = [(seconds_cold([partial(product, w, cut) for w in weights], replays), cut) for cut in cuts]
    return sorted(timed, key=lambda each: each[0])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted|| in float64; infinite where something is not finite."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    error = ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def early_works() -> bool:
    """Whether kernels that begin early give what they give otherwise, in a graph too; if not, none does from now on."""
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    weight, normal = torch.ones(4096, device="cuda").bfloat16(), nvrtc.Function.launch_early

    def chain() -> Tensor:
        residual, y = x.clone(), x
        for _ in range(20):
            y = decoding.norm(residual, y, weight, 1e-5)
        return y

    try:
        nvrtc.Function.launch_early = nvrtc.Function.launch  # type: ignore[method-assign]
        wanted = chain()
        nvrtc.Function.launch_early = normal  # type: ignore[method-assign]
        found, graph = [chain()], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            inside = chain()
        for _ in range(5):
            graph.replay()
            found.append(inside.clone())
        works = all(torch.equal(each, wanted) for each in found)
        print("early launches:", "right" if works else "WRONG", flush=True)
    except Exception as error:
        print(f"early launches FAIL: {type(error).__name__}: {str(error)[:300]}", flush=True)
        works = False
    if not works:
        nvrtc.Function.launch_early = nvrtc.Function.launch  # type: ignore[method-assign]
    return works
