"""What a planned run will take: seconds, memory and disk, from small trials of the method on this machine.

Time is counted in weights (rounding, packing), in matrices (a factor of the inputs' statistics, cubic in the columns)
and in products with the calibration tokens (running the blocks, summing x x^T, refining); each has its own rate.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch

from whit.formats.bands import bands_of
from whit.layouts import BITS
from whit.methods import Method, stand_in
from whit.methods.base import BlockMethod
from whit.methods.lowrank import beside
from whit.methods.regrid import effort
from whit.model.graph import find_blocks
from whit.pipeline.job import Job
from whit.pipeline.plan import Item
from whit.process import peak_memory
from whit.tensor import Format, LayerStats

READ_RATE, WRITE_RATE = 1.0e9, 0.5e9  # bytes per second of an ordinary solid-state disk
TRIAL = 1 << 20  # weights
TRIAL_COLUMNS = 512  # of a trial with statistics: what grows with the columns is counted, not tried
WORKING_BYTES = 24  # per weight of the parameter in work: float32 copies, codes, and the next one being read
SQUARES = 24  # bytes per element of the widest hessian: one in float32, two and a half in float64
FACTOR = 1.5  # products of n^3 in factoring an n x n hessian
AROUND = 2.0  # a block's whole time over that of its products: norms, softmax, rotations
LOADED = 1 << 27  # bytes of code and buffers that come with a first run of a block
ACTIVATIONS = 3  # what a backward pass keeps, over the inputs and outputs of all linears


@dataclass(frozen=True)
class Estimate:
    """Seconds, bytes of peak memory, and bytes that the weight files take on the disk.

    `inputs_bytes` are those of all block inputs; beyond `Options.input_memory` they lie in files, not in memory.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    inputs_bytes: int = 0


def estimate(job: Job) -> Estimate:
    """Time the method on random weights and scale up; reads none of the model's."""
    quantized = [item for item in job.plan.items if item.format is not None]
    largest = max((math.prod(_shape(item)) for item in quantized), default=0)
    seconds = sum(item.spec.nbytes for item in job.plan.items) / READ_RATE
    seconds += job.plan.size_bytes / WRITE_RATE
    memory, inputs = peak_memory() + WORKING_BYTES * largest, 0
    if job.recipe is not None:
        for method in job.recipe.all_methods:
            own = [item for item in quantized if (item.method or job.recipe.method) == method]
            seconds += _solving(job, method, own)
        if job.recipe.transform is not None:  # it rounds by a stand-in with every scale that it tries
            seconds += job.recipe.transform.trials * _solving(job, stand_in(job.recipe.method), quantized)
        blocks = _blocks(job) if job.calibration is not None and job.recipe.needs_stats else []
        if blocks:
            slowest = max(
                job.recipe.all_methods, key=lambda method: (isinstance(method, BlockMethod), method.needs_exact)
            )
            seconds += _running(job, slowest, blocks)
            inputs = _inputs(job, slowest)
            memory += _holding(job, slowest, blocks) + (inputs if inputs <= job.options.input_memory else 0)
            if job.recipe.transform is not None:  # a block waits in its new basis, in float32
                memory += max(sum(4 * math.prod(item.spec.shape) for item in unit.items) for unit in job.plan.units)
    return Estimate(seconds, memory, job.plan.size_bytes, inputs)


def _solving(job: Job, method: Method, quantized: list[Item]) -> float:
    """Seconds for the method on all matrices, each for itself."""
    weights: Counter[tuple[Format, int]] = Counter()  # more of them where each takes longer
    matrices: Counter[tuple[Format, int]] = Counter()
    for item in quantized:
        assert item.format is not None
        columns = _shape(item)[-1]
        times = math.ceil(effort(item.format)) if item.name in job.regridded else 1
        for form, rows in parts_of(item.format, math.prod(_shape(item)[:-1])):
            weights[form, columns] += times * rows * columns
            matrices[form, columns] += times * math.prod(_shape(item)[:-2])
    rate = _rate(torch.float64, job.device) if method.needs_stats else 1.0
    total = 0.0
    for (form, columns), count in weights.items():
        tried = min(columns, TRIAL_COLUMNS) if method.needs_stats else columns
        each, every = _trial(method, form, tried, job.device)
        if method.needs_stats:  # each later column is corrected by each earlier one
            every += (columns - tried) / rate
            each = each * columns / tried + 2 * FACTOR * (columns**3 - tried**2 * columns) / rate
        total += count * every + matrices[form, columns] * each
    return total


def parts_of(format: Format, rows: int) -> list[tuple[Format, int]]:
    """What is quantized by itself: a format and its rows."""
    if (bands := bands_of(format)) is None:
        return [(format, rows)]
    return [(form, count) for (form, _), count in zip(bands.parts, bands.counts(rows), strict=True)]


