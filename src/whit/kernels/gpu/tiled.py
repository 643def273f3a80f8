"""The fused product for more rows: tiles of 64 outs, decoded in registers (tiled.cu says how)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc, stream
from whit.kernels.gpu.stream import Operands, Scheme

SOURCE = Path(__file__).with_name("tiled.cu")
ARRANGE = Path(__file__).with_name("arrange.cu")
ARRANGE_THREADS = 128
BARRIER_BYTES = 128
ROW_TILES = (2, 4, 8, 16, 32)
MOST_TILES = 16  # of rows, where a cut was not measured
STAGE_COLUMNS = 2048  # of x, for a tile of 8 rows, that fit in the shared memory


@dataclass(frozen=True)
class Config:
    """How the work is cut; tiled.cu explains the names. `splits` are blocks along the columns."""

    tiles: int = 1
    warpgroups: int = 2
    row_tiles: int = 8
    ahead: int = 2
    stages: int = 4
    splits: int = 1
    min_blocks: int = 1

    @property
    def outs(self) -> int:
        return 64 * self.tiles * self.warpgroups

    @property
    def rows(self) -> int:
        return 8 * self.row_tiles

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def whole(self) -> Config:
        """Without splits, which are not part of what is compiled."""
        return replace(self, splits=1)


class ArrangeParams(ctypes.Structure):
    """The argument of the kernel that lays x out, field by field as in arrange.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("to", ctypes.c_void_p), ("rows", ctypes.c_int), ("columns", ctypes.c_int),
    )  # fmt: skip


def macros(scheme: Scheme, config: Config, half: bool, wgmma: bool) -> dict[str, int]:
    """What tiled.cu is compiled with."""
    return scheme.storage.macros | {
        "HALF": int(half), "CHUNK": scheme.chunk, "STEPS_PER_GROUP": scheme.steps_per_group, "MT": config.tiles,
        "WG": config.warpgroups, "NT": config.row_tiles, "AHEAD": config.ahead, "STAGES": config.stages,
        "MIN_BLOCKS": config.min_blocks, "WGMMA": int(wgmma), "SPREAD": scheme.spread,
    }  # fmt: skip


def arrange_macros(scheme: Scheme, row_tiles: int) -> dict[str, int]:
    """What arrange.cu is compiled with: nothing of the scales matters to it."""
    storage = {"BITS": scheme.storage.bits, "CODEBOOK": int(bool(scheme.storage.levels)), "OFFSET": 0, "SCALE": 0}
    return storage | {"ZERO": 0, "HALF": 0, "CHUNK": scheme.chunk, "STEPS_PER_GROUP": 1, "NT": row_tiles}


def shared_bytes(scheme: Scheme, config: Config) -> int:
    """Dynamic shared memory of a block: barriers, the table, the stages of x; at the end the sums."""
    table = stream.TABLE_BYTES if scheme.storage.levels else 0
    stages = config.stages * scheme.step * config.rows * 2
    return BARRIER_BYTES + max(table + stages, config.rows * (config.outs + 4) * 4)


def grid(config: Config, outs: int, rows: int) -> tuple[int, int, int]:
    """Blocks along outs, splits of the columns, and rows."""
    return -(-outs // config.outs), config.splits, -(-rows // config.rows)


def widened(scheme: Scheme, rows: int, columns: int) -> Scheme:
    """The scheme in whose steps groups lie side by side until a thread holds 16 bytes of a row, which cost no more
    instructions than fewer; stages of x for so many rows still have room."""
    row_tiles = next((n for n in ROW_TILES if 8 * n >= rows), MOST_TILES)
    most_step = STAGE_COLUMNS // min(row_tiles, MOST_TILES)
    while scheme.steps_per_group == 1 and scheme.spread < 4 and 2 * scheme.chunk <= min(128 // scheme.storage.bits, 64):
        if 32 % scheme.storage.bits or 2 * scheme.step > most_step or columns % (2 * scheme.step):
            break
        scheme = replace(scheme, chunk=2 * scheme.chunk, spread=2 * scheme.spread)
    return scheme


def fitted(config: Config, scheme: Scheme, columns: int) -> Config:
    """`config` with as many splits as `scheme` has room for."""
    return replace(config, splits=scheme.splits(config.splits, columns))


def arranged_like(x: Tensor, config: Config) -> Tensor:
    """Room for x (rows, columns) as arrange.cu lays it out, with whole tiles of rows."""
    rows, columns = x.shape
    return torch.empty(-(-rows // config.rows) * config.rows, columns, dtype=x.dtype, device=x.device)


def arrange_grid(x: Tensor, config: Config) -> tuple[int, int, int]:
    """Blocks of arrange.cu: a thread per row and 32 columns."""
    return -(-config.rows * (x.shape[1] // 32) // ARRANGE_THREADS), 1, -(-x.shape[0] // config.rows)


def params(operands: Operands, arranged: Tensor, scheme: Scheme, config: Config) -> stream.Params:
    """The kernel's argument; it borrows the tensors' memory."""
    argument = stream.params(operands, scheme, config.splits)
    argument.x = arranged.data_ptr()
    return argument


@lru_cache(maxsize=512)
def build(scheme: Scheme, config: Config, half: bool, wgmma: bool, device: int) -> nvrtc.Function:
    """The compiled kernel on a device."""
    return nvrtc.build(SOURCE, macros(scheme, config, half, wgmma), device)


@lru_cache(maxsize=32)
def has_wgmma(device: torch.device) -> bool:
    """Whether the device has Hopper's matrix instruction, which neither older nor newer ones have."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def launch(operands: Operands, scheme: Scheme, config: Config, wgmma: bool) -> None:
    """Fill operands.y. `partial` and `arrived` (zeros) are needed where config.splits > 1."""
    x = operands.x
    (rows, columns), device = x.shape, x.device.index
    where = nvrtc.stream_on(x.device.index)
    arranged = arranged_like(x, config)
    lay = nvrtc.built(ARRANGE, tuple(arrange_macros(scheme, config.row_tiles).items()), device)
    function = build(scheme, config.whole, x.dtype == torch.float16, wgmma, device)
    laid = ArrangeParams(x.data_ptr(), arranged.data_ptr(), rows, columns)
    lay.launch_early(arrange_grid(x, config), ARRANGE_THREADS, 0, laid, where)
    cut, shared = grid(config, operands.y.shape[1], rows), shared_bytes(scheme, config)
    function.launch_early(cut, config.threads, shared, params(operands, arranged, scheme, config), where)
