"""The fused product for up to 8 rows: blocks that stay, and few instructions per code (few.cu says how)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from whit.kernels.gpu import nvrtc, stream
from whit.kernels.gpu.stream import Operands, Scheme

SOURCE = Path(__file__).with_name("few.cu")
MOST_ROWS = 8
MOST_SHARED = 226 << 10


@dataclass(frozen=True)
class Config:
    """How the work is cut; few.cu explains the names."""

    warps: int = 8
    ahead: int = 4
    min_blocks: int = 2

    @property
    def threads(self) -> int:
        return 32 * self.warps


def rounded(rows: int) -> int:
    """Rows that the kernel is built for: 1, 2, 4 or 8."""
    return 1 << (rows - 1).bit_length()


def macros(scheme: Scheme, config: Config, half: bool, rows: int) -> dict[str, int]:
    """What few.cu is compiled with, for up to `rows` rows."""
    return scheme.storage.macros | {
        "HALF": int(half), "CHUNK": scheme.chunk, "STEPS_PER_GROUP": scheme.steps_per_group, "ROWS": rounded(rows),
        "WARPS": config.warps, "AHEAD": config.ahead, "MIN_BLOCKS": config.min_blocks,
    }  # fmt: skip


def shared_bytes(scheme: Scheme, config: Config, rows: int, columns: int) -> int:
    """Dynamic shared memory of a block: table, levels of scales, x, its sums, and the warps' sums of two tiles."""
    rows = rounded(rows)
    steps = columns // scheme.step
    table = (stream.TABLE_BYTES if scheme.storage.levels else 0) + (1024 if scheme.storage.scale == 3 else 0)
    return table + 2 * rows * columns + -(-steps * rows // 4) * 16 + 2 * config.warps * rows * 64


def fits(scheme: Scheme, config: Config, rows: int, columns: int) -> bool:
    """Whether the kernel can run it: few rows, and x in shared memory."""
    return rows <= MOST_ROWS and shared_bytes(scheme, config, rows, columns) <= MOST_SHARED


def resident(scheme: Scheme, config: Config, rows: int, columns: int) -> int:
    """Blocks per multiprocessor."""
    return max(min(config.min_blocks, MOST_SHARED // shared_bytes(scheme, config, rows, columns)), 1)


def grid(scheme: Scheme, config: Config, shape: tuple[int, int], rows: int, multiprocessors: int) -> int:
    """Blocks for a weight of `shape` (outs, columns): as many as stay at a time."""
    tiles = -(-shape[0] // 16)
    most = multiprocessors * resident(scheme, config, rows, shape[1])
    return min(tiles, most)


@lru_cache(maxsize=512)
def build(scheme: Scheme, config: Config, half: bool, rows: int, device: int) -> nvrtc.Function:
    """The compiled kernel on a device, for `rows` (1, 2, 4 or 8)."""
    return nvrtc.build(SOURCE, macros(scheme, config, half, rows), "few", device)


def launch(operands: Operands, scheme: Scheme, config: Config, multiprocessors: int) -> None:
    """Fill operands.y."""
    x = operands.x
    rows, columns = x.shape
    function = build(scheme, config, x.dtype == torch.float16, rounded(rows), x.device.index)
    shape = (operands.y.shape[1], columns)
    blocks = grid(scheme, config, shape, rows, multiprocessors)
    argument, shared = stream.params(operands, scheme, 1), shared_bytes(scheme, config, rows, columns)
    where = torch.cuda.current_stream(x.device).cuda_stream
    function.launch_early((blocks, 1, 1), config.threads, shared, argument, where)