def _running(job: Job, method: Method, blocks: list[list[Item]]) -> float:
    """Seconds for running the blocks over all tokens, forwards and for a refinement backwards, and for the sums."""
    assert job.calibration is not None
    context, tokens, hidden = job.calibration.context, job.calibration.count, _hidden(job)
    products = sum(2 * active_weights(job, item) for block in blocks for item in block)
    forward = products + 4 * context * hidden * len(blocks)
    seconds = AROUND * passes(job, method) * tokens * forward / _rate(_dtype(job), job.device)
    # Of linears that share an input one is summed: about half of all. The account wants two products with the sum.
    squares = sum(_shape(item)[-1] ** 2 * tokens for block in blocks for item in block)
    account = sum(4 * math.prod(_shape(item)) * _shape(item)[-1] for block in blocks for item in block)
    return seconds + ((1 + method.needs_exact) * squares + account) / _rate(torch.float32, job.device)


def passes(job: Job, method: Method) -> float:
    """How often a block runs over a calibration token: for statistics, unquantized too where the method asks for it,
    for the ranges of inputs, while it is refined (backwards as well), and to give the next block its inputs."""
    assert job.calibration is not None
    assert job.recipe is not None
    ranges = any(how.needs_stats for how in job.recipe.all_activations)
    refined = method.passes(job.calibration.samples) if isinstance(method, BlockMethod) else 0
    return 2 + method.needs_exact + ranges + refined


def _inputs(job: Job, method: Method) -> int:
    """Bytes of block inputs, and of what the unquantized model has in their place where the method asks for it."""
    assert job.calibration is not None
    return (1 + method.needs_exact) * job.calibration.count * _hidden(job) * _dtype(job).itemsize


def _holding(job: Job, method: Method, blocks: list[list[Item]]) -> int:
    """Bytes of a block with its statistics, and of what a refinement keeps."""
    assert job.calibration is not None
    context = job.calibration.context
    twice, itemsize = 1 + method.needs_exact, _dtype(job).itemsize
    columns = [_shape(item)[-1] for block in blocks for item in block]
    largest = max((sum(math.prod(_shape(item)) for item in block) for block in blocks), default=0)
    statistics = max((sum(_shape(item)[-1] ** 2 for item in block) for block in blocks), default=0) * 4 // 2
    memory = LOADED + itemsize * largest + twice * statistics + SQUARES * max(columns, default=0) ** 2
    if isinstance(method, BlockMethod):
        wide = max((sum(sum(_shape(item)[-2:]) for item in block) for block in blocks), default=0)
        at_once = min(method.at_once, torch.get_num_threads()) if job.device.type == "cpu" else method.at_once
        memory += method.weight_bytes * largest + ACTIVATIONS * itemsize * wide * at_once * context
    return memory


def _blocks(job: Job) -> list[list[Item]]:
    """The matrices to be quantized, block by block; blocks that have none are left out."""
    names = set(find_blocks(job.source.model).names)
    units = [unit.items for unit in job.plan.units if unit.name in names]
    blocks = [[item for item in items if item.format is not None] for items in units]
    return [items for items in blocks if items]


def _shape(item: Item) -> tuple[int, ...]:
    """(out, in), or (experts, out, in)."""
    assert item.target is not None
    return item.target.shape


def active_weights(job: Job, item: Item) -> float:
    """Weights that a token meets: of a stack of experts only the chosen ones."""
    config = job.source.model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) if len(_shape(item)) == 3 else None
    return math.prod(_shape(item)) * (min(chosen / _shape(item)[0], 1.0) if chosen else 1.0)


def _hidden(job: Job) -> int:
    return int(job.source.model.config.get_text_config().hidden_size)


def _dtype(job: Job) -> torch.dtype:
    """In which the blocks compute."""
    dtype = next((item.spec.dtype for item in job.plan.items if item.target is not None), torch.float32)
    return torch.float32 if dtype == torch.float16 and job.device.type == "cpu" else dtype


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Products and sums per second in a matrix product of this dtype."""
    size = 2048 if device.type == "cuda" else TRIAL_COLUMNS
    x = torch.ones(size, size, dtype=dtype, device=device)
    float((x @ x)[0, 0])
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < 0.05:
        float((x @ x)[0, 0])  # to wait for it
        count += 1
    return 2 * size**3 * count / seconds


def _trial(method: Method, format: Format, columns: int, device: torch.device) -> tuple[float, float]:
    """Seconds per matrix and seconds per weight of quantizing, packing and measuring the error."""
    columns = max(columns, format.group_size)
    columns -= columns % max(format.group_size, 1)
    rows = max(TRIAL // columns, 1)
    if not method.needs_stats:
        return 0.0, _seconds(method, format, (rows, columns), device) / (rows * columns)
    few = max(rows // 64, 1)
    short, long = (_seconds(method, format, (n, columns), device) for n in (few, rows // 4 + few))
    every = max(long - short, 0.0) / (rows // 4 * columns)
    return max(short - every * few * columns, 0.0), every


def _seconds(method: Method, format: Format, shape: tuple[int, int], device: torch.device) -> float:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(device)
    start = time.perf_counter()
    stats = LayerStats(torch.eye(shape[1], device=device), 1) if method.needs_stats else None
    quantized = beside(method)(weight, stats, format)
    BITS.pack(quantized)
    (quantized.dequantize() - weight).norm().item()
    return time.perf_counter() - start
