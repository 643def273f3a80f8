"""Products of int8 rows and int8 weights on Hopper: rows quantized by one kernel, multiplied by another.

int8_quantize.cu says how rows become codes, int8_product.cu how they are multiplied, int8_mark.cu finds the columns
of LLM.int8() where there are several rows. All begin before the kernel in front of them is done, and wait for it where
they need what it made; so the weight is on its way while the rows are being quantized.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from whit.kernels.gpu import maps, nvrtc

HERE = Path(__file__).parent
PRODUCT = HERE / "int8_product.cu"
BYTES = {"BITS": 8, "CODEBOOK": 0, "OFFSET": 0, "SCALE": 2, "ZERO": 0}  # common.cuh asks; nothing here depends on it
STEP = 128  # columns of a tile, one byte each
AT_ONCE = 16  # outlier columns in shared memory, as in int8_warp.cuh
LARGEST_SHARED = 227 << 10
Mapped: TypeAlias = Callable[..., "ctypes.Array[ctypes.c_uint64]"]  # as `tiles_of`
NO_MAP = (ctypes.c_uint64 * 16)()


@dataclass(frozen=True)
class Config:
    """How the work is cut; int8_product.cu explains the names. `split` blocks share the columns of a tile."""

    groups: int = 1
    outs: int = 128
    stages: int = 6
    split: int = 1
    pair: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.groups

    @property
    def threads(self) -> int:
        return 128 * (self.groups + 1)

    @property
    def through(self) -> bool:
        """Whether outs leave through shared memory, for which a row of y is a multiple of 16 bytes."""
        return self.groups == 2 and self.split == 1

    @property
    def across(self) -> int:
        """Outs of a box of 64 rows, which is what leaves at a time; narrow where the stages leave little room."""
        return 64 if self.outs % 64 == 0 and self.stages * (self.rows + self.outs) <= 3 * 384 else 32

    @property
    def boxes(self) -> int:
        """Such boxes of four warps in shared memory: all of a tile, or one while another leaves."""
        return self.outs // self.across if self.stages * (self.rows + self.outs) <= 3 * 384 else 2

    def tiles(self, outs: int, rows: int) -> int:
        """Tiles of a product, or pairs of them."""
        return -(-rows // (self.rows * self.pair)) * -(-outs // self.outs)

    def grid(self, outs: int, rows: int, processors: int) -> nvrtc.Dims:
        """Blocks: a cluster per tile, or as many as run at a time, which take one tile after the other."""
        tiles = self.tiles(outs, rows)
        if self.split > 1:
            return tiles * self.split, 1, 1
        return min(tiles, max(processors // self.pair, 1)) * self.pair, 1, 1

    def shared_bytes(self, outliers: bool, shifted: bool) -> int:
        """Dynamic shared memory: up to 1,024 bytes to where stages may begin, these, barriers, and what lies aside."""
        aside = 4 * (2 * self.outs + 2 * self.rows)
        aside += 4 * (self.outs + self.rows) if shifted else 0
        aside += 8 + (2 if self.split == 1 else 4) * AT_ONCE * (self.outs + self.rows) if outliers else 0
        outs = 128 * self.groups * self.boxes * self.across if self.through else 0
        return 1024 + self.stages * (self.rows + self.outs) * STEP + outs + 16 * self.stages + aside

    def macros(self, half: bool, outliers: bool, shifted: bool) -> dict[str, int]:
        """What int8_product.cu is compiled with."""
        return BYTES | {
            "HALF": int(half), "WG": self.groups, "BN": self.outs, "STAGES": self.stages, "SPLITS": self.split,
            "PAIR": self.pair, "ACROSS": self.across, "BOXES": self.boxes, "OUTLIERS": int(outliers),
            "SHIFTED": int(shifted),
        }  # fmt: skip


class ProductParams(ctypes.Structure):
    """The argument of int8_product.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_uint64 * 16) for name in ("x_map", "weight_map", "y_map")),
        *((name, ctypes.c_void_p) for name in (
            "codes", "floats", "scale", "offset", "zero", "row_scale", "sums", "bias", "listed", "y",
        )),
        *((name, ctypes.c_int) for name in ("outs", "columns", "rows")),
        ("rest", ctypes.c_int * 9),  # the maps make it a multiple of 64 bytes
    )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Quantized rows on the device: int8 codes (rows, in), float32 scale and int32 offset (rows,), which is 128 times
    the sum of a row's codes; int32 zero point (rows,) or None. With outliers `listed` int32 (1 + in,), a count and that
    many columns, and `floats`, what was quantized."""

    codes: Tensor
    scale: Tensor
    offset: Tensor
    zero: Tensor | None = None
    listed: Tensor | None = None
    floats: Tensor | None = None


@dataclass(frozen=True)
class Weight:
    """The other side: codes uint8 (outs, columns), each 128 above its value, float32 row_scale (outs,), a bias in the
    rows' own type or None, and, where rows have zero points, int32 sums (outs,) of the values."""

    codes: Tensor
    row_scale: Tensor
    bias: Tensor | None = None
    sums: Tensor | None = None


def product_params(
    rows: Rows, weight: Weight, y: Tensor, config: Config, mapped: Mapped | None = None
) -> ProductParams:
    """The kernel's argument; it borrows the tensors' memory. `mapped` makes maps, as `tiles_of` does."""
    (count, outs), columns, mapped = y.shape, rows.codes.shape[1], mapped or tiles_of
    pointers = {
        "codes": weight.codes, "floats": rows.floats, "scale": rows.scale, "offset": rows.offset, "zero": rows.zero,
        "row_scale": weight.row_scale, "sums": weight.sums, "bias": weight.bias, "listed": rows.listed, "y": y,
    }  # fmt: skip
    return ProductParams(
        mapped(rows.codes.data_ptr(), count, columns, config.rows),
        mapped(weight.codes.data_ptr(), outs, columns, config.outs // config.pair),
        mapped(y.data_ptr(), count, outs, 64, config.across, 2) if config.through else NO_MAP,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in pointers.items()},
        outs=outs, columns=columns, rows=count,
    )  # fmt: skip


def multiply(rows: Rows, weight: Weight, y: Tensor, config: Config) -> None:
    """Fill y (rows, outs) with quantized rows through the weight."""
    outliers, shifted, device = rows.listed is not None, rows.zero is not None, y.device.index
    function = nvrtc.built(PRODUCT, tuple(config.macros(y.dtype == torch.float16, outliers, shifted).items()), device)
    grid = config.grid(y.shape[1], len(y), nvrtc.processors(device))
    shared, where = config.shared_bytes(outliers, shifted), nvrtc.stream_on(y.device.index)
    params = product_params(rows, weight, y, config)
    function.launch_early(grid, config.threads, shared, params, where, config.split * config.pair)


def tiles_of(address: int, rows: int, columns: int, tall: int, wide: int = STEP, size: int = 1) -> maps.Map:
    """A map of a contiguous matrix of elements of `size` bytes for tiles of `tall` rows and `wide` columns."""
    return maps.tiles_of(address, rows, columns, tall, wide, size)
