"""What a planned run will take: seconds, memory and disk, from a small trial of the method on this machine."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from math import prod

import torch

from whit.calibration.runner import BUDGET
from whit.finish import peak_memory
from whit.job import Job
from whit.layouts import BITS
from whit.methods import Method
from whit.tensor import Format, LayerStats

READ_RATE, WRITE_RATE = 1.0e9, 0.5e9  # bytes per second of an ordinary solid-state disk
TRIAL = 1 << 20  # weights
WORKING_BYTES = 24  # per weight of the parameter in work: float32 copies, codes, and the next one being read
SQUARES = 28  # bytes per element of the widest hessian: one in float32, three in float64


@dataclass(frozen=True)
class Estimate:
    """Seconds, bytes of peak memory, and bytes that the weight files take on the disk."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate(job: Job) -> Estimate:
    """Time the method on random weights and scale up; reads none of the model's."""
    weights: Counter[tuple[Format, int]] = Counter()
    largest = 0
    for item in job.plan.items:
        if item.format is not None:
            weights[item.format, item.spec.shape[-1]] += prod(item.spec.shape)
            largest = max(largest, prod(item.spec.shape))
    seconds = sum(spec.nbytes for spec in (item.spec for item in job.plan.items)) / READ_RATE
    seconds += job.plan.size_bytes / WRITE_RATE
    if job.recipe is not None:
        method = job.recipe.method
        seconds += sum(n * _trial(method, f, columns, job.device) for (f, columns), n in weights.items())
    memory = peak_memory() + WORKING_BYTES * largest
    if job.calibration is not None:
        more_seconds, more_memory = _calibration(job, largest)
        return Estimate(seconds + more_seconds, memory + more_memory, job.plan.size_bytes)
    return Estimate(seconds, memory, job.plan.size_bytes)


def _calibration(job: Job, largest: int) -> tuple[float, int]:
    """Seconds and bytes of running the blocks twice and of summing x x^T, by the rate of a product of this size."""
    assert job.calibration is not None
    tokens = job.calibration.tokens.numel()
    shapes = [item.target.shape for item in job.plan.items if item.format is not None and item.target is not None]
    hidden = min((shape[-1] for shape in shapes), default=0)
    x = torch.ones(job.calibration.tokens.shape[1], hidden, device=job.device)
    x.T @ x
    start = time.perf_counter()
    float((x.T @ x).sum())
    rate = 2 * len(x) * hidden**2 / (time.perf_counter() - start)
    # Of linears that share an input one is summed: about half of all.
    work = sum(4 * tokens * prod(shape) + tokens * shape[-1] ** 2 for shape in shapes)
    inputs = min(tokens * hidden * 2, BUDGET)
    square = max((shape[-1] for shape in shapes), default=0) ** 2
    return work / max(rate, 1), inputs + SQUARES * square + WORKING_BYTES * largest


def _trial(method: Method, format: Format, columns: int, device: torch.device) -> float:
    """Seconds per weight of quantizing, packing and measuring the error."""
    columns = max(columns, format.group_size)
    columns -= columns % max(format.group_size, 1)
    rows = max(TRIAL // columns, 1)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(device)
    start = time.perf_counter()
    stats = LayerStats(torch.eye(columns, device=device), 1) if method.needs_stats else None
    quantized = method(weight, stats, format)
    BITS.pack(quantized)
    (quantized.dequantize() - weight).norm().item()
    return (time.perf_counter() - start) / (rows * columns)
