"""The fused product for up to 8 rows: blocks that stay, and few instructions per code (few.cu says how)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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


def macros(scheme: Scheme, config: Config, half: bool, rows: int, parts: int = 1) -> dict[str, int]:
    """What few.cu is compiled with, for up to `rows` rows and that many weights."""
    return scheme.storage.macros | {
        "HALF": int(half), "CHUNK": scheme.chunk, "STEPS_PER_GROUP": scheme.steps_per_group, "ROWS": rounded(rows),
        "WARPS": config.warps, "AHEAD": config.ahead, "MIN_BLOCKS": config.min_blocks, "PARTS": parts,
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


def grid(scheme: Scheme, config: Config, outs: Sequence[int], x: tuple[int, int], multiprocessors: int) -> int:
    """Blocks for weights of these `outs` and x (rows, columns): as many as stay at a time."""
    tiles = sum(-(-n // 16) for n in outs)
    return min(tiles, multiprocessors * resident(scheme, config, *x))


def params(operands: Sequence[Operands], scheme: Scheme) -> ctypes.Structure:
    """The kernel's argument for weights that share x."""
    kind = type("Several", (ctypes.Structure,), {"_fields_": [("part", stream.Params * len(operands))]})
    return kind((stream.Params * len(operands))(*(stream.params(each, scheme, 1) for each in operands)))  # type: ignore[no-any-return]


@lru_cache(maxsize=512)
def build(scheme: Scheme, config: Config, half: bool, rows: int, parts: int, device: int) -> nvrtc.Function:
    """The compiled kernel on a device, for `rows` (1, 2, 4 or 8)."""
    return nvrtc.build(SOURCE, macros(scheme, config, half, rows, parts), "few", device)


def launch(operands: Sequence[Operands], scheme: Scheme, config: Config, multiprocessors: int) -> None:
    """Fill y of each; they have the same x."""
    x = operands[0].x
    rows, columns = x.shape
    function = build(scheme, config, x.dtype == torch.float16, rounded(rows), len(operands), x.device.index)
    blocks = grid(scheme, config, [each.y.shape[1] for each in operands], (rows, columns), multiprocessors)
    shared, where = shared_bytes(scheme, config, rows, columns), torch.cuda.current_stream(x.device).cuda_stream
    function.launch_early((blocks, 1, 1), config.threads, shared, params(operands, scheme), where)
